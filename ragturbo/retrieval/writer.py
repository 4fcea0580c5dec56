"""Commits: a crash at any moment leaves the old generation or the new one, never a mixture.

Segments are written first (see `jobs`), then a generation folder, and last CURRENT, by rename. This module imports
neither torch nor diffusers.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ragturbo.errors import DatabaseCorrupt, DatabaseError, DatabaseMismatch, InvalidRequest
from ragturbo.retrieval import durable
from ragturbo.retrieval.format import GENERATION_NAME, Geometry, generation_name
from ragturbo.retrieval.jobs import Finished, Job, SegmentWriter
from ragturbo.retrieval.manifest import Manifest, differences, load
from ragturbo.retrieval.npy import read_ids, write_ids
from ragturbo.retrieval.pairs import Record


def empty_manifest(
    geometry: Geometry, key_kind: str, encoder: dict[str, Any], segment_records: int | None = None
) -> Manifest:
    """Return the manifest of a database without a generation. segment_records: default about 1 GiB, at most 8,192."""
    if segment_records is None:
        segment_records = min(8192, max(64, (1 << 30) // geometry.stride))
    if not 0 < segment_records < 2**31:
        raise InvalidRequest(f"segment_records must be positive, not {segment_records}")
    return Manifest(
        generation=0, geometry=geometry, key_kind=key_kind, key_mean=(0.0,) * geometry.key_dim,
        encoder=json.loads(json.dumps(encoder)), segment_records=segment_records, rows=0, removed=0, next_id=0,
        next_segment=0, segments=(), files={},
    )  # fmt: skip


def prepare(folder: Path) -> None:
    """Create the folders of a database."""
    try:
        (folder / "segments").mkdir(parents=True, exist_ok=True)
    except FileNotFoundError as error:
        raise DatabaseError(f"{folder} cannot be made: no folder can be made there") from error
    except OSError as error:
        raise DatabaseError(f"{folder} cannot be made: {error.strerror or error}") from error


def check_writable(folder: Path) -> None:
    """Raise DatabaseError if nothing can be written in `folder`, which need not exist. Nothing is written."""
    there = folder.absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise DatabaseError(f"{folder} cannot be made: {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise DatabaseError(f"{folder} cannot be written: no permission to write in {there}")


def check_new(folder: Path) -> None:
    """Raise DatabaseError if a new database at `folder` would be among files of something else."""
    if folder.is_dir() and not (folder / "segments").is_dir():
        with durable.naming(folder, "reading"):
            held = next((path.name for path in folder.iterdir()), None)
        if held is not None:
            raise DatabaseError(f"{folder} is no database and not empty (it holds {held}); choose another folder")


def commit(folder: Path, manifest: Manifest, removed: np.ndarray, index: Path | None = None) -> Manifest:
    """Make `manifest` the current generation.

    Args:
        removed: (n,) int64 ids, ascending.
        index: folder of the index files that the manifest names.
    """
    name = generation_name(manifest.generation)
    final, draft = folder / name, folder / f"{name}.part"
    for leftover in (draft, final):
        # Written by a process that was killed before it changed CURRENT.
        if leftover.exists():
            durable.remove_tree(leftover)
    with durable.naming(draft, "creating"):
        draft.mkdir()
    total = durable.write_file(draft / "removed.npy", write_ids(removed))
    if manifest.index is not None:
        assert index is not None
        with durable.naming(draft, "creating"):
            (draft / manifest.index.kind).mkdir()
        for file in manifest.index.files:
            durable.link_or_copy(index / file, draft / manifest.index.kind / file)
        durable.sync_folder(draft / manifest.index.kind)
    manifest = replace(manifest, files={"removed.npy": total}, removed=len(removed))
    text = manifest.to_json()
    durable.write_file(draft / "manifest.json", text)
    durable.sync_folder(draft)
    with durable.naming(final, "renaming"):
        draft.rename(final)
    durable.sync_folder(folder)
    digest = hashlib.sha256(text).hexdigest()
    durable.write_file(folder / "CURRENT", f"{name} {digest}\n".encode())
    durable.sync_folder(folder)
    return manifest


def clean(folder: Path, manifest: Manifest, keep_previous: bool = True) -> None:
    """Delete unused generations and segments. The previous generation is kept for readers that are opening it."""
    kept = {generation_name(manifest.generation)}
    if keep_previous:
        kept.add(generation_name(manifest.generation - 1))
    for path in sorted(folder.iterdir()):
        if path.is_dir() and GENERATION_NAME.fullmatch(path.name.removesuffix(".part")) and path.name not in kept:
            durable.remove_tree(path)
    with contextlib.suppress(FileNotFoundError):
        (folder / "CURRENT.part").unlink()
    Job(folder, manifest, {"cleaning": True}).clear()


def joined(base: Manifest, done: Sequence[Finished], next_id: int, job: str = "") -> Manifest:
    """Return the generation after `base`, with the segments `done` appended."""
    entries = tuple(part.entry for part in done if part.entry.count)
    rows = base.rows + sum(entry.count for entry in entries)
    key_sum = np.array(base.key_mean, np.float64) * base.rows
    for part in done:
        key_sum = key_sum + part.key_sum
    return base.evolved(
        segments=base.segments + entries, rows=rows, next_id=next_id, job=job,
        next_segment=max([base.next_segment, *(part.entry.number + 1 for part in done)]),
        key_mean=tuple(float(v) for v in key_sum / max(rows, 1)),
    )  # fmt: skip


def removed_ids(folder: Path, manifest: Manifest) -> np.ndarray:
    """Return the removed ids of a generation, ascending."""
    if not manifest.generation:
        return np.empty(0, np.int64)
    path = folder / manifest.generation_folder / "removed.npy"
    with durable.naming(path, "reading"):
        raw = path.read_bytes()
    expected = manifest.files["removed.npy"]
    if len(raw) != expected.bytes or zlib.crc32(raw) != expected.crc32:
        raise DatabaseCorrupt(f"{path}: its size or CRC-32 is not that of the manifest")
    try:
        removed = read_ids(raw)
    except ValueError as error:
        raise DatabaseCorrupt(f"{path}: not an array of ids: {error}") from error
    if removed.shape != (manifest.removed,) or np.any(np.diff(removed) <= 0):
        raise DatabaseCorrupt(f"{path}: must be {manifest.removed} ascending int64 ids")
    return removed


def index_folder(folder: Path, manifest: Manifest) -> Path | None:
    return None if manifest.index is None else folder / manifest.generation_folder / manifest.index.kind


Batch = tuple[Sequence[Record], np.ndarray, np.ndarray]


def write_encoded(folder: Path, start: Manifest, batches: Iterable[Batch], *, patience: float = 2.0) -> Manifest:
    """Add pairs that are already encoded. They get new ids; those of the records are ignored.

    Args:
        start: manifest of the new database; an existing one must have its geometry, key kind and encoder.
        batches: (records, keys (n, K), features (n, T, C)).
        patience: seconds to wait for another writer.
    """
    prepare(folder)
    with durable.writer_lock(folder, patience=patience):
        base = load(folder) if (folder / "CURRENT").exists() else start
        if found := differences(base, start.geometry, start.key_kind, start.encoder):
            built, given = (", ".join(texts) for texts in zip(*found, strict=True))
            raise DatabaseMismatch(f"{folder} was built with {built}; the pairs have {given}")
        job = Job(folder, base, {"encoded": True})
        # An earlier run may have had other batches, so nothing is resumed.
        job.clear(resume=False)
        done: list[Finished] = []
        next_id = base.next_id
        for group in _split(batches, base.segment_records):

            def fill(writer: SegmentWriter, group: list[Batch] = group, first: int = next_id) -> None:
                for records, keys, features in group:
                    numbered = [replace(record, id=first + i) for i, record in enumerate(records)]
                    writer.add(numbered, keys, features)
                    first += len(records)

            done.append(job.write(base.next_segment + len(done), fill))
            next_id += sum(len(records) for records, _, _ in group)
        manifest = joined(base, done, next_id)
        manifest = commit(folder, manifest, removed_ids(folder, base), index_folder(folder, base))
        clean(folder, manifest)
        return manifest


def _split(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    """Group batches into segments of `size` pairs; a batch may be split between two segments."""
    group: list[Batch] = []
    room = size
    for records, keys, features in batches:
        at = 0
        while at < len(records):
            n = min(room, len(records) - at)
            group.append((records[at : at + n], keys[at : at + n], features[at : at + n]))
            at, room = at + n, room - n
            if not room:
                yield group
                group, room = [], size
    if group:
        yield group


def remove(folder: Path, ids: np.ndarray, base: Manifest, stored: np.ndarray) -> Manifest:
    """Mark `ids` as removed. The caller must hold the lock. stored: all ids of `base`."""
    ids = np.unique(np.asarray(ids, np.int64))
    unknown = ids[~np.isin(ids, stored)]
    if len(unknown):
        named = ", ".join(map(str, unknown[:5].tolist())) + (", …" if len(unknown) > 5 else "")
        one = len(unknown) == 1
        raise InvalidRequest(
            f"{'id' if one else 'ids'} {named} {'is' if one else 'are'} not in this database; nothing was removed",
            option="ids",
        )
    removed = np.union1d(removed_ids(folder, base), ids)
    manifest = commit(folder, base.evolved(), removed, index_folder(folder, base))
    clean(folder, manifest)
    return manifest
