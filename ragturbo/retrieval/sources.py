"""Sources of pairs: folders, tables, tar shards and iterables, as one stream of items."""

from __future__ import annotations

import csv
import itertools
import json
import os
import string
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq

from ragturbo.errors import InvalidRequest
from ragturbo.retrieval.images import MAX_BYTES

IMAGE_TYPES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
# CLIP reads 77 tokens; a caption of megabytes is a mistake or an attack.
MAX_CAPTION = 16_384
_MAX_LINE = 64 << 20


@dataclass(frozen=True)
class Item:
    """One pair to encode, or the `problem` that prevents it."""

    caption: str = ""
    image: Any = None
    source: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None


@dataclass(frozen=True)
class Source:
    """`description` identifies the input; `total` is the number of items, if known."""

    description: dict[str, Any]
    total: int | None
    items: Callable[[], Iterator[Item]]


@dataclass(frozen=True)
class Columns:
    """The columns of a table.

    `image` is a column, or a pattern such as "train/{image_id}.jpg" or "images/{url:name}", where `:name` and `:stem`
    take the file name of a URL or path. Image paths are under `root`.
    """

    caption: str = "caption"
    image: str = "image"
    root: Path | None = None
    keep: Sequence[str] | None = None
    """The user's own columns to store; None: all."""

    def extra(self, row: Mapping[Any, Any], used: set[str]) -> dict[str, Any]:
        names = [name for name in row if name not in used and name is not None] if self.keep is None else self.keep
        return {str(name): row.get(name) for name in names}


class _Pattern(string.Formatter):
    def format_field(self, value: Any, format_spec: str) -> str:
        if format_spec in ("name", "stem"):
            name = Path(unquote(urlsplit(str(value)).path)).name
            return name if format_spec == "name" else Path(name).stem
        return super().format_field(value, format_spec)


def open_source(pairs: Any, columns: Columns) -> Source:
    """Open a folder, a .jsonl/.csv/.parquet/.tar file or pattern, a list of files, or an iterable of tuples."""
    if isinstance(pairs, (str, os.PathLike)):
        path = Path(pairs).expanduser()
        if path.is_dir():
            shards = sorted(path.glob("*.tar"))
            has_images = any(entry.suffix.lower() in IMAGE_TYPES for entry in path.iterdir())
            return _files(shards, columns) if shards and not has_images else _folder(path)
        if any(mark in path.name for mark in "*?["):
            files = sorted(path.parent.glob(path.name))
            if not files:
                raise InvalidRequest(f"{path}: no file matches")
            return _files(files, columns)
        if not path.is_file():
            raise InvalidRequest(f"{path}: no such file or folder")
        return _files([path], columns)
    if isinstance(pairs, (list, tuple)) and pairs and all(isinstance(p, (str, os.PathLike)) for p in pairs):
        return _files([Path(p).expanduser() for p in pairs], columns)
    if isinstance(pairs, Iterable):
        total = len(pairs) if isinstance(pairs, Sized) else None
        return Source({"kind": "iterable"}, total, lambda: map(from_tuple, iter(pairs)))
    raise InvalidRequest(f"pairs={type(pairs).__name__} is neither a path nor an iterable of (caption, image)")


def check_caption(caption: Any) -> str | None:
    """Return why a caption cannot be stored, or None."""
    if not isinstance(caption, str):
        return f"the caption is {type(caption).__name__}, not text"
    if not caption.strip():
        return "the caption is empty"
    if len(caption) > MAX_CAPTION:
        return f"the caption has {len(caption)} characters, more than {MAX_CAPTION}"
    try:
        caption.encode()
    except UnicodeEncodeError:
        return "the caption is not valid Unicode"
    return None


def from_tuple(entry: Any) -> Item:
    """(caption, image) or (caption, image, metadata) -> an Item, whose source is the metadata's or the image's path."""
    if not isinstance(entry, (tuple, list)) or len(entry) not in (2, 3):
        return Item(problem=f"not (caption, image) or (caption, image, metadata) but {type(entry).__name__}")
    extra = entry[2] if len(entry) == 3 else None
    if extra is not None and not isinstance(extra, Mapping):
        return Item(problem=f"metadata is {type(extra).__name__}, not a mapping")
    meta = {str(name): value for name, value in (extra or {}).items()}
    path = str(entry[1]) if isinstance(entry[1], (str, os.PathLike)) else None
    source = meta.pop("source", path)
    return Item(entry[0], entry[1], None if source is None else str(source), meta)


def _folder(path: Path) -> Source:
    """Images with a .txt file of the same name, in the order of their paths."""
    found = sorted(
        (Path(folder) / name).relative_to(path)
        for folder, _, names in os.walk(path)
        for name in names
        if Path(name).suffix.lower() in IMAGE_TYPES
    )
    if not found:
        raise InvalidRequest(f"{path}: no images ({', '.join(IMAGE_TYPES)}) and no .tar shards")

    def items() -> Iterator[Item]:
        for name in found:
            text = (path / name).with_suffix(".txt")
            try:
                if text.stat().st_size > 4 * MAX_CAPTION:
                    yield Item(source=str(name), problem=f"{text.name} has {text.stat().st_size} bytes")
                    continue
                caption = text.read_text(encoding="utf-8").strip()
            except (OSError, UnicodeDecodeError) as error:
                yield Item(source=str(name), problem=f"no caption: {text.name}: {error}")
                continue
            yield Item(caption, path / name, str(name))

    return Source({"kind": "folder", "items": len(found)}, len(found), items)


