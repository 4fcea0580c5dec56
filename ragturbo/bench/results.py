"""Read the raw result files of each machine, as benchmark rows and as figures of the budgets."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ragturbo.bench.budgets import Figure
from ragturbo.errors import InvalidRequest

PAPER_ROWS = 630_000
# A row above this share of its roofline is flagged. Ceilings are measured and err by a few percent.
ROOFLINE_LIMIT = 1.05


@dataclass
class Run:
    """One file: a pytest-benchmark run ("suite"), a breakdown, or a part of the GPU script."""

    path: Path
    kind: str
    data: dict[str, Any]

    @property
    def context(self) -> dict[str, Any]:
        return self.data["machine_info"]["ragturbo"] if self.kind == "suite" else self.data["context"]

    @property
    def when(self) -> str:
        return str(self.data.get("datetime") or self.context.get("when") or "")

    @property
    def commit(self) -> str:
        """Nine digits, and a + if the sources had uncommitted changes."""
        commit = self.context.get("commit")
        return f"{commit[:9]}{'+' if self.context.get('dirty') else ''}" if commit else "unknown"


@dataclass
class Machine:
    name: str
    runs: list[Run] = field(default_factory=list)
    folder: Path = Path()

    def table(self, belongs: Callable[[dict[str, Any]], bool]) -> list[tuple[Run, list[dict[str, Any]]]]:
        """Return the benchmarks of one table by file, because rows of two runs cannot be compared.

        The first is the file with the most rows; on a tie, the newest. The others follow with the rows that only they
        have.
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


def figures(runs: Iterable[Run]) -> dict[str, list[Figure]]:
    """Return the measured figures by budget key."""
    return _by_key(figure for run in runs for figure in _figures(run))


def unverified(runs: Iterable[Run]) -> dict[str, list[Figure]]:
    """Return figures of steps whose results were not verified; their flag is the reason."""
    return _by_key(figure for run in runs for figure in _unverified(run))


def _by_key(pairs: Iterable[tuple[str, Figure]]) -> dict[str, list[Figure]]:
    out: dict[str, list[Figure]] = {}
    for key, figure in pairs:
        out.setdefault(key, []).append(figure)
    return out


def _identity(benchmark: dict[str, Any]) -> tuple[str, Any]:
    # One benchmark at two scales is two measurements.
    return benchmark["fullname"], benchmark["extra_info"].get("sizes", {}).get("rows")


def read(folder: Path) -> list[Machine]:
    """Return every machine under a results folder, by name. Raises InvalidRequest for a rehearsal's files."""
    places = sorted(p for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
    machines = [machine for machine in map(read_folder, places) if machine.runs]
    for run in (run for machine in machines for run in machine.runs):
        if run.data.get("rehearsal"):
            raise InvalidRequest(f"{run.path} is a rehearsal at tiny sizes, not a result: delete it")
    return machines


def read_folder(place: Path) -> Machine:
    return Machine(place.name, [read_run(path) for path in sorted(place.glob("*.json"))], place)


def read_run(path: Path) -> Run:
    try:
        data = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise InvalidRequest(f"{path} is not JSON: {error}") from error
    if "benchmarks" in data and "machine_info" in data:
        return Run(path, "suite", data)
    if "kind" not in data or "context" not in data:
        raise InvalidRequest(f"{path} is no result: it has neither benchmarks nor kind and context")
    return Run(path, str(data["kind"]), data)


def rounds(benchmark: dict[str, Any]) -> int | None:
    """Return the number of measurements behind the percentiles, or None if an older record does not say."""
    return benchmark["extra_info"].get("rounds")


def flags(run: Run, benchmark: dict[str, Any]) -> list[str]:
    """Return the row's own flags, and one if it is faster than its floor."""
    info = benchmark["extra_info"]
    found = list(info.get("flags") or [])
    if info.get("fraction_of_roofline", 0) > ROOFLINE_LIMIT:
        rate = run.data["ceilings"].get(info["device"], {}).get("bytes_per_s", math.inf)
        by_bytes = math.isclose(info["floor_s"], info["bytes"] / rate, rel_tol=1e-6)
        found.append("over the copy rate" if by_bytes else "over the matrix or link rate")
    return found


def _figures(run: Run) -> Iterator[tuple[str, Figure]]:
    place = _place(run)
    if run.kind != "suite":
        modes = run.data["modes"].values() if run.kind == "overhead" else ()
        made = replace(place, rounds=min((m["rounds"] for m in modes), default=0))
        for key, value in run.data.get("measured", {}).items():
            yield key, replace(made, value=float(value), flags=_flags_of(run, key))
        return
    for entry in run.data["benchmarks"]:
        info, sizes = entry["extra_info"], entry["extra_info"].get("sizes", {})
        made = replace(place, rounds=rounds(entry) or 0, flags=tuple(flags(run, entry)))
        # A benchmark names the budget it measures, or is recognized by its sizes.
        yield from ((key, replace(made, value=float(value))) for key, value in info.get("measured", {}).items())
        if "seconds" not in info:
            continue
        p50 = info["seconds"]["p50"]
        if sizes.get("retriever") == "scann" and sizes.get("rows") == PAPER_ROWS and (info.get("recall") or 0) >= 0.95:
            yield "scann_p50_s", replace(made, value=p50)
        if info.get("samples_per_s") and info.get("variant") == "ours" and info.get("device") == "cuda":
            yield "ladd_samples_per_s", replace(made, value=float(info["samples_per_s"]))


def _flags_of(run: Run, key: str) -> tuple[str, ...]:
    """Return the flags of the step that gave the figure; all of them if the record has no steps."""
    steps = run.data.get("steps")
    if not steps:
        return tuple(run.data.get("flags", []))
    return tuple(flag for found in steps.values() if key in found.get("figures", []) for flag in found.get("flags", []))


def _unverified(run: Run) -> Iterator[tuple[str, Figure]]:
    for step in run.data.get("steps", {}).values():
        because = step.get("unverified_because", {})
        for key, value in step.get("unverified", {}).items():
            yield key, replace(_place(run), value=float(value), flags=(str(because.get(key, "not compared")),))


def _place(run: Run) -> Figure:
    """Return a figure of this run without its value."""
    context = run.context
    return Figure(
        0.0, f"{run.path.parent.name}/{run.path.name}", run.commit, run.when,
        (context.get("gpu") or {}).get("name"), context.get("cores"),
    )  # fmt: skip
