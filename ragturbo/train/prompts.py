"""Prompts from a text file, one a line, or from the caption column of a table."""

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
    """path: .txt, .jsonl, .csv or .parquet. Rows with less than min_score in score_column are left out."""
    if (score_column is None) != (min_score is None):
        raise InvalidRequest("--score-column and --min-score belong together")
    path = Path(path).expanduser()
    if not path.is_file():
        raise InvalidRequest(f"there is no file {path}")
    if path.suffix == ".txt":
        if score_column:
            raise InvalidRequest(f"{path} is plain text: it has no column {score_column!r}")
        prompts = [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]
    else:
        rows = _rows(path, [caption, *([score_column] if score_column else [])])
        prompts = []
        for row in rows:
            if caption not in row:
                raise InvalidRequest(f"{path} has no column {caption!r}; there are: {', '.join(map(str, row))}")
            good = score_column is None or min_score is None or _number(row.get(score_column)) >= min_score
            if good and str(row[caption] or "").strip():
                prompts.append(str(row[caption]).strip())
    if not prompts:
        which = f" with {score_column} ≥ {min_score}" if score_column else ""
        raise InvalidRequest(f"{path} holds no prompts{which}")
    return prompts[:limit]


def _rows(path: Path, columns: list[str]) -> Iterable[Mapping[str, Any]]:
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet as pq

            there = pq.read_schema(path).names
            return pq.read_table(path, columns=[name for name in columns if name in there]).to_pylist()
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]
        if path.suffix == ".csv":
            with open(path, newline="", encoding="utf-8") as file:
                return list(csv.DictReader(file))
    except (OSError, ValueError, csv.Error) as error:
        raise InvalidRequest(f"{path} cannot be read: {error}") from error
    raise InvalidRequest(f"{path}: prompts come from .txt, .jsonl, .csv or .parquet files")


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return float("-inf")
