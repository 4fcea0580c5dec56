"""Generate the marked sections of docs/performance.md from the raw JSON: equal data give equal text."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from ragturbo.bench import budgets, fig6, tables
from ragturbo.bench.results import PAPER_ROWS, Machine, figures, read, unverified
from ragturbo.errors import InvalidRequest

# <!-- bench:NAME --> … <!-- /bench -->
_SECTION = re.compile(r"(<!-- bench:([a-z]+) -->\n).*?(<!-- /bench -->)", re.DOTALL)


def update(results: Path, page: Path, *, write: bool) -> list[str]:
    """Render every section of the page, write it if asked to, and return the names of the sections that differed."""
    machines = read(results)
    if not page.is_file():
        raise InvalidRequest(f"there is no {page}; give --page")
    changed: list[str] = []

    def render(match: re.Match[str]) -> str:
        name = match[2]
        if name not in SECTIONS:
            raise InvalidRequest(f"{page} has a section {name!r}; known: {', '.join(SECTIONS)}")
        new = f"{match[1]}{SECTIONS[name](machines)}{match[3]}"
        if new != match[0]:
            changed.append(name)
        return new

    text = _SECTION.sub(render, page.read_text("utf-8"))
    if write:
        page.write_text(text, "utf-8")
    return changed


def machines_section(machines: list[Machine]) -> str:
    lines = ["| file | machine | torch | triton | commit | made by |", "|---|---|---|---|---|---|"]
    for machine in machines:
        for run in machine.runs:
            c, gpu = run.context, run.context.get("gpu")
            what = f"{c['cpu']}, {c['cores']} cores"
            if gpu:
                limit = f", {gpu['power_limit_w']:.0f} W" if gpu.get("power_limit_w") else ""
                what = f"{gpu['name']}, driver {gpu.get('driver', 'unknown')}{limit}; {what}"
            packages = c["packages"]
            # Older records have no command.
            words = [f"{name}={value}" for name, value in c.get("environment", {}).items()]
            command = f"`{' '.join([*words, c['command']])}`" if "command" in c else ""
            lines.append(
                f"| {machine.name}/{run.path.name} | {what} | {packages.get('torch', '')} "
                f"| {packages.get('triton', '')} | {run.commit} | {command} |"
            )
    return _block(lines)


def budgets_section(machines: list[Machine]) -> str:
    runs = [run for machine in machines for run in machine.runs]
    apart = budgets.unverified(unverified(runs))
    return _block(budgets.table(figures(runs))) + (f"\n{_block(apart)}" if apart else "")


def breakdown_section(machines: list[Machine]) -> str:
    parts = [
        f"### {machine.name}: {run.data['model']} ({run.path.name}, {run.commit})\n\n{fig6.markdown(run.data)}"
        for machine in machines
        for run in machine.runs
        if run.kind == "breakdown"
    ]
    return "\n".join(parts) or "Not measured yet.\n"


def peers_section(machines: list[Machine]) -> str:
    """One image on a CPU, in pairs of processes."""
    parts = []
    for run in (run for machine in machines for run in machine.runs if run.kind == "peers"):
        threads = run.context.get("environment", {}).get("OMP_NUM_THREADS", "torch's")
        lines = ["| ragturbo | against | seconds | times as fast | latents apart |", "|---|---|--:|--:|--:|"]
        for pair in run.data["pairs"]:
            ours, theirs = (median(pair["seconds"][pair[name]]) for name in ("ours", "peer"))
            low, high = pair["interval"]
            lines.append(
                f"| {pair['ours']} | {pair['peer']} | {ours:.3g}, {theirs:.3g} "
                f"| {pair['times_as_fast']:.2f} [{low:.2f}, {high:.2f}] | {pair['latents_apart']:.0e} |"
            )
        rounds = len(next(iter(run.data["pairs"][0]["seconds"].values())))
        head = f"{run.data['model']}, {run.context['cpu']}, {threads} threads, {rounds} rounds"
        parts.append(f"{head} ({run.path.parent.name}/{run.path.name}, {run.commit}):\n\n{_block(lines)}")
    return "\n".join(parts) or "Not measured yet.\n"


def _op(info: dict[str, Any]) -> str:
    return str(info.get("op", ""))


def _of_the_papers_search(info: dict[str, Any]) -> bool:
    """Return whether a row is of the paper's number of keys; rows of other ScaNN settings are left out."""
    sizes = info.get("sizes", {})
    return _op(info) == "retrieval" and sizes["rows"] == PAPER_ROWS and not sizes["retriever"].startswith("leaves")


def _suite_section(columns: tables.Columns, belongs: Callable[[dict[str, Any]], bool]) -> Callable[[Any], str]:
    def section(machines: list[Machine]) -> str:
        parts = []
        for machine in machines:
            for i, (run, found) in enumerate(machine.table(belongs)):
                only = "" if i == 0 else ", rows that no file above has"
                parts.append(f"{machine.name} ({run.path.name}, {run.commit}{only}):\n")
                parts.append(_block(tables.table(columns, run, found)))
        return "\n".join(parts) or "Not measured yet.\n"

    return section


SECTIONS: dict[str, Callable[[list[Machine]], str]] = {
    "machines": machines_section,
    "budgets": budgets_section,
    "breakdown": breakdown_section,
    "peers": peers_section,
    "generate": _suite_section(
        tables.GENERATE,
        lambda info: _op(info).startswith(("generate", "peer", "modules_by_hand")) and info["sizes"]["batch"] in (1, 8),
    ),
    "serve": _suite_section(tables.SERVE, lambda info: _op(info).startswith("serve")),
    "retrieval": _suite_section(tables.RETRIEVAL, _of_the_papers_search),
    "features": _suite_section(
        tables.FEATURES, lambda info: "reader" in info.get("sizes", {}) and info["sizes"]["rows"] == 64
    ),
}


def _block(lines: list[str]) -> str:
    return "\n".join(lines) + "\n"
