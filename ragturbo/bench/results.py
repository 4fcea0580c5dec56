"""Raw results: the JSON files of each machine, whichever tool wrote them, as rows and as figures for the budgets."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ragturbo.errors import InvalidRequest

PAPER_ROWS = 630_000


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

    def table(self, belongs: Callable[[dict[str, Any]], bool]) -> list[tuple[Run, list[dict[str, Any]]]]:
        """The benchmarks of one table, file by file: rows of two runs are not to be compared.

        First the file that has most of them, of equals the newest; then what only others have, each by its file.
        """
        suites = sorted((r for r in self.runs if r.kind == "suite"), key=lambda r: (r.when, r.path.name), reverse=True)
        found = [(run, [b for b in run.data["benchmarks"] if belongs(b["extra_info"])]) for run in suites]
        out: list[tuple[Run, list[dict[str, Any]]]] = []
        seen: set[tuple[str, Any]] = set()
        for run, rows in sorted(found, key=lambda pair: -len(pair[1])):
            new = [b for b in rows if _identity(b) not in seen]
            seen |= {_identity(b) for b in new}
            if new:
                out.append((run, sorted(new, key=lambda b: (b.get("group") or "", b["fullname"]))))
        return out

    def figures(self) -> dict[str, tuple[float, str]]:
        """Budget key -> (value, file) from every run; the newest wins."""
        out: dict[str, tuple[float, str]] = {}
        for run in sorted(self.runs, key=lambda run: (run.when, run.path.name)):
            for key, value in figures(run):
                out[key] = (value, f"{self.name}/{run.path.name}")
        return out


def _identity(benchmark: dict[str, Any]) -> tuple[str, Any]:
    """One benchmark at two scales is two measurements."""
    return benchmark["fullname"], benchmark["extra_info"].get("sizes", {}).get("rows")


def read(folder: Path) -> list[Machine]:
    """Every machine under a results folder, by name."""
    places = sorted(p for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
    machines = [machine for machine in map(read_folder, places) if machine.runs]
    for run in (run for machine in machines for run in machine.runs):
        if run.data.get("rehearsal"):
            raise InvalidRequest(f"{run.path} is a rehearsal at tiny sizes, no result: delete it")
    return machines


def read_folder(place: Path) -> Machine:
    """One machine's files."""
    return Machine(place.name, [_run(path) for path in sorted(place.glob("*.json"))])


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


def history(machine: Machine) -> list[tuple[Run, dict[str, Any]]]:
    """One image, batch 1, from every suite in the order of their making: one mode, the fullest that was measured."""
    found = [
        (run, b)
        for run in sorted((r for r in machine.runs if r.kind == "suite"), key=lambda r: (r.when, r.path.name))
        for b in run.data["benchmarks"]
        if b["extra_info"].get("op") == "generate"
        and b["extra_info"]["sizes"].get("batch") == 1
        and "seconds" in b["extra_info"]
    ]
    modes = {b["extra_info"].get("mode") for _, b in found}
    # A model without an adapter has a history too.
    mode = next((m for m in ("adapter", "slerp", "none") if m in modes), None)
    return [(run, b) for run, b in found if b["extra_info"].get("mode") == mode]


def figures(run: Run) -> Iterator[tuple[str, float]]:
    """The budgets a run has measured."""
    if run.kind != "suite":
        yield from ((key, float(value)) for key, value in run.data.get("measured", {}).items())
        return
    for entry in run.data["benchmarks"]:
        info, sizes = entry["extra_info"], entry["extra_info"].get("sizes", {})
        # A benchmark names the budget it measures, or its row is known by its sizes.
        yield from ((key, float(value)) for key, value in info.get("measured", {}).items())
        if "seconds" not in info:
            continue
        p50 = info["seconds"]["p50"]
        if sizes.get("retriever") == "scann" and sizes.get("rows") == PAPER_ROWS and (info.get("recall") or 0) >= 0.95:
            yield "scann_p50_s", p50
        if info.get("samples_per_s") and info.get("variant") == "ours" and info.get("device") == "cuda":
            yield "ladd_samples_per_s", float(info["samples_per_s"])
