"""The pace from which the executor predicts whether a deadline can be met."""

from __future__ import annotations

import pytest

from ragturbo.engine import pace as module
from ragturbo.engine.pace import Pace


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_what_the_host_does_between_two_batches_is_part_of_the_pace_where_somebody_waits(clock):
    pace = Pace(4)
    for _ in range(5):
        pace.started(4, queued_at=90.0)
        clock[0] += 0.1
        pace.ended(counts=True)
        # Futures answered, the next batch put together.
        clock[0] += 0.02
    # The first batch's request had waited for the process to start: one of five is no pace.
    assert pace.expected(8) == pytest.approx(0.24)


def test_a_device_that_waited_for_work_is_not_slow(clock):
    pace = Pace(4)
    for _ in range(5):
        clock[0] += 60.0
        pace.started(4, queued_at=clock[0])
        clock[0] += 0.1
        pace.ended(counts=True)
    assert pace.expected(4) == pytest.approx(0.1)
    pace.started(4, queued_at=clock[0])
    clock[0] += 0.04
    assert pace.expected(4) == pytest.approx(0.16)
