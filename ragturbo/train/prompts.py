"""Read prompts from a text file, one per line, or from the caption column of a table."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ragturbo.errors import InvalidRequest


def read_prompts(
    path: str | Path,
    *,
    caption: str = "caption",
    score_column: str | None = None,
    min_score: float | None = None,
    limit: int | None = None,
) -> list[str]:
    """Return the first `limit` prompts of a .txt, .jsonl, .csv or .parquet file.

    Rows of a table with a score below `min_score`, or none, are skipped.
    """
    if (score_column is None) != (min_score is None):
        raise InvalidRequest("--score-column and --min-score belong together")
    path = Path(path).expanduser()
    if not path.is_file():
        raise InvalidRequest(f"no such file: {path}")
    if path.suffix == ".txt" and score_column:
        raise InvalidRequest(f"{path} is plain text and has no column {score_column!r}")
    prompts = []
    for row in _rows(path, caption, score_column):
        if caption not in row:
            raise InvalidRequest(f"{path} has no column {caption!r}; its columns are {', '.join(map(str, row))}")
        text = str(row[caption] or "").strip()
        good = score_column is None or min_score is None or _number(row.get(score_column)) >= min_score
        if text and good:
            prompts.append(text)
    if not prompts:
        which = f" with {score_column} ≥ {min_score}" if score_column else ""
        raise InvalidRequest(f"{path} holds no prompts{which}")
    return prompts[:limit]


def _rows(path: Path, caption: str, score_column: str | None) -> Iterable[Mapping[str, Any]]:
    try:
        if path.suffix == ".txt":
            return [{caption: line} for line in path.read_text("utf-8").splitlines()]
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]
        if path.suffix == ".csv":
            with open(path, newline="", encoding="utf-8") as file:
                return list(csv.DictReader(file))
        if path.suffix == ".parquet":
            import pyarrow.parquet as pq

            columns = [name for name in pq.read_schema(path).names if name in (caption, score_column)]
            return pq.read_table(path, columns=columns).to_pylist()
    except (OSError, ValueError, csv.Error) as error:
        raise InvalidRequest(f"{path} cannot be read: {error}") from error
    raise InvalidRequest(f"{path}: prompts are read from .txt, .jsonl, .csv or .parquet files")


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return float("-inf")
