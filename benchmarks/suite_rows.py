"""Write a suite's rows as JSON lines when they finish, because pytest-benchmark writes its JSON only at the end.

benchmarks/conftest.py appends a line for every row that passes, and the end of the traceback of one that fails.
`rows_to_json` converts the lines to pytest-benchmark's JSON.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def append(path: Path, **facts: Any) -> None:
    """Append one line and close the file, so that a killed process keeps it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(facts, default=str) + "\n")


def rows_to_json(path: Path) -> dict[str, Any] | None:
    """Return the structure of pytest-benchmark's JSON, or None if there is no file or no row finished.

    Failed rows are in "failed", {name: end of the traceback}.

    Args:
        path: lines of one or several suites; if a row ran twice, its last result is used.
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
            # The process was killed while writing.
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
