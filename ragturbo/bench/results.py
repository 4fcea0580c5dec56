"""Raw results: the JSON files of each machine, whichever tool wrote them, as rows and as figures for the budgets."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ragturbo.errors import InvalidRequest


@dataclass
class Run:
    """One file: a pytest-benchmark run ("suite"), a breakdown, or a part of the GPU script."""

    path: Path
    kind: str
    data: dict[str, Any]

    @property
    def context(self) -> dict[str, Any]:
        if self.kind == "suite":
            return self.data["machine_info"]["ragturbo"]
        return self.data["context"]

    @property
    def when(self) -> str:
        return str(self.data.get("datetime") or self.context.get("when") or "")

    @property
    def commit(self) -> str:
        commit = self.context.get("commit")
        return f"{commit[:9]}{'+' if self.context.get('dirty') else ''}" if commit else "unknown"


@dataclass
class Machine:
    name: str
    runs: list[Run] = field(default_factory=list)

    def latest(self, kind: str) -> Run | None:
        found = [run for run in self.runs if run.kind == kind]
        return max(found, key=lambda run: (run.when, run.path.name)) if found else None

    def figures(self) -> dict[str, tuple[float, str]]:
        """Budget key -> (value, file) from every run; the newest wins."""
        out: dict[str, tuple[float, str]] = {}
        for run in sorted(self.runs, key=lambda run: (run.when, run.path.name)):
            for key, value in figures(run):
                out[key] = (value, f"{self.name}/{run.path.name}")
        return out


def read(folder: Path) -> list[Machine]:
    """Every machine under a results folder, by name."""
    machines = []
    for place in sorted(p for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []:
        runs = [_run(path) for path in sorted(place.glob("*.json"))]
        if runs:
            machines.append(Machine(place.name, runs))
    return machines


def _run(path: Path) -> Run:
    try:
        data = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise InvalidRequest(f"{path} is not JSON: {error}") from error
    if "benchmarks" in data and "machine_info" in data:
        return Run(path, "suite", data)
    if "kind" not in data or "context" not in data:
        raise InvalidRequest(f"{path} is no result: it has neither benchmarks nor kind and context")
    return Run(path, str(data["kind"]), data)


def rows(run: Run, prefix: str) -> list[dict[str, Any]]:
    """A suite's benchmarks whose op starts with `prefix`, by name."""
    found = [b for b in run.data["benchmarks"] if str(b["extra_info"].get("op", "")).startswith(prefix)]
    return sorted(found, key=lambda b: (b.get("group") or "", b["fullname"]))


def figures(run: Run) -> Iterator[tuple[str, float]]:
    """The budgets a run has measured."""
    if run.kind != "suite":
        yield from ((key, float(value)) for key, value in run.data.get("measured", {}).items())
        return
    for entry in run.data["benchmarks"]:
        info = entry["extra_info"]
        # A suite names the budget it measures, so that a new one needs no line here.
        yield from ((key, float(value)) for key, value in info.get("measured", {}).items())
