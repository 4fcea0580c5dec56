"""Fixtures every part shares: seeded randomness that says its seed, and counts that are full only in `make test-long`."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable

import numpy as np
import pytest

LONG = os.environ.get("RAGTURBO_LONG") == "1"
SEED = int(os.environ.get("RAGTURBO_SEED") or secrets.randbits(32))
# Worker processes of a parallel run, and children that tests start, share the controller's seed.
os.environ["RAGTURBO_SEED"] = str(SEED)


def pytest_report_header() -> str:
    return f"ragturbo: seed {SEED} (RAGTURBO_SEED={SEED} repeats it), {'full' if LONG else 'a tenth of the'} counts"


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """A generator that differs from run to run and from test to test, and is repeatable by the seed in the header."""
    return np.random.default_rng([SEED, *request.node.nodeid.encode()])


@pytest.fixture
def long_count() -> Callable[[int], int]:
    """`long_count(200)` is 200 in `make test-long` and a tenth of it in `make test`."""
    return lambda full: full if LONG else max(1, full // 10)
