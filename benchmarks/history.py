"""The time of one image by commit, kept after a suite's file is overwritten.

`python -m benchmarks.history [FILE…]` stores the rows of one image, batch 1, of the runs in benchmarks/results and of
the given files (such as older ones from git) as `<machine>/history/<commit>.json`, and prints all of them. Of two runs
of one commit the one with more benchmarks is kept; on a tie, the newer.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ragturbo.bench.results import Machine, Run, read, read_run, rounds
from ragturbo.errors import InvalidRequest
from ragturbo.machine import ROOT


def commits(machine: Machine) -> dict[str, dict[str, Any]]:
    """Return commit -> record by date: the stored ones, and those of the machine's current runs."""
    stored = [
        (path.stem, json.loads(path.read_text("utf-8"))) for path in sorted((machine.folder / "history").glob("*.json"))
    ]
    current = [(run.commit, made) for run in machine.runs if (made := _record(run))]
    found: dict[str, dict[str, Any]] = {}
    for commit, record in [*stored, *current]:
        if commit not in found or _weight(record) > _weight(found[commit]):
            found[commit] = record
    return dict(sorted(found.items(), key=lambda item: (item[1]["datetime"], item[0])))


def by_mode(machine: Machine) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Return (commit, record, row), grouped by mode."""
    rows = [(commit, record, row) for commit, record in commits(machine).items() for row in record["rows"]]
    return sorted(rows, key=lambda found: str(found[2]["mode"]))


def keep(machine: Machine) -> list[Path]:
    """Write the files that are missing or outdated, and return their paths."""
    written = []
    for commit, record in commits(machine).items():
        path, text = machine.folder / "history" / f"{commit}.json", json.dumps(record, indent=1) + "\n"
        if not path.is_file() or path.read_text("utf-8") != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, "utf-8")
            written.append(path)
    return written


def keep_file(path: Path, results: Path) -> list[Path]:
    """Do the same for a raw file outside of the results folder; its context names the machine."""
    run = read_run(path)
    if _record(run) is None:
        raise InvalidRequest(f"{path} has no row of one image at a known commit")
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
        # Only the engine that "auto" chooses.
        and info["sizes"].get("batch") == 1 and b["name"].startswith("test_generate[")
    ]  # fmt: skip
    facts = {"kind": "history", "datetime": run.when, "benchmarks": len(run.data["benchmarks"])}
    return {**facts, "context": run.context, "rows": rows} if rows else None


def _weight(record: dict[str, Any]) -> tuple[int, str]:
    return record["benchmarks"], record["datetime"]


def table(machines: Sequence[Machine]) -> str:
    lines = ["| machine | mode | when | commit | model | p50, ms | rounds | flags |"]
    lines.append("|---|---|---|---|---|--:|--:|---|")
    for machine in machines:
        for commit, record, row in by_mode(machine):
            lines.append(
                f"| {machine.name} | {row['mode']} | {record['datetime'][:16].replace('T', ' ')} | {commit} "
                f"| {row['sizes'].get('model')} | {row['seconds']['p50'] * 1e3:.2f} | {row['rounds'] or ''} "
                f"| {'; '.join(row['flags'] or [])} |"
            )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.history", description=__doc__)
    parser.add_argument("files", type=Path, nargs="*", help="raw JSON of suites, such as `git show COMMIT:FILE`")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args(argv)
    for path in options.files:
        keep_file(path, options.results)
    machines = read(options.results)
    for machine in machines:
        keep(machine)
    print(table(machines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
