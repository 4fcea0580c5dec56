"""A suite's rows as they finish, one JSON line each.

pytest-benchmark writes its JSON at the end of the run, which a suite that is killed does not reach. The benchmarks'
conftest.py appends a line for every row that passed, and the end of the traceback of one that failed; `rows_to_json`
makes of them what pytest-benchmark would write.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def append(path: Path, **facts: Any) -> None:
    """One line, on its way to the disk before this returns: SIGKILL does not take it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(facts, default=str) + "\n")


def rows_to_json(path: Path) -> dict[str, Any] | None:
    """The structure of pytest-benchmark's JSON: machine_info with our context, ceilings, benchmarks, wall_s.

    Rows that failed are in "failed", {name: the end of the traceback}, if there are any.

    Args:
        path: lines of one suite, or of several that ran one after another; a row that ran twice counts as it ran last.

    Returns:
        None where no row finished, or there is no file.
    """
    if not path.is_file():
        return None
    out: dict[str, Any] = {"ceilings": {}, "benchmarks": []}
    rows: dict[str, Any] = {}
    failed: dict[str, str] = {}
    for line in path.read_text("utf-8", errors="replace").splitlines():
        try:
            facts = json.loads(line)
        except ValueError:
            # The process was killed while it wrote.
            continue
        if (row := facts.pop("benchmark", None)) is not None:
            rows[row["fullname"]] = row
        out["ceilings"] |= facts.pop("ceilings", {})
        failed |= facts.pop("failed", {})
        out |= facts
    out["benchmarks"] = list(rows.values())
    if failed:
        out["failed"] = failed
    return out if rows or failed else None
