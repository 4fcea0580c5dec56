"""Intervals, paired differences and verdicts."""

from __future__ import annotations

import numpy as np
import pytest

from ragturbo.evaluate.scores import ImageScore, right_share
from ragturbo.evaluate.suites import Prompt
from ragturbo.evaluate.table import estimate, make_row, verdict


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(5)
    hits = 0
    for _ in range(200):
        found = estimate(rng.normal(0.6, 0.2, 100).tolist())
        hits += found.low <= 0.6 <= found.high
    assert 180 <= hits <= 199


def test_a_constant_has_no_width_and_nothing_has_no_mean():
    assert estimate([0.5] * 9) == estimate([0.5] * 9).__class__(0.5, 0.5, 0.5, 9)
    assert np.isnan(estimate([]).mean)


def test_better_is_said_only_outside_the_interval():
    rng = np.random.default_rng(1)
    noise = rng.normal(0, 0.3, 400)
    assert verdict(estimate((noise + 0.2).tolist())) == "better"
    assert verdict(estimate((noise - 0.2).tolist())) == "worse"
    assert verdict(estimate((noise - noise.mean()).tolist())) == "no difference shown"


def test_differences_are_paired_by_prompt_and_groups_are_apart():
    prompts = [Prompt(str(i), "", "rare" if i % 2 else "common") for i in range(100)]
    base = np.random.default_rng(2).uniform(0, 1, 100)
    theirs = {"f": {str(i): ImageScore(str(i), v) for i, v in enumerate(base)}}
    ours = {"f": {str(i): ImageScore(str(i), v + 0.01) for i, v in enumerate(base)}}
    row = make_row("x", "X", 1, prompts, ours, theirs)
    # Unpaired, a difference of 0.01 would be below the spread of the prompts.
    assert row.differences["f"].mean == pytest.approx(0.01) and verdict(row.differences["f"]) == "better"
    assert row.groups["f"]["rare"].count == row.groups["f"]["common"].count == 50


def test_a_category_is_the_share_of_right_answers_to_its_questions():
    prompts = [Prompt("a", ""), Prompt("b", "")]
    scores = {"f": {"a": ImageScore("a", 0.5, {"colour": (1, 2)}), "b": ImageScore("b", 1.0, {"colour": (4, 4)})}}
    assert make_row("x", "X", 1, prompts, scores).categories["f"]["colour"].mean == pytest.approx(5 / 6)
    assert right_share({"colour": (1, 2), "object": (2, 2)}) == 0.75
