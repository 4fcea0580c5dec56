"""Write the pairs of a database to a table, from which another database can be built."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ragturbo.errors import DatabaseError, InvalidRequest
from ragturbo.retrieval.pairs import Record

if TYPE_CHECKING:
    from ragturbo.retrieval.database import Database

_FIXED = ("id", "caption", "source", "sha256")
_KINDS = (".jsonl", ".csv", ".parquet")


def export_table(
    database: Database, out: str | os.PathLike[str], thumbnails: str | os.PathLike[str] | None = None
) -> int:
    """Write id, caption, source, sha256 and the other columns of every pair.

    Args:
        out: a new .jsonl, .csv or .parquet file.
        thumbnails: a folder for the thumbnails, each as ID.webp; None: they are not written.

    Returns:
        The number of pairs.

    Raises:
        InvalidRequest: another kind of file, or it exists already.
        DatabaseError: a file cannot be written.
    """
    path = Path(out).expanduser()
    if path.suffix.lower() not in _KINDS:
        raise InvalidRequest(f"{path} must end in {', '.join(_KINDS)}", option="out")
    if path.exists():
        raise InvalidRequest(f"{path} exists already; choose another file", option="out")
    check_parent(path)
    folder = None if thumbnails is None else Path(thumbnails).expanduser()
    if folder is not None and folder.exists() and not folder.is_dir():
        raise InvalidRequest(f"{folder} is a file, and thumbnails need a folder", option="thumbnails")
    for target in (path, folder):
        if target is not None and target.resolve().is_relative_to(database.path.resolve()):
            raise InvalidRequest(f"{target} is in the folder of the database; choose another place", option="out")
    records = database.snapshot.records(folder is not None)
    try:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            records = _written(records, folder)
        # Under another name until it is complete.
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            _WRITERS[path.suffix.lower()](part, records, _columns(database))
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise DatabaseError(f"{error.filename or path}: writing failed: {error.strerror or error}") from error
    return len(database)


def check_parent(path: Path) -> None:
    """Raise InvalidRequest unless a file can be made at `path`."""
    if path.is_dir():
        raise InvalidRequest(f"{path} is a folder; name a file in it")
    if not path.parent.exists():
        raise InvalidRequest(f"{path.parent} does not exist; make it first")
    if not path.parent.is_dir():
        raise InvalidRequest(f"{path.parent} is a file, not a folder")


def _columns(database: Database) -> list[str]:
    own = {name for pairs in database.snapshot.segments.pairs for name in pairs.text().column_names}
    return [*_FIXED, *sorted(own - set(_FIXED))]


def _written(records: Iterable[Record], folder: Path) -> Iterator[Record]:
    """Pass records on and write their thumbnails."""
    for record in records:
        if record.thumbnail is not None:
            (folder / f"{record.id}.webp").write_bytes(record.thumbnail)
        yield record


def _row(record: Record) -> dict[str, Any]:
    return {**{name: getattr(record, name) for name in _FIXED}, **record.extra}


def _jsonl(path: Path, records: Iterable[Record], columns: list[str]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(_row(record), ensure_ascii=False, default=str) + "\n")


def _csv(path: Path, records: Iterable[Record], columns: list[str]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(map(_row, records))


def _parquet(path: Path, records: Iterable[Record], columns: list[str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from ragturbo.retrieval.pairs import column

    rows = list(map(_row, records))
    pq.write_table(pa.table({name: column([row.get(name) for row in rows]) for name in columns}), path)


_WRITERS = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}
