"""Write DIR/report.json, DIR/report.md (tables in the paper's layout) and a plot of every metric with categories."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ragturbo.evaluate.images import write_file
from ragturbo.evaluate.suites import Suite
from ragturbo.evaluate.table import Estimate, Row, verdict
from ragturbo.machine import describe

# The paper's Tables 1 and 2, by suite and system.
PAPER: dict[str, dict[str, dict[str, float]]] = {
    "coco": {
        "sd15": {"fid": 24.38, "clip": 0.319},
        "sd21": {"fid": 25.33, "clip": 0.330},
        "lcm": {"fid": 36.52, "clip": 0.307},
        "student": {"fid": 26.04, "clip": 0.319},
        "adapter": {"fid": 25.59, "clip": 0.323},
    },
    "tifa": {
        "sd15": {"aesthetic": 5.79, "tifa": 0.768},
        "sd21": {"aesthetic": 6.04, "tifa": 0.811},
        "lcm": {"aesthetic": 5.80, "tifa": 0.764},
        "student": {"aesthetic": 5.85, "tifa": 0.779},
        "slerp": {"tifa": 0.781},
        "slerp-best": {"tifa": 0.816},
        "adapter": {"aesthetic": 5.88, "tifa": 0.801},
    },
}


def write_report(out: Path, suite: Suite, rows: Sequence[Row], about: dict[str, str], command: str) -> None:
    """Write all files.

    rows: one per system, the baseline first; about: library and weights by metric.
    """
    context = describe()
    machine = {
        "device": context["gpu"]["name"] if context["gpu"] else platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "diffusers": context["packages"]["diffusers"],
        "date": time.strftime("%Y-%m-%d"),
    }
    facts: dict[str, Any] = {"suite": suite.name, "prompts": len(suite.prompts), "of": suite.total}
    facts |= {"command": command, "machine": machine, "context": context}
    facts |= {"metrics": about, "rows": [asdict(row) for row in rows]}
    write_file(out / "report.json", json.dumps(facts, indent=2) + "\n")
    plots = [_plot_categories(out, metric, rows) for metric in about if any(row.categories.get(metric) for row in rows)]

    metrics = [name for name in about if name != "fid"]
    lines = [f"# {suite.title}", "", *_main_table(suite, rows, metrics)]
    lines += ["", "Means over prompts with their bootstrap 95 % intervals.", ""]
    for metric in metrics:
        lines += _details(metric, rows)
    lines += [f"![{plot.name}]({plot.name})" for plot in plots]
    lines += ["", "## How it was made", "", f"`{command}`", ""]
    lines += [f"* {name}: {text}" for name, text in {**about, **machine}.items()]
    write_file(out / "report.md", "\n".join(lines) + "\n")


def _main_table(suite: Suite, rows: Sequence[Row], metrics: Sequence[str]) -> list[str]:
    numbers = sorted({name for row in rows for name in row.numbers})
    paper = PAPER.get(suite.name, {})
    in_paper = sorted({name for figures in paper.values() for name in figures})
    header = ["system", "NFE", *[f"{n} ↓" for n in numbers], *[f"{m} ↑" for m in metrics]]
    header += [f"paper: {name}" for name in in_paper]
    lines = _header(header)
    for row in rows:
        figures = paper.get(row.system.split("@")[0].split(":")[0], {})
        cells = [row.title, str(row.steps), *[f"{row.numbers[n]:.2f}" if n in row.numbers else "" for n in numbers]]
        cells += [_interval(row.metrics.get(m)) for m in metrics]
        cells += [f"{figures[name]:g}" if name in figures else "" for name in in_paper]
        lines.append(_line(cells))
    return lines


def _details(metric: str, rows: Sequence[Row]) -> list[str]:
    lines: list[str] = []
    for kind, heading in (("groups", "by kind of prompt"), ("categories", "by category of question")):
        found = [getattr(row, kind).get(metric, {}) for row in rows]
        names = sorted({name for estimates in found for name in estimates})
        if names:
            lines += [f"## {metric} {heading}", "", *_header(["system", *names])]
            for row, estimates in zip(rows, found, strict=True):
                lines.append(_line([row.title, *[_interval(estimates.get(name)) for name in names]]))
            lines.append("")
    compared = [(row.title, row.differences[metric]) for row in rows if metric in row.differences]
    if compared:
        lines += [f"## {metric} against {rows[0].title}, paired by prompt", ""]
        lines += [f"* {title}: {d.mean:+.3f} [{d.low:+.3f}, {d.high:+.3f}], {verdict(d)}" for title, d in compared]
        lines.append("")
    return lines


def _interval(found: Estimate | None) -> str:
    return f"{found.mean:.3f} [{found.low:.3f}, {found.high:.3f}]" if found is not None and found.count else ""


def _header(cells: Sequence[str]) -> list[str]:
    return [_line(cells), _line(["---"] * len(cells))]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _plot_categories(out: Path, metric: str, rows: Sequence[Row]) -> Path:
    """The paper's Figs. 3 and 5: a group of bars per category, a bar per system."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    names = sorted({name for row in rows for name in row.categories.get(metric, {})})
    figure, axes = plt.subplots(figsize=(max(6.0, 1.3 * len(names)), 3.6), layout="constrained")
    width = 0.8 / max(1, len(rows))
    for i, row in enumerate(rows):
        found = row.categories.get(metric, {})
        positions = [j - 0.4 + width * (i + 0.5) for j, name in enumerate(names) if name in found]
        bars = [found[name] for name in names if name in found]
        errors = [[e.mean - e.low for e in bars], [e.high - e.mean for e in bars]]
        axes.bar(positions, [e.mean for e in bars], width, yerr=errors, label=row.title, error_kw={"lw": 0.8})
    axes.set_xticks(range(len(names)), names, rotation=20, ha="right")
    axes.set_ylim(0, 1)
    axes.set_ylabel(metric)
    axes.legend(fontsize=7, ncols=2, loc="lower right")
    path = out / f"{metric}-by-category.png"
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
