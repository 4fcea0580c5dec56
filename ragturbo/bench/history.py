"""One image by commit. A suite's file is overwritten by the next run's: what an image took is kept beside it.

`benchmarks/results/<machine>/history/<commit>.json` holds the rows of one image, batch 1, with their context. Of two
runs at one commit the one of more benchmarks stays, of equals the newer.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ragturbo.bench.results import Machine, Run, commit_of, read_run, rounds
from ragturbo.errors import InvalidRequest


def commits(machine: Machine) -> dict[str, dict[str, Any]]:
    """Commit -> record, in the order of their making: those kept, and those of the runs that lie there now."""
    stored = [json.loads(path.read_text("utf-8")) for path in sorted(_folder(machine).glob("*.json"))]
    found: dict[str, dict[str, Any]] = {}
    for record in [*stored, *(made for run in machine.runs if (made := _record(run)))]:
        commit = commit_of(record["context"])
        if commit not in found or _weight(record) > _weight(found[commit]):
            found[commit] = record
    return dict(sorted(found.items(), key=lambda item: (item[1]["datetime"], item[0])))


def by_mode(machine: Machine) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """(commit, record, row), mode by mode: what a plot or a table compares."""
    rows = [(commit, record, row) for commit, record in commits(machine).items() for row in record["rows"]]
    # A stable sort: within a mode the order of their making stays.
    return sorted(rows, key=lambda found: str(found[2]["mode"]))


def unkept(machine: Machine) -> dict[Path, str]:
    """The files that are missing or behind, and what they must hold."""
    wanted = {_folder(machine) / f"{commit}.json": _text(record) for commit, record in commits(machine).items()}
    return {path: text for path, text in wanted.items() if not path.is_file() or path.read_text("utf-8") != text}


def keep(machine: Machine) -> list[Path]:
    files = unkept(machine)
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
    return list(files)


def keep_file(path: Path, results: Path) -> list[Path]:
    """The same of one raw file that lies elsewhere, such as an older one from git; its context names the machine."""
    run = read_run(path)
    if _record(run) is None:
        raise InvalidRequest(f"{path} has no row of one image at a known commit: nothing to keep")
    place = results / run.context["machine"]
    return keep(Machine(place.name, [run], place))


def _record(run: Run) -> dict[str, Any] | None:
    if run.kind != "suite" or not run.context.get("commit"):
        return None
    rows = [
        {"name": b["name"], "rounds": rounds(b), **{key: info.get(key) for key in
         ("mode", "engine", "dtype", "threads", "sizes", "seconds", "noise", "flags")}}
        for b in run.data["benchmarks"]
        if (info := b["extra_info"]).get("op") == "generate" and "seconds" in info
        # Each mode by the engine that "auto" takes.
        and info["sizes"].get("batch") == 1 and b["name"].startswith("test_generate[")
    ]  # fmt: skip
    facts = {"kind": "history", "datetime": run.when, "benchmarks": len(run.data["benchmarks"])}
    return {**facts, "context": run.context, "rows": rows} if rows else None


def _weight(record: dict[str, Any]) -> tuple[int, str]:
    return record["benchmarks"], record["datetime"]


def _text(record: dict[str, Any]) -> str:
    return json.dumps(record, indent=1) + "\n"


def _folder(machine: Machine) -> Path:
    return machine.folder / "history"
