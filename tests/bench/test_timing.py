"""Percentiles, noise and the order of measurements."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import timing
from benchmarks.timing import bulk_calls, in_bulk, interleaved, normal, rotating, summary
from ragturbo.bench.timing import noise, percentiles

SECONDS = st.lists(st.floats(1e-9, 1e3), min_size=1, max_size=200)


@given(SECONDS)
def test_percentiles_are_numpys(seconds):
    found = percentiles(seconds)
    for name, share in (("p50", 50), ("p95", 95), ("p99", 99)):
        assert found[name] == pytest.approx(np.percentile(seconds, share), rel=1e-12)
    assert found["min"] == min(seconds) and found["max"] == max(seconds)


@given(st.floats(1e-6, 1.0), st.floats(1.0, 5.0), st.integers(1, 50))
def test_noise_is_how_far_the_halves_lie_apart(level, drift, half):
    assert noise([level] * 2 * half) == 0
    assert noise([level] * half + [level * drift] * half) == pytest.approx(drift - 1, abs=1e-9)


def test_inputs_rotate_so_that_no_call_finds_the_last_one_in_the_cache():
    seen: list[int] = []
    run = rotating(seen.append, [(1,), (2,), (3,)])
    for _ in range(7):
        run()
    assert all(a != b for a, b in itertools.pairwise(seen)) and set(seen) == {1, 2, 3}


def test_interleaved_runs_take_turns_at_going_first():
    order: list[str] = []
    times = interleaved({n: lambda n=n: order.append(n) for n in "ab"}, rounds=4)
    assert [len(v) for v in times.values()] == [4, 4]
    rounds = [tuple(order[i : i + 2]) for i in range(4, 12, 2)]
    assert rounds == [("a", "b"), ("b", "a")] * 2


@given(st.floats(1e-9, 10.0), st.integers(1, 2000))
def test_a_replay_holds_whole_turns_of_the_inputs_and_never_too_many(seconds, inputs):
    calls = bulk_calls(seconds, inputs)
    # Less than a turn, or a part of one, would find inputs of the replay before in the cache.
    assert calls >= inputs and calls % inputs == 0 and calls <= max(1000, inputs)
    assert calls * seconds >= 2e-3 * (1 - 1e-9) or calls + inputs > 1000


@pytest.mark.parametrize("inputs, device_seconds, calls", [(305, 5e-6, 610), (40, 50e-6, 40), (1, 50e-6, 40)])
def test_what_is_captured_follows_the_devices_time_and_holds_every_input(monkeypatch, inputs, device_seconds, calls):
    held: list[int] = []

    def graph(call, inputs, calls):
        held.append(calls)
        return lambda: calls * device_seconds

    monkeypatch.setattr(timing, "captured", graph)
    monkeypatch.setattr(timing, "once", lambda run: run())
    _, found = in_bulk(lambda x: x, [(i,) for i in range(inputs)])
    assert found == calls == held[-1] and held[0] == inputs


def test_a_row_says_of_how_many_rounds_it_is_and_what_held_the_card_back():
    found = summary([1.0] * 10 + [1.1] * 10, [{"reasons": ["power cap"]}, None])
    assert found["rounds"] == 20 and found["flags"] == ["noise 10.0%", "throttled: power cap"]
    assert summary([1.0])["flags"] == [] and summary([1.0])["rounds"] == 1


def test_random_inputs_are_parts_of_one_buffer_and_none_is_anothers():
    a, b = normal(2, 1, 8, 4, 6, dtype=torch.float32, device="cpu", channels_last=True)
    assert a.shape == (1, 8, 4, 6) and a.is_contiguous(memory_format=torch.channels_last)
    assert a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() and not torch.equal(a, b)
    (again, _), (other, _) = (normal(2, 5, dtype=torch.float16, device="cpu", seed=seed) for seed in (1, 2))
    assert again.dtype == torch.float16 and again.is_contiguous() and not torch.equal(again, other)
