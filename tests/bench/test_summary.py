"""One screen says what a GPU run found: budgets by the run's own card, what is unverified, what did not finish."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.summary import MOST_LINES, summary


def leave(folder: Path, part: str, gpu: str, steps: dict[str, Any], **more: Any) -> None:
    context = {"gpu": {"name": gpu}, "cpu": "x", "cores": 16, "commit": "a" * 40, "packages": {"torch": "2.11.0"}}
    flags = [f"{name}: {flag}" for name, step in steps.items() for flag in step.get("flags", [])]
    record = {"kind": part, "context": context, "rehearsal": False, "measured": {}, "steps": steps, "flags": flags}
    (folder / f"{part}.json").write_text(json.dumps({**record, **more}))


def test_the_page_judges_by_the_card_of_the_run(tmp_path):
    steps = {"image": {"outcome": "done", "figures": ["image_p50_s"], "flags": ["noise 3.0% (ours)"]},
             "parts": {"outcome": "done", "figures": ["unet_s"], "flags": ["throttled: power cap"]}}  # fmt: skip
    for gpu, verdict in (("NVIDIA H100 80GB HBM3", "met"), ("NVIDIA H200", "not met")):
        leave(tmp_path, "engine", gpu, steps, measured={"image_p50_s": 14.5e-3, "unet_s": 2e-3})
        text = summary(tmp_path)
        row = next(line for line in text.splitlines() if "text → uint8" in line)
        assert gpu in text.splitlines()[0] and f"14.50 ms | {verdict} | noise 3.0% (ours) |" in row
        assert "aim met | throttled: power cap |" in text and text.count("not measured") > 5
    leave(tmp_path, "engine", "NVIDIA GH200 480GB", steps, measured={"image_p50_s": 1e-3})
    assert "1.00 ms | not judged: NVIDIA GH200 480GB |" in summary(tmp_path)


def test_two_cards_in_one_folder_are_not_mixed(tmp_path):
    leave(tmp_path, "engine", "NVIDIA H100 80GB HBM3", {}, measured={"unet_s": 4.2e-3})
    leave(tmp_path, "kernels", "NVIDIA H200", {}, measured={"adapter_s": 0.125e-3})
    tables = summary(tmp_path).split("| NVIDIA ")[1:]
    assert "4.20 ms | met" in tables[0] and "0.125 ms" not in tables[0]
    assert "4.20 ms" not in tables[1] and "0.125 ms | not met" in tables[1]


def test_what_is_unverified_or_did_not_finish_has_a_line_of_its_own(tmp_path):
    because = {"image_p50_s": "none: latents 2.1e-03 from the reference's"}
    steps = {
        "image": {"outcome": "done", "unverified": {"image_p50_s": 9e-3}, "unverified_because": because,
                  "errors": {"trace": "RuntimeError: no profiler"}},
        "tail": {"outcome": "done", "withheld": "4 batches ran in plain torch"},
        "cold": {"outcome": "out of time"},
        "build": {"outcome": "failed with 1", "tail": "x" * 3000},
    }  # fmt: skip
    leave(tmp_path, "engine", "NVIDIA H200", steps)
    text = summary(tmp_path)
    judged, rest = text.split("Unverified, not judged:")
    assert "9.00 ms" not in judged and "met |" not in judged
    assert "9.00 ms (none: latents 2.1e-03 from the reference's)" in rest
    for line in ("engine: image: trace: RuntimeError: no profiler", "engine: tail: done, no figures: 4 batches ran",
                 "engine: cold: out of time", "engine: build: failed with 1"):  # fmt: skip
        assert line in rest


def test_the_page_fits_a_screen_whatever_went_wrong(tmp_path):
    steps = {f"step {i}": {"outcome": "failed with 1", "errors": {"a": "b" * 999}, "flags": ["c" * 999] * 9,
                           "unverified": {"unet_s": 1.0}} for i in range(40)}  # fmt: skip
    leave(tmp_path, "engine", "NVIDIA H200", steps)
    lines = summary(tmp_path).splitlines()
    assert len(lines) <= MOST_LINES and all(len(line) < 250 for line in lines)
    assert any("and 66 more" in line for line in lines)


def test_a_rehearsal_and_an_empty_folder_judge_nothing(tmp_path):
    assert summary(tmp_path) == "There are no records.\n"
    leave(tmp_path, "engine", "NVIDIA H200", {}, measured={"unet_s": 1e-3}, rehearsal=True)
    assert "A rehearsal" in summary(tmp_path) and "met |" not in summary(tmp_path)
