"""docs/performance.md is made from the raw data: the same twice, and never behind it unnoticed."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ragturbo.bench import budgets
from ragturbo.bench.report import SECTIONS, update
from ragturbo.bench.results import read
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
    assert "scaled_residual" in text and "cpu-test/" not in text.split("## Budgets")[0]
    assert sorted(p.name for p in (page.parent / "plots").iterdir()) == [
        "cpu-test-breakdown.png", "cpu-test-roofline.png", "cpu-test-stages.png",
    ]  # fmt: skip


def test_a_number_typed_by_hand_is_found(place):
    results, page = place
    update(results, page, write=True)
    page.write_text(page.read_text().replace(" µs |", " ns |", 1))
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


def test_a_plot_behind_its_data_is_found_when_the_page_is_not(place):
    results, page = place
    update(results, page, write=True)
    plot = page.parent / "plots" / "cpu-test-roofline.png"
    old = plot.read_bytes()
    path = results / "cpu-test" / "suite.json"
    data = json.loads(path.read_text())
    for b in data["benchmarks"]:
        if "fraction_of_roofline" in b["extra_info"]:
            b["extra_info"]["fraction_of_roofline"] /= 3
    path.write_text(json.dumps(data))
    update(results, page, write=True)
    assert update(results, page, write=False) == []
    plot.write_bytes(old)
    assert update(results, page, write=False) == ["plots/cpu-test-roofline.png"]


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


def test_a_budget_nobody_measured_says_so_and_a_measured_one_is_judged():
    lines = budgets.table({"unet_s": (3e-3, "x/y.json"), "rows_of_memcpy": (0.5, "x/z.json")})
    told = {line.split("|")[1].strip(): line for line in lines}
    assert "3.00 ms | met | x/y.json" in told["UNet alone, batch 1"]
    assert "50 % | not met" in told["feature rows, page cache, 64 a request, share of memcpy"]
    assert sum("not measured" in line for line in lines) == len(budgets.BUDGETS) - 2


def test_an_empty_folder_gives_a_page_without_numbers(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("".join(f"<!-- bench:{name} -->\n<!-- /bench -->\n" for name in SECTIONS))
    update(tmp_path / "nothing", page, write=True)
    text = page.read_text()
    assert "Not measured yet" in text and text.count("| | not measured |") == len(budgets.BUDGETS)


def test_the_committed_page_agrees_with_the_committed_data():
    assert update(ROOT / "benchmarks" / "results", ROOT / "docs" / "performance.md", write=False) == []
