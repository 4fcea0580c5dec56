"""From scores of images to a table: means, bootstrap intervals, and what may be called better."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from ragturbo.evaluate.scores import Scored
from ragturbo.evaluate.suites import Prompt

RESAMPLES = 2000
SEED = 0


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts with its bootstrap 95 % interval."""

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
    """By metric, by group of prompts (common and rare)."""
    categories: dict[str, dict[str, Estimate]] = field(default_factory=dict)
    """By metric, by category of question."""
    differences: dict[str, Estimate] = field(default_factory=dict)
    """By metric, to the baseline, paired prompt by prompt."""
    numbers: dict[str, float] = field(default_factory=dict)
    """What is one number for the whole set, such as FID."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def estimate(values: Sequence[float], weights: Sequence[float] | None = None) -> Estimate:
    """Mean of values, weighted where a value stands for several questions."""
    array = np.asarray(values, np.float64)
    if not len(array):
        return Estimate(float("nan"), float("nan"), float("nan"), 0)
    scale = np.ones(len(array)) if weights is None else np.asarray(weights, np.float64)
    rng = np.random.default_rng(SEED)
    picks = rng.integers(0, len(array), (RESAMPLES, len(array)))
    # A resample that drew no question at all has no mean.
    total = scale[picks].sum(1)
    means = (array * scale)[picks].sum(1)[total > 0] / total[total > 0]
    low, high = np.quantile(means, (0.025, 0.975))
    return Estimate(float((array * scale).sum() / scale.sum()), float(low), float(high), len(array))


def verdict(difference: Estimate) -> str:
    """ "better" and "worse" only where the interval of the paired difference leaves zero out."""
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
    scores: dict[str, dict[str, Scored]],
    baseline: dict[str, dict[str, Scored]] | None = None,
    numbers: dict[str, float] | None = None,
) -> Row:
    """scores: by metric, by prompt id."""
    row = Row(system, title, steps, numbers=dict(numbers or {}))
    for metric, found in scores.items():
        held = [(prompt, found[prompt.id]) for prompt in prompts if prompt.id in found]
        row.metrics[metric] = estimate([scored.value for _, scored in held])
        groups = sorted({prompt.group for prompt, _ in held} - {""})
        row.groups[metric] = {g: estimate([s.value for p, s in held if p.group == g]) for g in groups}
        row.categories[metric] = _categories([scored for _, scored in held])
        if baseline is not None and metric in baseline:
            both = [(found[p.id].value, baseline[metric][p.id].value) for p in prompts if p.id in baseline[metric]]
            row.differences[metric] = estimate([ours - theirs for ours, theirs in both])
    return row


def _categories(scores: Sequence[Scored]) -> dict[str, Estimate]:
    names = sorted({name for scored in scores for name in scored.detail})
    out = {}
    for name in names:
        counts = [scored.detail[name] for scored in scores if name in scored.detail]
        out[name] = estimate([right / asked for right, asked in counts], [asked for _, asked in counts])
    return out
