"""Sources of pairs: folders, tables, tar shards and iterables, as one stream of items."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from ragturbo.errors import InvalidRequest
from ragturbo.messages import short
from ragturbo.retrieval import tables, tar_shards
from ragturbo.retrieval.image_folder import ImageFolder
from ragturbo.retrieval.items import IMAGE_TYPES, Columns, Item, check_caption, check_place, kind_of
from ragturbo.retrieval.pairs import OWN_COLUMNS
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
    """Open a folder, a .jsonl/.csv/.parquet/.tar file or pattern, a list of files, or an iterable of tuples.

    Raises:
        InvalidRequest: there is no such input, or an option that has no effect on it.
    """
    source = _opened(pairs, columns)
    return replace(source, items=lambda notes=None, /: _noting_lost(source.items(notes), notes))


def _opened(pairs: Any, columns: Columns) -> Source:
    if isinstance(pairs, (str, os.PathLike)):
        _check_name(pairs)
        path = Path(pairs).expanduser()
        if path.is_dir():
            shards = sorted(path.glob("*.tar"))
            has_images = any(entry.suffix.lower() in IMAGE_TYPES for entry in path.iterdir())
            if shards and not has_images:
                return _files(shards, columns)
            columns.refuse("a folder of images")
            return _folder(path)
        if any(mark in path.name for mark in "*?["):
            files = sorted(path.parent.glob(path.name))
            if not files:
                raise InvalidRequest(f"{path}: no file matches")
            return _files(files, columns)
        if not path.is_file():
            raise InvalidRequest(f"{path}: no such file or folder")
        return _files([path], columns)
    if isinstance(pairs, (list, tuple)) and pairs and all(isinstance(p, (str, os.PathLike)) for p in pairs):
        for name in pairs:
            _check_name(name)
        return _files([Path(p).expanduser() for p in pairs], columns)
    if isinstance(pairs, Iterable) and not isinstance(pairs, (Mapping, bytes)):
        columns.refuse("pairs of caption and image")
        total = len(pairs) if isinstance(pairs, Sized) else None
        return Source({"kind": "iterable"}, total, lambda notes=None, /: map(from_tuple, iter(pairs)))
    raise InvalidRequest(f"pairs={short(pairs)} is neither a path nor an iterable of (caption, image)", option="pairs")


def _check_name(path: str | os.PathLike[str]) -> None:
    # Path("") is the current folder.
    if not os.fspath(path):
        raise InvalidRequest("the name of the input is empty; the current folder is '.'", option="pairs")


def _noting_lost(items: Iterator[Item], notes: Notes | None) -> Iterator[Item]:
    """Pass items on and note the user's columns whose names the database uses itself."""
    noted: set[str] = set()
    for item in items:
        # A table with both is the export of a database.
        if notes is not None and not {"id", "sha256"} <= item.extra.keys():
            for name in sorted(OWN_COLUMNS & item.extra.keys() - noted):
                notes.add("own_name", name)
                noted.add(name)
        yield item


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
        return Item(problem=f"not (caption, image) or (caption, image, metadata) but {kind_of(entry)}")
    extra = entry[2] if len(entry) == 3 else None
    if extra is not None and not isinstance(extra, Mapping):
        return Item(problem=f"the metadata is {kind_of(extra)}, not a dictionary")
    if isinstance(entry[1], str) and not isinstance(entry[0], str):
        return Item(problem=f"the order is (caption, image), not ({kind_of(entry[0])}, a text)")
    if isinstance(entry[1], str) and (problem := check_place(entry[1])):
        return Item(source=entry[1] or None, problem=problem)
    meta = {str(name): value for name, value in (extra or {}).items()}
    path = str(entry[1]) if isinstance(entry[1], (str, os.PathLike)) else None
    source = meta.pop("source", path)
    return Item(entry[0], entry[1], None if source is None else str(source), meta)


def _folder(path: Path) -> Source:
    folder = ImageFolder(path)
    return Source({"kind": "folder", "items": len(folder.images)}, len(folder.images), folder.items)


def _files(files: Sequence[Path], columns: Columns) -> Source:
    kinds = {path.suffix.lower() for path in files}
    for path in files:
        if path.is_dir():
            raise InvalidRequest(f"give one folder, or files of one kind: {path} is a folder")
        if not path.is_file():
            raise InvalidRequest(f"{path}: no such file")
    if kinds & set(IMAGE_TYPES):
        raise InvalidRequest(
            "an image file needs a caption: give [(caption, image), …]. On the command line, only `ragturbo db append` "
            "takes image files, with one --caption each; --create makes the database"
        )
    if ".tar" in kinds and kinds != {".tar"}:
        raise InvalidRequest(f"give one folder, or files of one kind, not {' and '.join(sorted(kinds))}")
    if kinds != {".tar"} and (unknown := kinds - set(tables.READERS)):
        names = ", ".join(kind or "a file without an extension" for kind in sorted(unknown))
        raise InvalidRequest(f"{names} is not supported; use .jsonl, .csv, .parquet or .tar")
    if kinds == {".tar"}:
        columns.refuse(".tar shards", ("image", "image_root"))
    else:
        tables.check(files, columns)
    total = sum(map(tables.rows, files)) if kinds == {".parquet"} else None

    def items(notes: Notes | None = None, /) -> Iterator[Item]:
        for path in files:
            yield from tar_shards.items(path, columns) if kinds == {".tar"} else tables.items(path, columns, notes)

    description = {"kind": "tar" if kinds == {".tar"} else "table", "caption": columns.caption, "image": columns.image,
                   "files": [[path.name, path.stat().st_size] for path in files]}  # fmt: skip
    return Source(description, total, items)
