"""Tables of pairs: .jsonl, .csv and .parquet files, as items."""

from __future__ import annotations

import csv
import itertools
import json
import string
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq

from ragturbo.errors import InvalidRequest
from ragturbo.retrieval.items import Columns, Item, check_place, kind_of, utf16
from ragturbo.retrieval.pairs import OWN_COLUMNS
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


def check(files: Sequence[Path], columns: Columns) -> None:
    """Raise InvalidRequest for a table in UTF-16, a wrong header, and columns to keep that no table has."""
    if wrong := OWN_COLUMNS.intersection(columns.keep or ()):
        raise InvalidRequest(
            f"column {min(wrong)!r} cannot be kept: the database has its own of that name; rename yours",
            option="columns",
        )
    missing, known = set(columns.keep or ()), dict[str, None]()
    for path in files:
        kind = path.suffix.lower()
        if kind != ".parquet":
            with open(path, "rb") as file:
                if utf16(file.read(4)):
                    raise InvalidRequest(f"{path} is UTF-16; save it as UTF-8")
        if kind == ".jsonl":
            # Any row may be the first with a column.
            headers: Iterable[list[str]] = (list(row) for row in _jsonl(path, Notes()) if isinstance(row, dict))
        else:
            names = _header(path)
            _check_header(path, names, columns)
            headers = [names]
        for header in headers:
            if not missing:
                break
            missing.difference_update(header)
            known.update(dict.fromkeys(header))
    if missing:
        raise InvalidRequest(
            f"no column {min(missing)!r} to keep; there are {', '.join(known)[:200]}", option="columns"
        )


def _header(path: Path) -> list[str]:
    if path.suffix.lower() == ".parquet":
        return list(_opened(path).schema_arrow.names)
    csv.field_size_limit(_MAX_LINE)
    with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        try:
            return next(filter(None, csv.reader(file)), [])
        except csv.Error:
            # Reported with its line when the rows are read.
            return []


def _check_header(path: Path, names: list[str], columns: Columns) -> None:
    twice = {name for name, count in Counter(names).items() if name and count > 1}
    if columns.keep is not None:
        pattern = "{" in columns.image
        used = {columns.caption, "source", *columns.keep}
        used |= {name for name in twice if f"{{{name}" in columns.image} if pattern else {columns.image}
        twice &= used
    if twice:
        raise InvalidRequest(f"{path}: the header names {min(twice)!r} twice; rename one")
    if len(names) == 1 and path.suffix.lower() == ".csv" and columns.caption not in names:
        for mark, word in ((";", "semicolons"), ("\t", "tabs")):
            if mark in names[0]:
                raise InvalidRequest(f"{path}: its columns are separated by {word}; save it with commas")


def rows(path: Path) -> int:
    """Return the number of rows of a parquet file."""
    return int(_opened(path).metadata.num_rows)


def _opened(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
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
        return Item(problem=f"not an object but {kind_of(row)}")
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
    if image is None:
        return Item(source=source, problem="the image is empty")
    if isinstance(image, str):
        if problem := check_place(image):
            return Item(source=source, problem=problem)
        source = source or image
        root = (columns.root or folder).resolve()
        path = (root / image).resolve()
        if not path.is_relative_to(root):
            return Item(source=str(source), problem=f"the image path {image!r} leaves {root}; set image_root=")
        image = path
    extra = columns.extra(row, {columns.caption, "source"} | (set() if pattern else {columns.image}))
    return Item(caption, image, None if source is None else str(source), extra)
