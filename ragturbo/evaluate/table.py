"""The rows of a report: means of image scores with bootstrap intervals, and paired differences to the baseline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ragturbo.evaluate.scores import ImageScore
from ragturbo.evaluate.suites import Prompt

RESAMPLES, SEED = 2000, 0


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Row:
    system: str
    title: str
    steps: int
    metrics: dict[str, Estimate] = field(default_factory=dict)
    groups: dict[str, dict[str, Estimate]] = field(default_factory=dict)
    """By metric and group of prompts (common, rare)."""
    categories: dict[str, dict[str, Estimate]] = field(default_factory=dict)
    """By metric and category of question."""
    differences: dict[str, Estimate] = field(default_factory=dict)
    """By metric: this system minus the baseline, paired by prompt."""
    numbers: dict[str, float] = field(default_factory=dict)
    """Values of the whole set of images, such as FID."""


def estimate(values: Sequence[float], weights: Sequence[float] | None = None) -> Estimate:
    """Return the mean of values, weighted by the number of questions behind each one if `weights` is given."""
    array = np.asarray(values, np.float64)
    if not len(array):
        return Estimate(float("nan"), float("nan"), float("nan"), 0)
    scale = np.ones(len(array)) if weights is None else np.asarray(weights, np.float64)
    rng = np.random.default_rng(SEED)
    picks = rng.integers(0, len(array), (RESAMPLES, len(array)))
    # Skip resamples whose weights are all zero.
    total = scale[picks].sum(1)
    means = (array * scale)[picks].sum(1)[total > 0] / total[total > 0]
    low, high = np.quantile(means, (0.025, 0.975))
    return Estimate(float((array * scale).sum() / scale.sum()), float(low), float(high), len(array))


def verdict(difference: Estimate) -> str:
    """Return "better" or "worse" if the interval of the difference excludes zero."""
    if difference.low > 0:
        return "better"
    if difference.high < 0:
        return "worse"
    return "no difference shown"


def make_row(
    system: str,
    title: str,
    steps: int,
    prompts: Sequence[Prompt],
    scores: dict[str, dict[str, ImageScore]],
    baseline: dict[str, dict[str, ImageScore]] | None = None,
    numbers: dict[str, float] | None = None,
) -> Row:
    """Summarise a system; `scores` and `baseline` are by metric and prompt id."""
    row = Row(system, title, steps, numbers=dict(numbers or {}))
    for metric, found in scores.items():
        scored = [(prompt, found[prompt.id]) for prompt in prompts if prompt.id in found]
        row.metrics[metric] = estimate([score.value for _, score in scored])
        groups = sorted({prompt.group for prompt, _ in scored} - {""})
        row.groups[metric] = {g: estimate([s.value for p, s in scored if p.group == g]) for g in groups}
        row.categories[metric] = {}
        for name in sorted({name for _, score in scored for name in score.detail}):
            counts = [score.detail[name] for _, score in scored if name in score.detail]
            shares, asked = [right / asked for right, asked in counts], [asked for _, asked in counts]
            row.categories[metric][name] = estimate(shares, weights=asked)
        if baseline is not None and metric in baseline:
            base = baseline[metric]
            row.differences[metric] = estimate([s.value - base[p.id].value for p, s in scored if p.id in base])
    return row