def _files(files: Sequence[Path], columns: Columns) -> Source:
    kinds = {path.suffix.lower() for path in files}
    if kinds & set(IMAGE_TYPES):
        raise InvalidRequest(
            "an image file needs a caption: give [(caption, image), …], or --caption on the command line"
        )
    if kinds != {".tar"} and (unknown := kinds - set(_READERS)):
        raise InvalidRequest(f"{', '.join(sorted(unknown))} is not supported; use .jsonl, .csv, .parquet or .tar")
    rows = 0
    for path in files:
        if not path.is_file():
            raise InvalidRequest(f"{path}: no such file")
        if kinds == {".parquet"}:
            try:
                rows += pq.ParquetFile(path).metadata.num_rows
            except (pa.ArrowException, OSError) as error:
                raise InvalidRequest(f"{path}: not a parquet file: {error}") from error

    def items() -> Iterator[Item]:
        for path in files:
            if kinds == {".tar"}:
                yield from _tar(path, columns)
                continue
            for row in _READERS[path.suffix.lower()](path):
                yield row if isinstance(row, Item) else _from_row(row, columns, path.parent)

    description = {"kind": "tar" if kinds == {".tar"} else "table", "caption": columns.caption, "image": columns.image,
                   "files": [[path.name, path.stat().st_size] for path in files]}  # fmt: skip
    return Source(description, rows if kinds == {".parquet"} else None, items)


def _jsonl(path: Path) -> Iterator[Any]:
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
                    yield json.loads(line)
                except (ValueError, RecursionError) as error:
                    yield Item(source=f"{path.name}:{number}", problem=f"not JSON: {error}")


def _csv(path: Path) -> Iterator[Any]:
    # The default limit of 128 KiB per field would end the build at one long caption.
    csv.field_size_limit(_MAX_LINE)
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        reader = csv.DictReader(file)
        while True:
            try:
                row = next(reader, None)
            except csv.Error as error:
                yield Item(source=f"{path.name}:{reader.line_num}", problem=f"not CSV: {error}")
                continue
            if row is None:
                return
            yield row


def _parquet(path: Path) -> Iterator[Any]:
    try:
        for batch in pq.ParquetFile(path).iter_batches(256):
            yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        yield Item(source=path.name, problem=f"not readable from here on: {error}")


_READERS: dict[str, Callable[[Path], Iterator[Any]]] = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}


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


def _tar(path: Path, columns: Columns) -> Iterator[Item]:
    """Webdataset shards: consecutive members with one key, which is the path up to the first dot of the file name."""
    try:
        for key, members in itertools.groupby(_members(path), key=lambda member: member[0]):
            yield _from_members(f"{path.name}:{key}", {kind: data for _, kind, data in members}, columns)
    except (tarfile.TarError, OSError, EOFError) as error:
        yield Item(source=path.name, problem=f"the shard is damaged from here on: {error}")


def _members(path: Path) -> Iterator[tuple[str, str, bytes]]:
    """Yield (key, kind, data) of files. They are read, never extracted: a name like ../../x is only a key."""
    with tarfile.open(path, "r:") as tar:
        while (member := tar.next()) is not None:
            # tarfile keeps every member it has read; a shard may have millions.
            tar.members = []  # type: ignore[attr-defined]
            if not member.isreg():
                continue
            folder, slash, name = member.name.rpartition("/")
            stem, _, kind = name.partition(".")
            if member.size > MAX_BYTES:
                yield folder + slash + stem, "problem", f"{member.name} has {member.size} bytes".encode()
                continue
            file = tar.extractfile(member)
            yield folder + slash + stem, kind.lower(), b"" if file is None else file.read()


def _from_members(source: str, parts: dict[str, bytes], columns: Columns) -> Item:
    if "problem" in parts:
        return Item(source=source, problem=parts["problem"].decode())
    image = next((parts[kind[1:]] for kind in IMAGE_TYPES if kind[1:] in parts), None)
    try:
        meta = json.loads(parts["json"]) if "json" in parts else {}
        meta = meta if isinstance(meta, dict) else {}
        caption = parts["txt"].decode() if "txt" in parts else meta.get(columns.caption)
    except (ValueError, RecursionError) as error:
        return Item(source=source, problem=f"no caption: {error}")
    if image is None or caption is None:
        return Item(source=source, problem=f"no {'image' if image is None else 'caption'} among {', '.join(parts)}")
    extra = columns.extra(meta, {columns.caption, "source"})
    caption = caption.strip() if isinstance(caption, str) else caption
    return Item(caption, image, str(meta.get("source", source)), extra)
