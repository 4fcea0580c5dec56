"""Read prompts from a text file, one per line, or from the caption column of a table. Imports no torch."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ragturbo.checks import FLOAT32_MAX, number
from ragturbo.errors import InvalidRequest
from ragturbo.messages import short
from ragturbo.train.report import Left, none_left

_CAPTION = "caption"


@dataclass(frozen=True)
class Prompts:
    texts: list[str]
    left_out: list[dict[str, Any]]
    """The rows that were left out: their number from 0, the file and the reason."""


def read_prompts(
    path: str | Path,
    *,
    caption: str = _CAPTION,
    score_column: str | None = None,
    min_score: float | None = None,
    limit: int | None = None,
    keep_empty: bool = False,
) -> Prompts:
    """Read the first `limit` prompts of a .txt, .jsonl, .csv or .parquet file.

    Args:
        caption: the column of a table.
        score_column, min_score: leave out rows with a lower score, or none.
        keep_empty: return empty prompts as "", instead of leaving them out.
    """
    check_scores(score_column, min_score)
    path = Path(path).expanduser()
    if not path.is_file():
        raise InvalidRequest(f"{path} is a folder, not a file of prompts" if path.is_dir() else f"no such file: {path}")
    if path.suffix == ".txt" and (score_column or caption != _CAPTION):
        option = "--score-column" if score_column else "--caption-column"
        raise InvalidRequest(f"{path} is plain text and has no columns: {option} has no effect")
    texts: list[str] = []
    left = Left()
    for position, row in enumerate(_rows(path, caption, score_column)):
        if limit is not None and len(texts) == limit:
            break
        if caption not in row:
            raise InvalidRequest(
                f"{path} has no column {caption!r}; its columns are {', '.join(filter(None, row))} (--caption-column)"
            )
        value = row[caption]
        text = "" if value is None else str(value).strip()
        if isinstance(value, (list, dict)):
            problem: str | None = f"the prompt is not a text: {short(value)}"
        else:
            problem = _problem(text, row, score_column, min_score, keep_empty)
        if problem is None:
            texts.append(text)
        else:
            left.skip(position, path.name, problem)
    if not any(texts):
        why = f": {none_left('prompt', left.skipped)}" if left.skipped else ""
        raise InvalidRequest(f"{path} holds no prompts{why}")
    return Prompts(texts, left.skipped)


def _problem(
    text: str, row: Mapping[str, Any], score_column: str | None, min_score: float | None, keep_empty: bool
) -> str | None:
    if not text and not keep_empty:
        return "the prompt is empty"
    if score_column is None or min_score is None:
        return None
    return score_problem(row.get(score_column), score_column, min_score)


def check_scores(column: str | None, least: float | None) -> None:
    if column is None and least is not None:
        raise InvalidRequest("--min-score needs --score-column, the column of the scores")
    if column is not None and least is None:
        raise InvalidRequest("--score-column needs --min-score, the least score to keep")
    if least is not None:
        number("min_score", least, -FLOAT32_MAX)


def score_problem(value: Any, column: str, least: float) -> str | None:
    """Why a row with this score is left out; None: it is not."""
    try:
        score = float(value)
    except (TypeError, ValueError):
        return f"no number in column {column!r}" + ("" if value is None else f": {short(value)}")
    return None if score >= least else f"{column} under {least:g}: {score:g}"


def _rows(path: Path, caption: str, score_column: str | None) -> Iterable[Mapping[str, Any]]:
    try:
        if path.suffix == ".txt":
            return [{caption: line} for line in path.read_text("utf-8").splitlines()]
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]
            if not all(isinstance(row, dict) for row in rows):
                raise ValueError('every line must be an object such as {"caption": "a cat"}')
            return rows
        if path.suffix == ".csv":
            with open(path, newline="", encoding="utf-8") as file:
                return list(csv.DictReader(file))
        if path.suffix == ".parquet":
            import pyarrow.parquet as pq

            known = pq.read_schema(path).names
            columns = [name for name in known if name in (caption, score_column)]
            if caption not in columns:
                # An error that names all columns follows.
                return [dict.fromkeys(known)]
            return pq.read_table(path, columns=columns).to_pylist()
    except (OSError, ValueError, csv.Error) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise InvalidRequest(f"{path} cannot be read: {why}") from error
    raise InvalidRequest(f"{path}: prompts are read from .txt, .jsonl, .csv or .parquet files")
