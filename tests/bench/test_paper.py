"""The paper's figures, and the claims of its text that its tables contradict."""

from __future__ import annotations

from ragturbo.bench.paper import figure, footnotes, paper


def test_every_figure_has_a_value_and_a_place():
    for name, entry in paper()["figures"].items():
        assert isinstance(entry["value"], (int, float)) and entry["place"], name


def test_the_parts_of_the_latency_add_up():
    whole = figure("latency.ours.retrieval") + figure("latency.ours.denoising")
    assert abs(whole - figure("latency.ours")) < 0.05


def test_a_footnote_stands_where_the_paper_disagrees_with_itself_and_nowhere_else():
    notes = " ".join(footnotes())
    assert "1.37 %" in notes and "1.25 %" in notes
    assert "5.83" in notes and "5.85" in notes
    assert "47 % less, not more" in notes
    # Controls: claims that agree with the figures get no footnote.
    assert "2.5 % overhead" not in notes and "25 times" not in notes and "1.03 %" not in notes
    assert 0 < len(footnotes()) < len(paper()["claims"])
