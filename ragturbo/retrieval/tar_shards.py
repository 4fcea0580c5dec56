"""Webdataset shards: consecutive members of a .tar file with one key, as items."""

from __future__ import annotations

import itertools
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

from ragturbo.retrieval.images import MAX_BYTES
from ragturbo.retrieval.items import IMAGE_TYPES, Columns, Item


def items(path: Path, columns: Columns) -> Iterator[Item]:
    """A key is the path up to the first dot of the file name."""
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
        caption = parts["txt"].decode("utf-8-sig") if "txt" in parts else meta.get(columns.caption)
    except (ValueError, RecursionError) as error:
        return Item(source=source, problem=f"no caption: {error}")
    if image is None or caption is None:
        return Item(source=source, problem=f"no {'image' if image is None else 'caption'} among {', '.join(parts)}")
    extra = columns.extra(meta, {columns.caption, "source"})
    caption = caption.strip() if isinstance(caption, str) else caption
    return Item(caption, image, str(meta.get("source", source)), extra)
