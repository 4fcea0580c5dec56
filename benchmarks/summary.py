"""Summarize a run of the GPU script on one screen: budgets, unverified figures, failed steps and flags."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ragturbo.bench import budgets
from ragturbo.bench.budgets import BUDGETS, best
from ragturbo.bench.results import Machine, Run, figures, flags, read_folder, unverified

# Limits of the summary's size; the files have everything.
MOST_LINES, MOST_STEPS, MOST_UNVERIFIED, MOST_FLAGS = 60, 14, 7, 7
LINE = 160


def summary(results: Path) -> str:
    """Return at most `MOST_LINES` lines of Markdown about the JSON files of one run's folder."""
    machine = read_folder(results)
    if not machine.runs:
        return "There are no records.\n"
    context = machine.runs[0].context
    cards = list(dict.fromkeys((run.context.get("gpu") or {}).get("name") for run in machine.runs))
    name = ", ".join(card for card in cards if card) or context["cpu"]
    commits = ", ".join(dict.fromkeys(run.commit for run in machine.runs))
    lines = [f"# {name}, torch {context['packages'].get('torch')}, commit {commits}", ""]
    if any(run.data.get("rehearsal") for run in machine.runs):
        keys = ", ".join(sorted({**figures(machine.runs), **unverified(machine.runs)}))
        lines += [f"A rehearsal at tiny sizes, not a measurement. A real run would give: {keys}.", ""]
    else:
        for card in cards:
            lines += [*_budgets(machine, card), ""]
        lines += _limited("Unverified, not judged:", list(_unverified(machine)), MOST_UNVERIFIED)
    lines += _limited("Did not finish:", list(_unfinished(machine)), MOST_STEPS)
    lines += _limited("Flags:", [line for run in machine.runs for line in _flags(run)], MOST_FLAGS)
    return "\n".join(lines[:MOST_LINES]) + "\n"


def _budgets(machine: Machine, gpu: str | None) -> list[str]:
    """Return the table of one GPU's figures and limits."""
    place = budgets.card(gpu)
    lines = [f"| {gpu or 'no GPU'} | limit{f' of an {place}' if place else ''} | measured | | flags |",
             "|---|---|--:|---|---|"]  # fmt: skip
    measured = figures(machine.runs)
    for budget in (b for b in BUDGETS if b.where == "gpu"):
        limit = budget.limits(place) if place else ""
        found = [f for f in measured.get(budget.key, ()) if f.gpu == gpu and gpu is not None]
        if not found:
            lines.append(f"| {budget.what} | {limit} | | not measured | |")
            continue
        figure = best(found)
        verdict = budget.met(figure.value, place) if place else f"not judged: {gpu}"
        shown = "; ".join(figure.flags)[:LINE]
        lines.append(f"| {budget.what} | {limit} | {budget.show(figure.value)} | {verdict} | {shown} |")
    return lines


def _unverified(machine: Machine) -> Iterator[str]:
    found = unverified(machine.runs)
    for budget in BUDGETS:
        for figure in found.get(budget.key, ()):
            yield f"{budget.what}: {budget.show(figure.value)} ({'; '.join(figure.flags)})"


def _unfinished(machine: Machine) -> Iterator[str]:
    """Yield steps that did not finish or have no figures, and failed phases."""
    for run in machine.runs:
        for step, found in run.data.get("steps", {}).items():
            outcome = str(found.get("outcome", "done"))
            if "withheld" in found and str(found["withheld"]) not in outcome:
                outcome += f", no figures: {found['withheld']}"
            if outcome != "done":
                yield f"{run.path.stem}: {step}: {outcome}"
            for phase, error in found.get("errors", {}).items():
                yield f"{run.path.stem}: {step}: {phase}: {error}"


def _limited(title: str, entries: list[str], most: int) -> list[str]:
    """Return a titled list of at most `most` lines, and the number of lines left out."""
    if not entries:
        return []
    shown = [f"* {' '.join(entry.split())[:LINE]}" for entry in entries[:most]]
    return [title, "", *shown, *([f"* and {len(entries) - most} more"] if len(entries) > most else []), ""]


def _flags(run: Run) -> Iterator[str]:
    yield from run.data.get("flags", [])
    for entry in run.data.get("benchmarks", []):
        yield from (f"{entry['name']}: {flag}" for flag in flags(run, entry))
