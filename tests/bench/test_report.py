"""docs/performance.md is generated from the raw data: equal data give equal text, and an outdated page is found."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks import history, plots
from ragturbo.bench import budgets
from ragturbo.bench.budgets import Figure
from ragturbo.bench.performance_page import SECTIONS, update
from ragturbo.bench.results import read
from ragturbo.cli import app
from ragturbo.errors import InvalidRequest

ROOT = Path(__file__).resolve().parents[2]


def with_an_image(data, commit="a", when="2001-01-01", p50=0.011, others=2):
    """A suite's record, as if a row with a floor were the time of one image."""
    data = copy.deepcopy(data)
    data["datetime"], data["machine_info"]["ragturbo"]["commit"] = when, commit * 40
    data["machine_info"]["ragturbo"] |= {"dirty": False, "machine": "cpu-test"}
    image = next(b for b in data["benchmarks"] if "floor_s" in b["extra_info"])
    image["name"] = image["fullname"] = "test_generate[none]"
    image["extra_info"] |= {"op": "generate", "mode": "none", "images_a_call": 1, "sizes": {"batch": 1, "model": "m"}}
    image["extra_info"]["seconds"]["p50"] = p50
    data["benchmarks"] = [image, *[b for b in data["benchmarks"] if b is not image][:others]]
    return data


@pytest.fixture
def place(tmp_path, record, suite):
    """A results folder of one machine, and a page with every section."""
    machine = tmp_path / "results" / "cpu-test"
    machine.mkdir(parents=True)
    (machine / "breakdown.json").write_text(json.dumps(record))
    (machine / "suite.json").write_text(json.dumps(with_an_image(json.loads(suite.read_text()))))
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
    assert "| test_generate[none] | m |" in text and "cpu-test: rehearsal (random weights)" in text


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
    row = next(b for b in data["benchmarks"] if b["extra_info"]["op"] == "generate")
    data["benchmarks"] += [{**copy.deepcopy(row), "fullname": f"{row['fullname']}[{i}]"} for i in range(2)]
    path.write_text(json.dumps(data))
    again = copy.deepcopy(data)
    again["datetime"] = "2999-01-01T00:00:00+00:00"
    kept = again["benchmarks"] = [b for b in again["benchmarks"] if b["extra_info"]["op"] == "generate"][:1]
    kept[0]["extra_info"]["seconds"]["p50"] = 42.0
    more = copy.deepcopy(kept[0])
    more["fullname"] += "[more]"
    more["extra_info"]["seconds"]["p50"] = 43.0
    again["benchmarks"].append(more)
    (path.parent / "quick.json").write_text(json.dumps(again))
    belongs = lambda info: info["op"] == "generate"  # noqa: E731
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


def not_measured(lines):
    """Place -> keys of the budgets listed as not measured there."""
    start = "Not measured on "
    listed = [line.removeprefix(start).rstrip(".").split(": ") for line in lines if line.startswith(start)]
    return {place: keys.split(", ") for place, keys in listed}


def test_a_budget_nobody_measured_says_so_and_a_measured_one_is_judged():
    on_gpu = Figure(3e-3, "x/y.json", "abc", gpu="NVIDIA H200", rounds=1000, flags=("noise 3.0%",))
    lines = budgets.table({"unet_s": [on_gpu], "rows_of_memcpy": [Figure(0.5, "x/z.json", "abc", cores=2)]})
    (h200,) = rows_of(lines, "UNet alone, batch 1")
    assert "| NVIDIA H200 | ≤ 4 ms, aim 2.5 ms | 3.00 ms | met | x/y.json, abc, 1,000 rounds | noise 3.0% |" in h200
    assert "unet_s" in not_measured(lines)["H100"] and "unet_s" not in not_measured(lines)["H200"]
    (never,) = [line for line in lines if line.startswith("Not measured: ")]
    assert "cold start to the first image, warm disk cache (≤ 10 s, aim 3 s)" in never and "UNet alone" not in never
    assert "50 % | not met" in rows_of(lines, "feature rows, page cache, 64 a request")[0]
    assert sum(map(len, not_measured(lines).values())) == sum(len(b.places) for b in budgets.BUDGETS) - 2


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
    lines = budgets.table({"unet_s": [newer]})
    (shown,) = rows_of(lines, "UNet alone")
    assert f"| {other} |  | 1.00 ms | not judged |" in shown
    assert all("unet_s" in not_measured(lines)[card] for card in ("H200", "H100"))
    h200, _ = rows_of(
        budgets.table({"unet_s": [Figure(3e-3, "x/y.json", "abc", when="2000", gpu="NVIDIA H200"), newer]}), "UNet"
    )
    assert "3.00 ms | met | x/y.json" in h200
    # A machine without a GPU measured something else.
    cpu = Figure(1e-3, "x/y.json", "abc", cores=2)
    assert rows_of(budgets.table({"unet_s": [cpu]}), "UNet alone") == []


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


