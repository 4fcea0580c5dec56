"""Percentiles and noise of repeated measurements."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Return p50, p95, p99, min, max and mean, with linear interpolation between the sorted values."""
    if not len(seconds):
        raise ValueError("no measurements")
    p50, p95, p99 = np.percentile(seconds, [50, 95, 99]).tolist()
    return {"p50": p50, "p95": p95, "p99": p99, "min": min(seconds), "max": max(seconds),
            "mean": sum(seconds) / len(seconds)}  # fmt: skip


def noise(seconds: Sequence[float]) -> float:
    """Return the relative difference between the medians of the first and the second half of a run."""
    half = len(seconds) // 2
    if half == 0:
        return 0.0
    first, second = (percentiles(part)["p50"] for part in (seconds[:half], seconds[-half:]))
    return abs(first - second) / max(min(first, second), 1e-12)
