"""Fig. 6 on any machine: all bars, parts that add up to the total, and a text that claims only what was measured."""

from __future__ import annotations

import copy
import json

import pytest
from typer.testing import CliRunner

from ragturbo.bench import agreement
from ragturbo.bench.breakdown import Settings, breakdown
from ragturbo.bench.fig6 import bars, markdown, rows, verdict
from ragturbo.bench.paper import LABELS
from ragturbo.cli import app
from ragturbo.errors import InvalidRequest


def test_every_bar_of_the_figure_is_there_and_ours_without_the_cache(record):
    assert set(record["profiles"]["paper"]) == set(LABELS)
    assert {"turbo", "ours"} <= set(record["profiles"]["turbo"])
    assert record["weights"] == "random" and any("random weights" in flag for flag in record["flags"])


def test_retrieval_and_denoising_are_the_whole(record):
    for row in rows(record):
        assert row["retrieval_ms"] + row["denoising_ms"] == pytest.approx(row["mean_ms"])
        # Stages are parts of the whole: on a CPU they are measured one after another.
        assert sum(row["stages_ms"].values()) <= row["mean_ms"] * 1.02
    paper = record["profiles"]["paper"]
    assert paper["turbo"]["retrieval"] == 0 < paper["ours"]["retrieval"] < paper["uncached"]["retrieval"]
    assert "adapter" in paper["ours"]["stages"] and "adapter" not in paper["turbo"]["stages"]


def test_both_profiles_make_the_same_latents_and_the_controls_do_not(record):
    agreement = record["profiles"]["turbo"]["agreement"]
    assert set(agreement) == {"turbo", "ours"}
    for found in agreement.values():
        assert found["error"] < 1e-4
        assert found["error_other_prompt"] > 10 * found["error"] and found["error_other_noise"] > 10 * found["error"]


def test_an_engine_that_makes_something_else_has_no_time(monkeypatch):
    monkeypatch.setattr(agreement, "relative_error", lambda ours, theirs: 0.5)
    small = Settings("rehearsal", "cpu", prompts=2, pairs=20, keys=20, profiles=("turbo",))
    found = breakdown(small)
    assert all("from the reference's by" in row["skipped"] for row in rows(found))
    assert found["profiles"]["turbo"]["ours"]["unverified"]["seconds"]["p50"] > 0


def test_an_engine_that_fell_back_to_plain_torch_has_no_time_at_all(monkeypatch):
    why = "4 batches ran in plain torch: rows are not page-locked"
    monkeypatch.setattr("ragturbo.bench.breakdown.engine_mismatch", lambda info, engine, dtype: why)
    small = Settings("rehearsal", "cpu", prompts=2, pairs=20, keys=20, profiles=("turbo",))
    turbo = breakdown(small)["profiles"]["turbo"]
    assert turbo["turbo"] == turbo["ours"] == {"skipped": why}


def test_a_breakdown_that_is_stopped_leaves_the_rows_that_were_done(tmp_path):
    out = tmp_path / "out.json"

    def stop_at_lcm(profile, kind, part):
        out.write_text(json.dumps(part))
        if kind == "lcm":
            raise KeyboardInterrupt

    small = Settings("rehearsal", "cpu", prompts=2, teacher_prompts=1, teacher_steps=2, pairs=20, keys=20)
    with pytest.raises(KeyboardInterrupt):
        breakdown(small, stop_at_lcm)
    part = json.loads(out.read_text())
    # A partial record has another kind, so that it is not drawn as a complete one.
    assert part["kind"] == "breakdown-part" and part["profiles"]["paper"]["teacher"]["seconds"]["p50"] > 0


def test_a_folder_that_cannot_be_written_is_refused_before_the_benchmark_runs(tmp_path, monkeypatch):
    monkeypatch.setattr("ragturbo.bench.breakdown.breakdown", lambda *_: pytest.fail("the benchmark ran"))
    (tmp_path / "a.png").touch()
    result = CliRunner().invoke(app, ["bench", "breakdown", "--model", "rehearsal", "--out", str(tmp_path / "a.png")])
    assert isinstance(result.exception, InvalidRequest) and "is a file, not a folder" in str(result.exception)


@pytest.mark.slow
def test_at_sd21s_own_sizes_the_engine_makes_the_eager_sequences_latents():
    """Minutes and 8 GB on a CPU: 512², fp32, random weights."""
    found = breakdown(Settings("sd21", "cpu", prompts=1, pairs=4, keys=64, profiles=("turbo",)))
    ours, agreement = found["profiles"]["turbo"]["ours"], found["profiles"]["turbo"]["agreement"]["turbo"]
    assert found["pixels"] == 512 and ours["images"] == 1 and ours["seconds"]["p50"] > 0
    assert agreement["error"] < 1e-4
    assert agreement["error_other_prompt"] > 10 * agreement["error"]
    assert agreement["error_other_noise"] > 10 * agreement["error"]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_at_sd21s_own_sizes_the_papers_profile_has_every_bar():
    """Many minutes on a CPU; the teacher takes one step of its fifty."""
    settings = Settings(
        "sd21", "cpu", prompts=1, teacher_prompts=1, teacher_steps=1, pairs=4, keys=64, profiles=("paper",)
    )
    found = breakdown(settings)
    paper = found["profiles"]["paper"]
    assert set(paper) == set(LABELS) and all(row["images"] == 1 for row in paper.values())
    assert "116.7" in markdown(found)


def on_an_l40s(record, ours_ms, turbo_ms):
    found = copy.deepcopy(record)
    found["context"]["gpu"] = {"name": "NVIDIA L40S"}
    found |= {"model": "sd21 (random weights)", "pixels": 512}
    for kind, value in (("ours", ours_ms), ("turbo", turbo_ms)):
        found["profiles"]["paper"][kind]["seconds"]["mean"] = value / 1e3
    return found


def test_reproduced_is_said_on_an_l40s_within_five_percent_only(record):
    assert verdict(on_an_l40s(record, 116.7 * 1.04, 113.8 * 0.96)).startswith("Reproduced")
    assert verdict(on_an_l40s(record, 116.7 * 1.06, 113.8)).startswith("Not reproduced")
    assert "nothing here reproduces" in verdict(record)
    other = on_an_l40s(record, 116.7, 113.8)
    other["context"]["gpu"]["name"] = "NVIDIA H200"
    assert "nothing here reproduces" in verdict(other)


def test_the_table_and_the_bars_come_from_the_json_alone(record, tmp_path):
    text = markdown(record)
    assert text == markdown(json.loads(json.dumps(record)))
    assert (
        all(label in text for label in LABELS.values())
        and "Claims of the paper that its own figures contradict" in text
    )
    # Small images are not compared with the paper.
    assert "116.7 |" not in text
    first, second = bars(record, tmp_path / "a.png"), bars(record, tmp_path / "b.png")
    assert first.read_bytes() == second.read_bytes() and first.read_bytes().startswith(b"\x89PNG")
