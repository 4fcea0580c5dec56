"""Tables of pairs: .jsonl, .csv and .parquet files, as items."""

from __future__ import annotations

import csv
import itertools
import json
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq

from ragturbo.errors import InvalidRequest
from ragturbo.retrieval.items import Columns, Item, utf16
from ragturbo.retrieval.report import Notes

_MAX_LINE = 64 << 20


class _Pattern(string.Formatter):
    def format_field(self, value: Any, format_spec: str) -> str:
        if format_spec in ("name", "stem"):
            name = Path(unquote(urlsplit(str(value)).path)).name
            return name if format_spec == "name" else Path(name).stem
        return super().format_field(value, format_spec)


def items(path: Path, columns: Columns, notes: Notes | None) -> Iterator[Item]:
    """The rows of one table in order. `notes` gets its empty and its too long rows."""
    for row in READERS[path.suffix.lower()](path, Notes() if notes is None else notes):
        yield row if isinstance(row, Item) else _from_row(row, columns, path.parent)


def check_encoding(path: Path) -> None:
    """Raise InvalidRequest for a text table in UTF-16."""
    with open(path, "rb") as file:
        if utf16(file.read(4)):
            raise InvalidRequest(f"{path} is UTF-16; save it as UTF-8")


def rows(path: Path) -> int:
    """Return the number of rows of a parquet file."""
    try:
        return pq.ParquetFile(path).metadata.num_rows
    except (pa.ArrowException, OSError) as error:
        raise InvalidRequest(f"{path}: not a parquet file: {error}") from error


def _jsonl(path: Path, notes: Notes) -> Iterator[Any]:
    with open(path, "rb") as file:
        for number in itertools.count(1):
            line = file.readline(_MAX_LINE)
            if not line:
                return
            if not line.endswith(b"\n") and len(line) == _MAX_LINE:
                while (rest := file.readline(_MAX_LINE)) and not rest.endswith(b"\n"):
                    pass
                yield Item(source=f"{path.name}:{number}", problem=f"the line is longer than {_MAX_LINE} bytes")
            elif line.strip():
                try:
                    # It accepts a byte-order mark.
                    yield json.loads(line)
                except (ValueError, RecursionError) as error:
                    yield Item(source=f"{path.name}:{number}", problem=f"not JSON: {error}")
            else:
                notes.add("empty_row", f"{path.name}:{number}")


def _csv(path: Path, notes: Notes) -> Iterator[Any]:
    # The default limit of 128 KiB per field would end the build at one long caption.
    csv.field_size_limit(_MAX_LINE)
    with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        reader = csv.reader(file)
        names: list[str] | None = None
        while True:
            try:
                row = next(reader, None)
            except csv.Error as error:
                yield Item(source=f"{path.name}:{reader.line_num}", problem=f"not CSV: {error}")
                continue
            if row is None:
                return
            if not row:
                notes.add("empty_row", f"{path.name}:{reader.line_num}")
            elif names is None:
                names = row
            else:
                if len(row) > len(names):
                    notes.add(
                        "long_row", f"{path.name}:{reader.line_num} has {len(row)} fields instead of {len(names)}"
                    )
                yield dict(itertools.zip_longest(names, row[: len(names)]))


def _parquet(path: Path, notes: Notes) -> Iterator[Any]:
    try:
        for batch in pq.ParquetFile(path).iter_batches(256):
            yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        yield Item(source=path.name, problem=f"not readable from here on: {error}")


READERS: dict[str, Callable[[Path, Notes], Iterator[Any]]] = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}


def _from_row(row: Any, columns: Columns, folder: Path) -> Item:
    if not isinstance(row, dict):
        return Item(problem=f"not an object but {type(row).__name__}")
    source = row.get("source")
    pattern = "{" in columns.image
    try:
        image = _Pattern().format(columns.image, **row) if pattern else row[columns.image]
        caption = row[columns.caption]
    except (KeyError, IndexError, ValueError, TypeError) as error:
        return Item(source=source, problem=f"no column {error}; there are {', '.join(map(str, row))[:200]}")
    if isinstance(image, dict):
        # The layout of Hugging Face datasets: {"bytes": …, "path": …}.
        source = source or image.get("path")
        image = image.get("bytes") or image.get("path")
    if isinstance(image, str):
        source = source or image
        root = (columns.root or folder).resolve()
        path = (root / image).resolve()
        if not path.is_relative_to(root):
            return Item(source=str(source), problem=f"the image path {image!r} leaves {root}; set image_root")
        image = path
    extra = columns.extra(row, {columns.caption, "source"} | (set() if pattern else {columns.image}))
    return Item(caption, image, None if source is None else str(source), extra)
