"""Proving a database: every file against the manifest's sums, every record against its checksum."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from ragturbo.errors import DatabaseCorrupt, DatabaseError, InvalidRequest
from ragturbo.retrieval import durable, scann, writer
from ragturbo.retrieval.manifest import SEGMENT_FILES, load, segment_path
from ragturbo.retrieval.segments import read_tables
from ragturbo.retrieval.snapshot import Snapshot

_BATCH = 256


def problems(snapshot: Snapshot, level: str, on_file: Callable[[str], None] | None = None) -> Iterator[str]:
    """Everything that is wrong, one line each. "quick" rereads manifest, tables, tombstones and index."""
    if level not in ("quick", "full"):
        raise InvalidRequest(f"verify={level!r} must be 'quick' or 'full'")
    folder, manifest = snapshot.folder, snapshot.manifest
    try:
        if load(folder).generation == manifest.generation:
            writer.removed_ids(folder, manifest)
    except DatabaseError as error:
        yield str(error)
    for entry in manifest.segments:
        if on_file:
            on_file(entry.name)
        try:
            read_tables(folder, manifest, entry)
        except DatabaseError as error:
            yield str(error)
        if level == "full":
            for kind in SEGMENT_FILES:
                path = segment_path(folder, entry, kind)
                try:
                    found = durable.sum_file(path)
                    if found != entry.files[kind]:
                        yield f"{path}: {found}, the manifest says {entry.files[kind]}"
                except DatabaseError as error:
                    yield str(error)
    if level == "full":
        yield from _records(snapshot)
    if manifest.index is not None:
        index = folder / f"gen-{manifest.generation:06d}" / manifest.index.kind
        try:
            scann.check_files(index, manifest.index)
        except DatabaseError as error:
            yield str(error)


def _records(snapshot: Snapshot) -> Iterator[str]:
    """Record by record, so that damage is named by id, and the pairs of every segment."""
    segments = snapshot.segments
    for start in range(0, len(snapshot.ids), _BATCH):
        rows = np.arange(start, min(start + _BATCH, len(snapshot.ids)))
        try:
            segments.read(rows)
        except DatabaseError:
            for row in rows:
                try:
                    segments.read(np.array([row]))
                except DatabaseError as error:
                    yield str(error)
    for pairs in segments.pairs:
        try:
            pairs.check()
        except DatabaseError as error:
            yield str(error)


def refuse(folder: Path, found: Iterator[str]) -> None:
    lines = list(found)
    if lines:
        more = f"; and {len(lines) - 8} more" if len(lines) > 8 else ""
        raise DatabaseCorrupt(f"{folder} is damaged: " + "; ".join(lines[:8]) + more)
