"""The noun phrases of a prompt."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ragturbo.retrieval.phrases import phrases
from ragturbo.retrieval.words import may_be_name, words

PROMPTS = {
    "two zibs left of a blue square": ["two zibs", "a blue square"],
    "a zib to the right of three red crosses": ["a zib", "three red crosses"],
    "A Zib above a wug, next to the small house": ["A Zib", "a wug", "the small house"],
    "a picture of a zib": ["a zib"],
    "a black and white photo of a zib beside two wugs": ["a zib", "two wugs"],
    "a zib under a star on a white background": ["a zib", "a star"],
    "a boat on the water with a lighthouse in the background": ["a boat", "the water", "a lighthouse"],
    "a black and white cat behind a wug": ["a black and white cat", "a wug"],
    "a red, round ball in the grass": ["a red, round ball", "the grass"],
    "a bowl of fruit on the table": ["a bowl of fruit", "the table"],
    "a zib on the left and a wug on the right": ["a zib", "a wug"],
    "a dog sitting on a chair without a tail": ["a dog sitting", "a chair"],
    "a zib standing in front of a house that has a red door": ["a zib", "a house", "a red door"],
    "there are two zibs between a star and a moon": ["two zibs", "a star", "a moon"],
    "in the garden, a zib": ["the garden", "a zib"],
    "zib": ["zib"],
    "on the left": [],
    "": [],
}


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_prompt_is_cut_into_its_noun_phrases(prompt):
    assert phrases(prompt) == PROMPTS[prompt]


PARTS = [
    "a zib",
    "two red wugs",
    "left of",
    "and",
    ",",
    "in the background",
    "with",
    "the left",
    "without",
    "  ",
    "é",
    ".",
]


@given(st.lists(st.sampled_from(PARTS), max_size=12).map(" ".join))
def test_every_phrase_names_something_and_is_part_of_the_prompt(prompt):
    for phrase in phrases(prompt):
        assert any(may_be_name(word) for word in words(phrase)) and phrase == " ".join(phrase.split())
        assert set(words(phrase)) <= set(words(prompt))


@given(st.text(max_size=60))
def test_any_text_can_be_cut(prompt):
    assert all(phrase.strip() for phrase in phrases(prompt))
