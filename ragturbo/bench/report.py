"""docs/performance.md's marked sections, made from the raw JSON alone: equal data give equal text."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ragturbo.bench import budgets, chart, history, plots, tables
from ragturbo.bench.results import Machine, Run, read
from ragturbo.errors import InvalidRequest

# <!-- bench:NAME --> … <!-- /bench -->
_SECTION = re.compile(r"(<!-- bench:([a-z]+) -->\n).*?(<!-- /bench -->)", re.DOTALL)


def update(results: Path, page: Path, *, write: bool) -> list[str]:
    """Renders every section of `page`; gives the names of those that differed. Plots are drawn beside the page, and the
    history's files are kept beside the runs they are of."""
    machines = read(results)
    if not page.is_file():
        raise InvalidRequest(f"there is no {page}; give --page")
    text = page.read_text("utf-8")
    changed: list[str] = []

    def render(match: re.Match[str]) -> str:
        name = match[2]
        if name not in SECTIONS:
            raise InvalidRequest(f"{page} has a section {name!r}; known: {', '.join(SECTIONS)}")
        new = f"{match[1]}{SECTIONS[name](machines)}{match[3]}"
        if new != match[0]:
            changed.append(name)
        return new

    new = _SECTION.sub(render, text)
    changed += [f"plots/{name}" for name in plots.stale(machines, page.parent / "plots")]
    changed += [f"{path.parent.parent.name}/history/{path.name}" for m in machines for path in history.unkept(m)]
    if write:
        page.write_text(new, "utf-8")
        for machine in machines:
            history.keep(machine)
        plots.draw(machines, page.parent / "plots")
    return changed


def machines_section(machines: list[Machine]) -> str:
    lines = [
        "| folder | machine | torch | triton | commit | file | made by | took, s |",
        "|---|---|---|---|---|---|---|--:|",
    ]
    for machine in machines:
        for run in machine.runs:
            c = run.context
            gpu = c.get("gpu")
            what = f"{c['cpu']}, {c['cores']} cores"
            if gpu:
                limit = f", {gpu['power_limit_w']:.0f} W" if gpu.get("power_limit_w") else ""
                what = f"{gpu['name']}, driver {gpu.get('driver', 'unknown')}{limit}; {what}"
            packages = c["packages"]
            lines.append(
                f"| {machine.name} | {what} | {packages.get('torch', '')} | {packages.get('triton', '')} "
                f"| {run.commit} | {run.path.name} | {_command(c)} | {_whole(run.data.get('wall_s'))} |"
            )
    return _block(lines)


def _whole(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.0f}"


def _command(context: dict[str, Any]) -> str:
    """Records from before they held their command have none."""
    words = [f"{name}={value}" for name, value in context.get("environment", {}).items()]
    return f"`{' '.join([*words, context['command']])}`" if "command" in context else ""


def budgets_section(machines: list[Machine]) -> str:
    found: dict[str, list[budgets.Figure]] = {}
    doubtful: dict[str, list[budgets.Figure]] = {}
    for machine in machines:
        for key, figures in machine.figures().items():
            found.setdefault(key, []).extend(figures)
        for key, figures in machine.unverified().items():
            doubtful.setdefault(key, []).extend(figures)
    apart = budgets.unverified(doubtful)
    return _block(budgets.table(found)) + (f"\n{_block(apart)}" if apart else "")


def ops_section(machines: list[Machine]) -> str:
    """Each op and implementation, with its share of the roofline."""
    other = ("stage", "generate", "peer", "serve", "import", "first_image", "modules_by_hand", "retrieval", "features")
    return _suites(machines, lambda info: not str(info.get("op", "")).startswith(other), tables.ops, plot="roofline")


def retrieval_section(machines: list[Machine]) -> str:
    """One query by each retriever, with its recall; opening; what was made once."""
    return _suites(machines, lambda info: info.get("op") == "retrieval" and "seconds" in info, tables.retrieval)


def features_section(machines: list[Machine]) -> str:
    return _suites(machines, lambda info: "reader" in info.get("sizes", {}), tables.features)


def stages_section(machines: list[Machine]) -> str:
    return _suites(machines, lambda info: str(info.get("op", "")).startswith("stage"), tables.ops, plot="stages")


def generate_section(machines: list[Machine]) -> str:
    return _suites(
        machines,
        lambda info: str(info.get("op", "")).startswith(("generate", "peer", "modules_by_hand")),
        tables.generate,
        plot="throughput",
    )


def serve_section(machines: list[Machine]) -> str:
    return _suites(machines, lambda info: str(info.get("op", "")).startswith("serve"), tables.serve)


def start_section(machines: list[Machine]) -> str:
    return _suites(machines, lambda info: info.get("op") in ("import", "first_image"), tables.start)


def breakdown_section(machines: list[Machine]) -> str:
    parts = []
    for machine in machines:
        for run in (r for r in machine.runs if r.kind == "breakdown"):
            parts.append(f"### {machine.name}: {run.data['model']} ({run.path.name}, {run.commit})\n")
            parts.append(chart.markdown(run.data))
            parts.append(f"![bars of the table above](plots/{plots.bars_name(machine, run)})\n")
    return "\n".join(parts) if parts else "Not measured yet.\n"


def history_section(machines: list[Machine]) -> str:
    """What one image took, a row a commit and mode."""
    lines = [
        "| machine | mode | when | commit | model | generate, batch 1, p50 ms | rounds | flags |",
        "|---|---|---|---|---|--:|--:|---|",
    ]
    for machine in machines:
        for commit, record, row in history.by_mode(machine):
            lines.append(
                f"| {machine.name} | {row['mode']} | {record['datetime'][:16].replace('T', ' ')} | {commit} "
                f"| {row['sizes'].get('model')} | {row['seconds']['p50'] * 1e3:.2f} | {row['rounds'] or ''} "
                f"| {'; '.join(row['flags'] or [])} |"
            )
    pictures = [text for machine in machines if (text := _picture(machine, "history"))]
    return _block(lines) + "".join(f"\n{text}" for text in pictures)


SECTIONS: dict[str, Callable[[list[Machine]], str]] = {
    "machines": machines_section,
    "budgets": budgets_section,
    "breakdown": breakdown_section,
    "ops": ops_section,
    "stages": stages_section,
    "retrieval": retrieval_section,
    "features": features_section,
    "generate": generate_section,
    "serve": serve_section,
    "start": start_section,
    "history": history_section,
}


def _suites(
    machines: list[Machine],
    belongs: Callable[[dict[str, Any]], bool],
    table: Callable[[Run, list[dict[str, Any]]], list[str]],
    plot: str | None = None,
) -> str:
    parts = []
    for machine in machines:
        for i, (run, found) in enumerate(machine.table(belongs)):
            only = "" if i == 0 else ", rows that no file above has"
            parts.append(f"{machine.name} ({run.path.name}, {run.commit}{only}):\n")
            parts.append(_block(table(run, found)))
            if plot is not None and i == 0:
                parts.append(_picture(machine, plot))
    return "\n".join(parts) if parts else "Not measured yet.\n"


def _picture(machine: Machine, plot: str) -> str:
    name = plots.suite_name(machine, plot)
    return f"![{plot}](plots/{name})\n" if name in plots.wanted([machine]) else ""


def _block(lines: list[str]) -> str:
    return "\n".join(lines) + "\n"