@pytest.mark.parametrize("count, shown", [(19, [True, False, False]), (20, [True, True, False]), (100, [True] * 3)])
def test_percentiles_of_a_handful_are_not_shown(place, count, shown):
    results, page = place
    path = results / "cpu-test" / "suite.json"
    data = json.loads(path.read_text())
    for b in data["benchmarks"]:
        b["extra_info"]["rounds"] = count
    path.write_text(json.dumps(data))
    update(results, page, write=True)
    row = next(line for line in page.read_text().splitlines() if line.startswith("| test_generate[none] |")).split("|")
    p50, p95, p99, rounds = (cell.strip() for cell in row[-6:-2])
    assert [p50 != "", p95 != "", p99 != ""] == shown and rounds == str(count)


def test_a_row_faster_than_its_floor_is_flagged_with_what_it_beat(place):
    results, page = place
    path = results / "cpu-test" / "suite.json"
    data = json.loads(path.read_text())
    row = next(b for b in data["benchmarks"] if "floor_s" in b["extra_info"])
    info, rate = row["extra_info"], data["ceilings"]["cpu"]["bytes_per_s"]
    info |= {"fraction_of_roofline": 1.06, "floor_s": info["bytes"] / rate, "flags": ["noise 3.0%"]}
    path.write_text(json.dumps(data))
    update(results, page, write=True)
    assert "| noise 3.0%; over the copy rate |" in page.read_text()
    info |= {"floor_s": 2 * info["bytes"] / rate}
    path.write_text(json.dumps(data))
    update(results, page, write=True)
    assert "| noise 3.0%; over the matrix or link rate |" in page.read_text()


def test_the_command_stands_beside_the_file(place):
    results, page = place
    update(results, page, write=True)
    made = json.loads((results / "cpu-test" / "suite.json").read_text())["machine_info"]["ragturbo"]
    assert made["command"].startswith("python -m pytest -p no:cacheprovider -q benchmarks/test_bench_stages.py")
    assert str(ROOT) not in made["command"] and "--benchmark-json=suite.json" in made["command"]
    assert f"`OMP_NUM_THREADS=1 {made['command']}`" in page.read_text()


def test_what_an_image_took_stays_when_the_suites_file_is_overwritten(place, tmp_path, suite, capsys):
    results, page = place
    data, path = json.loads(suite.read_text()), results / "cpu-test" / "suite.json"
    history.main(["--results", str(results)])
    path.write_text(json.dumps(with_an_image(data, "b", "2002-01-01", 0.012)))
    # An older file from git; of two runs of one commit the one with more benchmarks is kept.
    older = tmp_path / "older.json"
    for others, p50 in ((1, 0.009), (0, 0.001)):
        older.write_text(json.dumps(with_an_image(data, "c", "2000-01-01", p50, others)))
        history.main([str(older), "--results", str(results)])
    printed = capsys.readouterr().out
    assert printed.index("ccccccccc | m | 9.00") < printed.index("aaaaaaaaa | m | 11.00", printed.index("ccccccccc"))
    assert [c[:1] for c in history.commits(read(results)[0])] == ["c", "a", "b"]
    kept = json.loads((results / "cpu-test" / "history" / "ccccccccc.json").read_text())
    assert kept["rows"][0]["seconds"]["p50"] == 0.009 and kept["context"]["machine"] == "cpu-test"


def test_a_file_without_an_image_is_no_history(place, suite):
    with pytest.raises(InvalidRequest, match="no row of one image"):
        history.keep_file(suite, place[0])


def test_every_plot_is_drawn_from_the_results(place, tmp_path):
    assert plots.main(["--results", str(place[0]), "--out", str(tmp_path / "plots")]) == 0
    drawn = {path.name for path in (tmp_path / "plots").iterdir()}
    assert drawn >= {f"cpu-test-{name}.png" for name in ("throughput", "roofline", "history")}


def test_an_empty_folder_gives_a_page_without_numbers(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("".join(f"<!-- bench:{name} -->\n<!-- /bench -->\n" for name in SECTIONS))
    update(tmp_path / "nothing", page, write=True)
    text = page.read_text()
    assert "Not measured yet" in text
    assert sum(map(len, not_measured(text.splitlines()).values())) == sum(len(b.places) for b in budgets.BUDGETS)


def test_the_committed_page_agrees_with_the_committed_data():
    assert update(ROOT / "benchmarks" / "results", ROOT / "docs" / "performance.md", write=False) == []
