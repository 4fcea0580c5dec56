"""Changing a database so that a crash at any moment leaves the old generation or the new one, never a mixture.

Segments are written first (see `jobs`); then a generation folder beside the others; last CURRENT, by rename. Neither
torch nor diffusers is imported here.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ragturbo.errors import DatabaseCorrupt, DatabaseMismatch, InvalidRequest
from ragturbo.retrieval import durable
from ragturbo.retrieval.format import Geometry, generation_name
from ragturbo.retrieval.jobs import Finished, Job, SegmentWriter
from ragturbo.retrieval.manifest import Manifest, is_generation, load
from ragturbo.retrieval.npy import read_ids
from ragturbo.retrieval.pairs import Record


def default_segment_records(geometry: Geometry) -> int:
    """About 1 GiB a segment: what a killed build has to repeat at most, and few enough files for millions of pairs."""
    return int(min(8192, max(64, (1 << 30) // geometry.stride)))


def empty_manifest(
    geometry: Geometry, key_kind: str, encoder: dict[str, Any], segment_records: int | None = None
) -> Manifest:
    """What a database is before its first generation."""
    count = default_segment_records(geometry) if segment_records is None else segment_records
    if not 0 < count < 2**31:
        raise InvalidRequest(f"segment_records must be positive, not {count}")
    return Manifest(
        generation=0, geometry=geometry, key_kind=key_kind, key_mean=(0.0,) * geometry.key_dim,
        encoder=json.loads(json.dumps(encoder)), segment_records=count, rows=0, removed=0, next_id=0, next_segment=0,
        segments=(), files={},
    )  # fmt: skip


def prepare(folder: Path) -> None:
    """Makes the folders of a database that is not there yet."""
    with durable.naming(folder, "creating"):
        (folder / "segments").mkdir(parents=True, exist_ok=True)


def commit(folder: Path, manifest: Manifest, removed: np.ndarray, index: Path | None = None) -> Manifest:
    """Makes `manifest` the current generation. removed: (n,) int64 ids, ascending; index: the folder of its files."""
    name = generation_name(manifest.generation)
    final, draft = folder / name, folder / f"{name}.part"
    for leftover in (draft, final):
        # A generation that CURRENT never named: its writer was killed before the last step.
        if leftover.exists():
            durable.remove_tree(leftover)
    with durable.naming(draft, "creating"):
        draft.mkdir()
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(removed, "<i8"), allow_pickle=False)
    total = durable.write_file(draft / "removed.npy", buffer.getvalue())
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
    """Deletes generations and segments that nothing names. The previous one stays for readers about to open it."""
    kept = {generation_name(manifest.generation)}
    if keep_previous:
        kept.add(generation_name(manifest.generation - 1))
    for path in sorted(folder.iterdir()):
        if path.is_dir() and is_generation(path.name.removesuffix(".part")) and path.name not in kept:
            durable.remove_tree(path)
    with contextlib.suppress(FileNotFoundError):
        (folder / "CURRENT.part").unlink()
    Job(folder, manifest, {"cleaning": True}).clear()


def merged_mean(base: Manifest, done: Sequence[Finished]) -> tuple[float, ...]:
    """Mean of all stored keys after `done` joins `base`."""
    rows = base.rows + sum(part.entry.count for part in done)
    total = np.array(base.key_mean, np.float64) * base.rows
    for part in done:
        total = total + part.key_sum
    return tuple(float(v) for v in total / max(rows, 1))


def joined(base: Manifest, done: Sequence[Finished], next_id: int, job: str = "") -> Manifest:
    """The generation after `base` with the segments `done` at its end."""
    entries = tuple(part.entry for part in done if part.entry.count)
    numbers = [part.entry.number + 1 for part in done]
    return base.evolved(
        segments=base.segments + entries, rows=base.rows + sum(entry.count for entry in entries), next_id=next_id,
        next_segment=max([base.next_segment, *numbers]), key_mean=merged_mean(base, done), job=job,
    )  # fmt: skip


def removed_ids(folder: Path, manifest: Manifest) -> np.ndarray:
    """The tombstones of a generation: ids, ascending."""
    path = folder / generation_name(manifest.generation) / "removed.npy"
    with durable.naming(path, "reading"):
        raw = path.read_bytes()
    expected = manifest.files["removed.npy"]
    if len(raw) != expected.bytes or zlib.crc32(raw) != expected.crc32:
        raise DatabaseCorrupt(f"{path}: its size or CRC-32 is not the manifest's")
    try:
        removed = read_ids(raw)
    except ValueError as error:
        raise DatabaseCorrupt(f"{path}: not an array of ids: {error}") from error
    if removed.shape != (manifest.removed,) or np.any(np.diff(removed) <= 0):
        raise DatabaseCorrupt(f"{path}: must be {manifest.removed} ascending int64 ids")
    return removed


def current_or(folder: Path, fallback: Manifest) -> Manifest:
    return load(folder) if (folder / "CURRENT").exists() else fallback


def index_folder(folder: Path, manifest: Manifest) -> Path | None:
    if manifest.index is None:
        return None
    return folder / generation_name(manifest.generation) / manifest.index.kind


Batch = tuple[Sequence[Record], np.ndarray, np.ndarray]


def write_encoded(folder: Path, start: Manifest, batches: Iterator[Batch] | Sequence[Batch]) -> Manifest:
    """Adds pairs whose keys and features are known already; ids are given here, records' own ids are ignored.

    batches: (records, keys (n, K), features (n, T, C)). `start` describes the database where there is none yet.
    """
    prepare(folder)
    with durable.writer_lock(folder):
        base = current_or(folder, start)
        _same_shape(base, start)
        job = Job(folder, base, {"encoded": True})
        # What these batches hold is not known before they are read, so nothing of an earlier run is taken over.
        job.forget()
        job.clear()
        done: list[Finished] = []
        next_id = base.next_id
        for group in _cut(batches, base.segment_records):

            def fill(writer: SegmentWriter, group: list[Batch] = group, first: int = next_id) -> None:
                for records, keys, features in group:
                    numbered = [replace(record, id=first + i) for i, record in enumerate(records)]
                    writer.add(numbered, keys, features)
                    first += len(records)

            done.append(job.write(base.next_segment + len(done), fill))
            next_id += sum(len(records) for records, _, _ in group)
        index = index_folder(folder, base)
        removed = removed_ids(folder, base) if base.generation else np.empty(0, np.int64)
        manifest = commit(folder, joined(base, done, next_id), removed, index)
        clean(folder, manifest)
        return manifest


def _same_shape(base: Manifest, other: Manifest) -> None:
    if base is other:
        return
    for name in ("geometry", "key_kind", "encoder"):
        if getattr(base, name) != getattr(other, name):
            raise DatabaseMismatch(f"the database has {name} {getattr(base, name)}, the pairs {getattr(other, name)}")


def _cut(batches: Iterator[Batch] | Sequence[Batch], size: int) -> Iterator[list[Batch]]:
    """Groups batches into segments of `size` pairs, splitting a batch where a segment ends."""
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


def remove(folder: Path, ids: np.ndarray, base: Manifest, live: np.ndarray) -> Manifest:
    """Tombstones `ids`, under the caller's lock. `live` are all ids stored in `base`."""
    ids = np.unique(np.asarray(ids, np.int64))
    unknown = ids[~np.isin(ids, live)]
    if len(unknown):
        raise InvalidRequest(f"{len(unknown)} ids are not in this database ({int(unknown[0])} …); nothing was removed")
    removed = np.union1d(removed_ids(folder, base), ids)
    manifest = commit(folder, base.evolved(), removed, index_folder(folder, base))
    clean(folder, manifest)
    return manifest
