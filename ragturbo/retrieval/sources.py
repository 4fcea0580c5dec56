"""Sources of pairs: folders, tables, tar shards and iterables, as one stream of items."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ragturbo.errors import InvalidRequest
from ragturbo.messages import short
from ragturbo.retrieval import tables, tar_shards
from ragturbo.retrieval.image_folder import ImageFolder
from ragturbo.retrieval.items import IMAGE_TYPES, Columns, Item, check_caption
from ragturbo.retrieval.report import Notes, none_stored

__all__ = ["Columns", "Item", "Source", "check_caption", "check_source", "from_tuple", "open_source"]

# Items that `check_source` looks at.
_LOOK = 100


class Stream(Protocol):
    def __call__(self, notes: Notes | None = None, /) -> Iterator[Item]:
        """Yield the items in order. `notes` gets what is worth knowing about the input and is no item."""
        ...


@dataclass(frozen=True)
class Source:
    """`description` identifies the input; `total` is the number of items, if known."""

    description: dict[str, Any]
    total: int | None
    items: Stream


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
    if isinstance(pairs, Iterable) and not isinstance(pairs, (Mapping, bytes)):
        total = len(pairs) if isinstance(pairs, Sized) else None
        return Source({"kind": "iterable"}, total, lambda notes=None, /: map(from_tuple, iter(pairs)))
    raise InvalidRequest(f"pairs={short(pairs)} is neither a path nor an iterable of (caption, image)", option="pairs")


def check_source(source: Source) -> None:
    """Raise InvalidRequest if no pair of the input can be stored, as far as its first items show without a model."""
    if source.description["kind"] == "iterable":
        # It may be readable only once.
        if source.total == 0:
            raise InvalidRequest(none_stored(0, None), option="pairs")
        return
    first: dict[str, Any] | None = None
    count, columns_missing, notes = 0, True, Notes()
    for item in itertools.islice(source.items(notes), _LOOK):
        problem = item.problem or check_caption(item.caption) or _missing(item.image)
        if problem is None:
            return
        columns_missing &= problem.startswith("no column")
        first = first or {"item": count, "source": item.source, "reason": problem}
        count += 1
    if count < _LOOK or columns_missing:
        hint = " (caption= and image= name the columns)" if first and columns_missing else ""
        if (long := notes.to_dict().get("long_row")) is not None:
            hint += f". {long['examples'][0]}: a caption with a comma needs quotes"
        raise InvalidRequest(none_stored(count, first) + hint, option="pairs")


def _missing(image: Any) -> str | None:
    if isinstance(image, (str, os.PathLike)) and not os.path.exists(image):
        return f"the image cannot be read: {image}: No such file or directory"
    return None


def from_tuple(entry: Any) -> Item:
    """(caption, image) or (caption, image, metadata) -> an Item, whose source is the metadata's or the image's path."""
    if not isinstance(entry, (tuple, list)) or len(entry) not in (2, 3):
        return Item(problem=f"not (caption, image) or (caption, image, metadata) but {type(entry).__name__}")
    extra = entry[2] if len(entry) == 3 else None
    if extra is not None and not isinstance(extra, Mapping):
        return Item(problem=f"metadata is {type(extra).__name__}, not a mapping")
    if isinstance(entry[1], str) and not isinstance(entry[0], str):
        return Item(problem=f"the order is (caption, image), not ({type(entry[0]).__name__}, text)")
    meta = {str(name): value for name, value in (extra or {}).items()}
    path = str(entry[1]) if isinstance(entry[1], (str, os.PathLike)) else None
    source = meta.pop("source", path)
    return Item(entry[0], entry[1], None if source is None else str(source), meta)


def _folder(path: Path) -> Source:
    folder = ImageFolder(path)
    return Source({"kind": "folder", "items": len(folder.images)}, len(folder.images), folder.items)


def _files(files: Sequence[Path], columns: Columns) -> Source:
    kinds = {path.suffix.lower() for path in files}
    if kinds & set(IMAGE_TYPES):
        raise InvalidRequest(
            "an image file needs a caption: give [(caption, image), …], or --caption on the command line"
        )
    for path in files:
        if not path.is_file():
            raise InvalidRequest(f"{path}: no such file")
    if kinds != {".tar"} and (unknown := kinds - set(tables.READERS)):
        names = ", ".join(kind or "a file without an extension" for kind in sorted(unknown))
        raise InvalidRequest(f"{names} is not supported; use .jsonl, .csv, .parquet or .tar")
    for path in files:
        if path.suffix.lower() in (".jsonl", ".csv"):
            tables.check_encoding(path)
    total = sum(map(tables.rows, files)) if kinds == {".parquet"} else None

    def items(notes: Notes | None = None, /) -> Iterator[Item]:
        for path in files:
            yield from tar_shards.items(path, columns) if kinds == {".tar"} else tables.items(path, columns, notes)

    description = {"kind": "tar" if kinds == {".tar"} else "table", "caption": columns.caption, "image": columns.image,
                   "files": [[path.name, path.stat().st_size] for path in files]}  # fmt: skip
    return Source(description, total, items)
