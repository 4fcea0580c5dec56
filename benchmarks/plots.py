"""Plots of the results: latency by stage, throughput by batch, share of the roofline by op, one image by commit.

`python -m benchmarks.plots --out FOLDER` draws `<machine>-<plot>.png` for every machine in benchmarks/results.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.history import by_mode
from ragturbo.bench.results import Machine, read
from ragturbo.machine import ROOT

# Title, unit, and (label, value) of each bar.
Plot = tuple[str, str, list[tuple[str, float]]]


def plots(machine: Machine) -> dict[str, Plot]:
    """Return the plots that the results of a machine give, by name."""

    def rows(belongs: Callable[[dict[str, Any]], bool]) -> list[tuple[str, dict[str, Any]]]:
        files = machine.table(lambda info: "seconds" in info and belongs(info))
        # Bars of two runs cannot be compared: only the file with the most rows.
        return [(b["name"], b["extra_info"]) for b in files[0][1]] if files else []

    stages = rows(lambda i: str(i.get("op", "")).startswith("stage") and i["sizes"].get("batch") == 1)
    generate = rows(lambda i: i.get("op") == "generate")
    ops = rows(lambda i: "fraction_of_roofline" in i)
    past = by_mode(machine)
    found: dict[str, Plot] = {
        "stages": ("latency by stage, batch 1", "ms (p50)",
                   [(f"{name}\n{i['sizes']['model']}", i["seconds"]["p50"] * 1e3) for name, i in stages]),
        "throughput": ("throughput by batch", "images/s (p50)",
                       [(f"{i['mode']}, batch {i['sizes']['batch']}", i["images_a_call"] / i["seconds"]["p50"])
                        for _, i in generate]),
        "roofline": ("share of the measured roofline", "%",
                     [(name, i["fraction_of_roofline"] * 100) for name, i in ops]),
        "history": ("one image by commit", "ms (p50)",
                    [(f"{row['mode']}, {commit}", row["seconds"]["p50"] * 1e3) for commit, _, row in past]),
    }  # fmt: skip
    return {name: plot for name, plot in found.items() if plot[2]}


def draw(plot: Plot, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    title, unit, bars = plot
    figure = Figure(figsize=(9, min(60.0, 0.26 * len(bars) + 1.2)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.barh(range(len(bars)), [value for _, value in bars], color="#4477aa")
    axes.set_yticks(range(len(bars)), [label for label, _ in bars], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    axes.set_title(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plots", description=__doc__)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(argv)
    for machine in read(options.results):
        for name, plot in plots(machine).items():
            draw(plot, options.out / f"{machine.name}-{name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
