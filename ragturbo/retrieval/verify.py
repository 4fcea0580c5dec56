"""Verification: every file against the sums of the manifest, every record against its checksum."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ragturbo.errors import DatabaseCorrupt, DatabaseError, InvalidRequest
from ragturbo.retrieval import durable, scann, writer
from ragturbo.retrieval.manifest import SEGMENT_FILES, SegmentEntry, load, segment_path
from ragturbo.retrieval.segments import read_tables
from ragturbo.retrieval.snapshot import Snapshot

_BATCH = 256


def problems(snapshot: Snapshot, level: str, on_file: Callable[[str], None] | None = None) -> Iterator[str]:
    """Yield one line for each problem.

    Args:
        level: "quick" reads the manifest, tables, removed ids and index; "full" reads every byte.
        on_file: called with the name of each segment.
    """
    if level not in ("quick", "full"):
        raise InvalidRequest(f"verify={level!r} must be 'quick' or 'full'")
    folder, manifest = snapshot.folder, snapshot.manifest

    def removed_ids() -> None:
        if load(folder).generation == manifest.generation:
            writer.removed_ids(folder, manifest)

    yield from _problem(removed_ids)
    for entry in manifest.segments:
        if on_file:
            on_file(entry.name)
        yield from _problem(read_tables, folder, manifest, entry)
        if level == "full":
            for kind in SEGMENT_FILES:
                yield from _problem(_check_sum, folder, entry, kind)
    if level == "full":
        yield from _records(snapshot)
    index = writer.index_folder(folder, manifest)
    if index is not None and manifest.index is not None:
        yield from _problem(scann.check_files, index, manifest.index)


def _problem(check: Callable[..., object], *arguments: Any) -> Iterator[str]:
    try:
        check(*arguments)
    except DatabaseError as error:
        yield str(error)


def _check_sum(folder: Path, entry: SegmentEntry, kind: str) -> None:
    path = segment_path(folder, entry.number, kind)
    found = durable.sum_file(path)
    if found != entry.files[kind]:
        raise DatabaseCorrupt(f"{path}: {_sums(found)}, the manifest says {_sums(entry.files[kind])}")


def _sums(file: durable.FileSum) -> str:
    return f"{file.bytes} bytes with SHA-256 {file.sha256[:12]}…"


def _records(snapshot: Snapshot) -> Iterator[str]:
    """Read every record; those of a batch with damage one by one, so that each damaged id is named."""
    segments = snapshot.segments
    for start in range(0, len(snapshot.ids), _BATCH):
        rows = np.arange(start, min(start + _BATCH, len(snapshot.ids)))
        if any(True for _ in _problem(segments.read, rows)):
            for row in rows:
                yield from _problem(segments.read, np.array([row]))
    for pairs in segments.pairs:
        yield from _problem(pairs.check)
