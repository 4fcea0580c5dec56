"""The page's plots: latency by stage, throughput by batch, share of the roofline by op, one image by commit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ragturbo.bench.chart import bars, digest
from ragturbo.bench.history import by_mode
from ragturbo.bench.results import Machine, Run


def suite_name(machine: Machine, plot: str) -> str:
    return f"{machine.name}-{plot}.png"


def bars_name(machine: Machine, run: Run) -> str:
    return f"{machine.name}-{run.path.stem}.png"


def wanted(machines: list[Machine]) -> list[str]:
    """The names of all plots these results give."""
    return [name for name, _, _ in _jobs(machines)]


def stale(machines: list[Machine], folder: Path) -> list[str]:
    """The names of plots that are missing or were drawn of other data."""
    return [name for name, data, _ in _jobs(machines) if _drawn_of(folder / name) != digest(data)]


def draw(machines: list[Machine], folder: Path) -> None:
    jobs = _jobs(machines)
    if jobs:
        folder.mkdir(parents=True, exist_ok=True)
    for name, data, job in jobs:
        job(data, folder / name)


def _drawn_of(path: Path) -> str | None:
    from PIL import Image

    if not path.is_file():
        return None
    with Image.open(path) as image:
        return image.info.get("Data")


def _jobs(machines: list[Machine]) -> list[tuple[str, dict[str, Any], Callable[[dict[str, Any], Path], Any]]]:
    out: list[tuple[str, dict[str, Any], Callable[[dict[str, Any], Path], Any]]] = []
    for machine in machines:
        for run in (r for r in machine.runs if r.kind == "breakdown"):
            out.append((bars_name(machine, run), run.data, bars))
        for plot, data in _series(machine).items():
            if data["places"]:
                out.append((suite_name(machine, plot), data, _draw))
    return out


def _series(machine: Machine) -> dict[str, dict[str, Any]]:
    stages = _of_one_file(machine, lambda i: _op(i).startswith("stage") and i["sizes"].get("batch") == 1)
    throughput = _of_one_file(machine, lambda i: _op(i) == "generate")
    roofline = _of_one_file(machine, lambda i: "fraction_of_roofline" in i)
    past = [(f"{row['mode']}, {commit}", row["seconds"]["p50"] * 1e3) for commit, _, row in by_mode(machine)]
    commits = {commit for commit, _, _ in by_mode(machine)}
    return {
        "stages": {
            "title": "latency by stage, batch 1", "unit": "ms (p50)",
            "labels": [f"{b['name']}\n{b['extra_info']['sizes']['model']}" for b in stages],
            "places": [b["extra_info"]["seconds"]["p50"] * 1e3 for b in stages],
        },
        "throughput": {
            "title": "throughput by batch", "unit": "images/s (p50)",
            "labels": [f"{b['extra_info']['mode']}, batch {b['extra_info']['sizes']['batch']}" for b in throughput],
            "places": [b["extra_info"]["images_a_call"] / b["extra_info"]["seconds"]["p50"] for b in throughput],
        },
        "roofline": {
            "title": "share of the measured roofline", "unit": "%",
            "labels": [b["name"] for b in roofline],
            "places": [b["extra_info"]["fraction_of_roofline"] * 100 for b in roofline],
        },
        "history": {
            "title": "one image by commit", "unit": "ms (p50)",
            "labels": [label for label, _ in past],
            "places": [value for _, value in past] if len(commits) > 1 else [],
        },
    }  # fmt: skip


def _of_one_file(machine: Machine, belongs: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """As in the tables: the file that has most of them."""
    files = machine.table(lambda info: "seconds" in info and belongs(info))
    return files[0][1] if files else []


def _op(info: dict[str, Any]) -> str:
    return str(info.get("op", ""))


def _draw(data: dict[str, Any], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count = len(data["places"])
    plot = Figure(figsize=(9, min(60.0, 0.26 * count + 1.2)), layout="constrained")
    FigureCanvasAgg(plot)
    axes = plot.add_subplot()
    axes.barh(range(count), data["places"], color="#4477aa")
    axes.set_yticks(range(count), data["labels"], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel(data["unit"])
    axes.set_title(data["title"], fontsize=10)
    plot.savefig(path, dpi=100, metadata={"Software": None, "Data": digest(data)})
