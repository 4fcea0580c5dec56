"""DIR/report.md and report.json: tables in the paper's layout, the paper's figures beside ours, and category plots."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ragturbo.evaluate.run import write_text
from ragturbo.evaluate.suites import Suite
from ragturbo.evaluate.table import Estimate, Row, verdict
from ragturbo.machine import describe

# Tables 1 and 2 of the paper, by the system that stands for each row.
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


def write_report(
    out: Path, suite: Suite, rows: Sequence[Row], about: dict[str, str], command: str, machine: dict[str, Any]
) -> None:
    facts = {
        "suite": suite.name,
        "prompts": len(suite.prompts),
        "of": suite.total,
        "command": command,
        "machine": machine,
        "context": describe(),
        "metrics": about,
        "rows": [row.to_dict() for row in rows],
    }
    write_text(out / "report.json", json.dumps(facts, indent=2) + "\n")
    plots = [plot_categories(out, metric, rows) for metric in about if any(row.categories.get(metric) for row in rows)]
    write_text(out / "report.md", markdown(suite, rows, about, command, machine, [p.name for p in plots]))


def markdown(
    suite: Suite,
    rows: Sequence[Row],
    about: dict[str, str],
    command: str,
    machine: dict[str, Any],
    plots: Sequence[str],
) -> str:
    metrics = [name for name in about if name != "fid"]
    numbers = sorted({name for row in rows for name in row.numbers})
    paper = PAPER.get(suite.name, {})
    lines = [f"# {suite.title}", ""]
    header = ["system", "NFE", *[f"{n} ↓" for n in numbers], *[f"{m} ↑" for m in metrics]]
    header += [f"paper: {name}" for name in _paper_columns(paper)]
    lines += [_line(header), _line(["---"] * len(header))]
    for row in rows:
        figures = paper.get(row.system.split("@")[0].split(":")[0], {})
        cells = [row.title, str(row.steps), *[f"{row.numbers[n]:.2f}" if n in row.numbers else "" for n in numbers]]
        cells += [_value(row.metrics.get(m)) for m in metrics]
        cells += [f"{figures[name]:g}" if name in figures else "" for name in _paper_columns(paper)]
        lines.append(_line(cells))
    lines += ["", "Means over prompts with their bootstrap 95 % intervals.", ""]
    for metric in metrics:
        lines += _details(metric, rows)
    lines += [f"![{name}]({name})" for name in plots]
    lines += ["", "## How it was made", "", f"`{command}`", ""]
    lines += [f"* {name}: {text}" for name, text in {**about, **{k: str(v) for k, v in machine.items()}}.items()]
    return "\n".join(lines) + "\n"


def _details(metric: str, rows: Sequence[Row]) -> list[str]:
    lines: list[str] = []
    for kind, heading in (("groups", "by kind of prompt"), ("categories", "by category of question")):
        names = sorted({name for row in rows for name in getattr(row, kind).get(metric, {})})
        if names:
            lines += [f"## {metric} {heading}", "", _line(["system", *names]), _line(["---"] * (len(names) + 1))]
            for row in rows:
                found = getattr(row, kind).get(metric, {})
                lines.append(_line([row.title, *[_value(found.get(name)) for name in names]]))
            lines.append("")
    compared = [row for row in rows if metric in row.differences]
    if compared:
        lines += [f"## {metric} against {rows[0].title}, paired by prompt", ""]
        for row in compared:
            d = row.differences[metric]
            lines.append(f"* {row.title}: {d.mean:+.3f} [{d.low:+.3f}, {d.high:+.3f}], {verdict(d)}")
        lines.append("")
    return lines


def _paper_columns(paper: dict[str, dict[str, float]]) -> list[str]:
    return sorted({name for figures in paper.values() for name in figures})


def _value(found: Estimate | None) -> str:
    if found is None or not found.count:
        return ""
    return f"{found.mean:.3f} [{found.low:.3f}, {found.high:.3f}]"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def plot_categories(out: Path, metric: str, rows: Sequence[Row]) -> Path:
    """The paper's Figs. 3 and 5: a group of bars a category, a bar a system, with intervals."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    names = sorted({name for row in rows for name in row.categories.get(metric, {})})
    figure, axes = plt.subplots(figsize=(max(6.0, 1.3 * len(names)), 3.6), layout="constrained")
    width = 0.8 / max(1, len(rows))
    for i, row in enumerate(rows):
        found = row.categories.get(metric, {})
        places = [j - 0.4 + width * (i + 0.5) for j, name in enumerate(names) if name in found]
        held = [found[name] for name in names if name in found]
        errors = [[e.mean - e.low for e in held], [e.high - e.mean for e in held]]
        axes.bar(places, [e.mean for e in held], width, yerr=errors, label=row.title, error_kw={"lw": 0.8})
    axes.set_xticks(range(len(names)), names, rotation=20, ha="right")
    axes.set_ylim(0, 1)
    axes.set_ylabel(metric)
    axes.legend(fontsize=7, ncols=2, loc="lower right")
    path = out / f"{metric}-by-category.png"
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
