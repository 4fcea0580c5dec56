"""docs/performance.md is generated from the raw data: equal data give equal text, and an outdated page is found."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ragturbo.bench import budgets
from ragturbo.bench.budgets import Figure
from ragturbo.bench.performance_page import SECTIONS, update
from ragturbo.bench.results import read, rounds
from ragturbo.cli import app
from ragturbo.errors import InvalidRequest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def place(tmp_path, record, suite):
    """A results folder of one machine, and a page with every section."""
    machine = tmp_path / "results" / "cpu-test"
    machine.mkdir(parents=True)
    (machine / "breakdown.json").write_text(json.dumps(record))
    shutil.copy(suite, machine / "suite.json")
    page = tmp_path / "docs" / "performance.md"
    page.parent.mkdir()
    shutil.copy(ROOT / "docs" / "performance.md", page)
    return tmp_path / "results", page


def test_a_page_is_made_once_and_then_agrees(place):
    results, page = place
    assert update(results, page, write=False)
    update(results, page, write=True)
    text = page.read_text()
    assert update(results, page, write=False) == []
    update(results, page, write=True)
    assert page.read_text() == text
    assert "test_first_request_after_idling" in text and "rehearsal (random weights)" in text


def test_a_number_typed_by_hand_is_found(place):
    results, page = place
    update(results, page, write=True)
    page.write_text(page.read_text().replace(" ms |", " s |", 1))
    assert update(results, page, write=False)
    run = CliRunner().invoke(app, ["bench", "report", "--check", "--results", str(results), "--page", str(page)])
    assert run.exit_code == 3 and "disagrees" in run.output


def test_new_data_makes_the_page_stale(place):
    results, page = place
    update(results, page, write=True)
    path = results / "cpu-test" / "suite.json"
    data = json.loads(path.read_text())
    data["benchmarks"][0]["extra_info"]["seconds"]["p50"] *= 2
    path.write_text(json.dumps(data))
    assert update(results, page, write=False)


def test_a_table_is_of_one_run_and_what_another_adds_stands_apart_by_its_name(place):
    results, page = place
    path = results / "cpu-test" / "suite.json"
    data = json.loads(path.read_text())
    row = next(b for b in data["benchmarks"] if b["extra_info"]["op"] == "scaled_residual")
    data["benchmarks"] += [{**copy.deepcopy(row), "fullname": f"{row['fullname']}[{i}]"} for i in range(2)]
    path.write_text(json.dumps(data))
    again = copy.deepcopy(data)
    again["datetime"] = "2999-01-01T00:00:00+00:00"
    kept = again["benchmarks"] = [b for b in again["benchmarks"] if b["extra_info"]["op"] == "scaled_residual"][:1]
    kept[0]["extra_info"]["seconds"]["p50"] = 42.0
    more = copy.deepcopy(kept[0])
    more["fullname"] += "[more]"
    more["extra_info"]["seconds"]["p50"] = 43.0
    again["benchmarks"].append(more)
    (path.parent / "quick.json").write_text(json.dumps(again))
    belongs = lambda info: info["op"] == "scaled_residual"  # noqa: E731
    whole, part = read(results)[0].table(belongs)
    # A newer quick run does not put a row of its own among the suite's.
    assert whole[0].path.name == "suite.json" and all(b["extra_info"]["seconds"]["p50"] < 42 for b in whole[1])
    assert len(whole[1]) == sum(belongs(b["extra_info"]) for b in data["benchmarks"])
    assert part[0].path.name == "quick.json" and [b["fullname"] for b in part[1]] == [more["fullname"]]
    update(results, page, write=True)
    text = page.read_text()
    assert "42 s" not in text and "43 s" in text.split("rows that no file above has")[1]
    # Of equally full files, the newest.
    (path.parent / "suite-2.json").write_text(json.dumps({**data, "datetime": "3000-01-01T00:00:00+00:00"}))
    assert read(results)[0].table(belongs)[0][0].path.name == "suite-2.json"


def test_a_rehearsal_is_no_result(place):
    results, page = place
    path = results / "cpu-test" / "breakdown.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rehearsal": True}))
    with pytest.raises(InvalidRequest, match="rehearsal"):
        update(results, page, write=False)


def rows_of(lines, what):
    return [line for line in lines if line.startswith(f"| {what}")]


def test_a_budget_nobody_measured_says_so_and_a_measured_one_is_judged():
    on_gpu = Figure(3e-3, "x/y.json", "abc", gpu="NVIDIA H200", rounds=1000, flags=("noise 3.0%",))
    lines = budgets.table({"unet_s": [on_gpu], "rows_of_memcpy": [Figure(0.5, "x/z.json", "abc", cores=2)]})
    h200, h100 = rows_of(lines, "UNet alone, batch 1")
    assert "| NVIDIA H200 | ≤ 4 ms, aim 2.5 ms | 3.00 ms | met | x/y.json, abc, 1,000 rounds | noise 3.0% |" in h200
    assert "| H100 | ≤ 4.3 ms, aim 2.7 ms | | not measured |" in h100
    assert "50 % | not met" in rows_of(lines, "feature rows, page cache, 64 a request")[0]
    assert sum("not measured" in line for line in lines) == sum(len(b.places) for b in budgets.BUDGETS) - 2


def test_two_cards_are_judged_each_by_its_own_figures_and_limits():
    figures = [
        Figure(4.2e-3, "a/h100.json", "abc", gpu="NVIDIA H100 80GB HBM3", rounds=10),
        Figure(4.2e-3, "b/h200.json", "abc", gpu="NVIDIA H200", rounds=1000),
    ]
    for order in (figures, figures[::-1]):
        h200, h100 = rows_of(budgets.table({"unet_s": order}), "UNet alone")
        assert "| NVIDIA H200 |" in h200 and "| not met | b/h200.json" in h200
        assert "| NVIDIA H100 80GB HBM3 |" in h100 and "| met | a/h100.json" in h100
    limits = {b.key: (b.bounds("H200"), b.bounds("H100")) for b in budgets.BUDGETS if b.where == "gpu"}
    assert limits["image_p50_s"] == ((14e-3, 9e-3), (15e-3, 9.7e-3))
    assert limits["adapter_s"] == ((0.12e-3, 0.06e-3), (0.13e-3, 0.065e-3))
    assert limits["retrieval_added_s"] == ((0.15e-3, 0.1e-3), (0.18e-3, 0.12e-3))
    assert limits["p99_over_p50"][0] == limits["p99_over_p50"][1]


@pytest.mark.parametrize(
    "other", ["NVIDIA L40S", "NVIDIA GH200 480GB", "NVIDIA H200 MIG 1g.18gb", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"]
)
def test_another_card_or_a_slice_is_shown_and_not_judged(other):
    newer = Figure(1e-3, "z/newer.json", "def", when="2999", gpu=other)
    h200, h100, shown = rows_of(budgets.table({"unet_s": [newer]}), "UNet alone")
    assert "not measured" in h200 and "not measured" in h100 and f"| {other} |  | 1.00 ms | not judged |" in shown
    h200, *_ = rows_of(
        budgets.table({"unet_s": [Figure(3e-3, "x/y.json", "abc", when="2000", gpu="NVIDIA H200"), newer]}), "UNet"
    )
    assert "3.00 ms | met | x/y.json" in h200
    # A machine without a GPU measured something else.
    cpu = Figure(1e-3, "x/y.json", "abc", cores=2)
    assert all("not measured" in row for row in rows_of(budgets.table({"unet_s": [cpu]}), "UNet alone"))


def test_an_unverified_figure_stands_apart_with_its_reason(tmp_path):
    place = tmp_path / "results" / "gpu"
    place.mkdir(parents=True)
    here = {"gpu": {"name": "NVIDIA H200"}, "cores": 16, "cpu": "x", "commit": "a" * 40, "packages": {}}
    step = {"outcome": "done", "unverified": {"unet_s": 3e-3}, "unverified_because": {"unet_s": "error 2.1e-03"}}
    record = {"kind": "engine", "context": here, "measured": {}, "steps": {"parts": step}}
    (place / "engine.json").write_text(json.dumps(record))
    text = SECTIONS["budgets"](read(tmp_path / "results"))
    judged, apart = text.split("| unverified, not judged |")
    assert "3.00 ms" not in judged and "NVIDIA H200 | 3.00 ms | gpu/engine.json, aaaaaaaaa | error 2.1e-03 |" in apart


def test_of_two_figures_the_one_of_more_rounds_stands_and_of_equals_the_newer():
    old, new = (Figure(share, f"x/{when}.json", "abc", when=when, cores=2, rounds=200) for share, when in
                ((0.02, "2001"), (0.05, "2002")))  # fmt: skip
    few = Figure(0.07, "x/few.json", "abc", when="2003", cores=2, rounds=10)
    assert budgets.best([old, few, new]) == new and budgets.best([old, few]) == old


def test_percentiles_of_a_handful_are_not_shown(place):
    results, page = place
    update(results, page, write=True)
    path = results / "cpu-test" / "suite.json"
    data = json.loads(path.read_text())
    seen = []
    for b in data["benchmarks"]:
        cells = next(line for line in page.read_text().splitlines() if line.startswith(f"| {b['name']} |")).split("|")
        seen.append((rounds(b), cells[5].strip() != ""))
        assert cells[6].strip() == f"{rounds(b):,}"
    assert all(shown == (count >= 20) for count, shown in seen)
    for b in data["benchmarks"]:
        b["extra_info"]["rounds"] = 19
    path.write_text(json.dumps(data))
    update(results, page, write=True)
    row = next(line for line in page.read_text().splitlines() if line.startswith("| test_tokenize |")).split("|")
    assert row[4].strip() and not row[5].strip()


def test_a_row_faster_than_its_floor_is_flagged_with_what_it_beat(place):
    results, page = place
    path = results / "cpu-test" / "suite.json"
    data = json.loads(path.read_text())
    row = next(b for b in data["benchmarks"] if "floor_s" in b["extra_info"])
    info, rate = row["extra_info"], data["ceilings"]["cpu"]["bytes_per_s"]
    info |= {"fraction_of_roofline": 1.06, "floor_s": info["bytes"] / rate, "flags": ["noise 3.0%"]}
    path.write_text(json.dumps(data))
    update(results, page, write=True)
    assert "106% | noise 3.0%; over the copy rate |" in page.read_text()
    info |= {"floor_s": 2 * info["bytes"] / rate}
    path.write_text(json.dumps(data))
    update(results, page, write=True)
    assert "106% | noise 3.0%; over the matrix or link rate |" in page.read_text()


def test_the_command_stands_beside_the_file(place):
    results, page = place
    update(results, page, write=True)
    made = json.loads((results / "cpu-test" / "suite.json").read_text())["machine_info"]["ragturbo"]
    assert made["command"].startswith("python -m pytest -p no:cacheprovider -q benchmarks/test_bench_stages.py")
    assert str(ROOT) not in made["command"] and "--benchmark-json=suite.json" in made["command"]
    assert f"`OMP_NUM_THREADS=1 {made['command']}`" in page.read_text()


def test_an_empty_folder_gives_a_page_without_numbers(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("".join(f"<!-- bench:{name} -->\n<!-- /bench -->\n" for name in SECTIONS))
    update(tmp_path / "nothing", page, write=True)
    text = page.read_text()
    assert "Not measured yet" in text and text.count("| | not measured |") == sum(
        len(b.places) for b in budgets.BUDGETS
    )


def test_the_committed_page_agrees_with_the_committed_data():
    assert update(ROOT / "benchmarks" / "results", ROOT / "docs" / "performance.md", write=False) == []
