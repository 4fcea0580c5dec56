"""Changing a database so that a crash at any moment leaves the old generation or the new one, never a mixture.

Segments are written first, each whole or not at all; then a generation folder beside the others; last CURRENT, by
rename. A sidecar (`segments/000007.json`) marks a whole segment of work that is not committed yet: work of the same
name resumes after it. Neither torch nor diffusers is imported here.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ragturbo.errors import DatabaseCorrupt, DatabaseError, DatabaseMismatch, InvalidRequest
from ragturbo.retrieval import durable, pairs
from ragturbo.retrieval.format import (
    Geometry,
    encode_keys,
    encode_rows,
    generation_name,
    pack_footer,
    pack_header,
    segment_name,
)
from ragturbo.retrieval.manifest import (
    Manifest,
    SegmentEntry,
    encoder_digest,
    is_generation,
    is_segment_file,
    load,
    segment_from_json,
    segment_path,
)
from ragturbo.retrieval.pairs import Record
from ragturbo.retrieval.segments import read_tables

log = logging.getLogger("ragturbo")


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


class SegmentWriter:
    """One segment on its way to disk. Nothing of it exists under its name until `finish`."""

    def __init__(self, folder: Path, geometry: Geometry, number: int, digest: bytes) -> None:
        self._folder, self.geometry, self.number = folder, geometry, number
        header = pack_header(geometry, number, digest)
        self._header_crc = int.from_bytes(header[-4:], "little")
        self._file = durable.NewFile(self._path("hseg"))
        self._ids: list[int] = []
        self._crcs: list[int] = []
        self._keys: list[np.ndarray] = []
        self._records: list[Record] = []
        try:
            self._file.write(header)
        except BaseException:
            self.discard()
            raise

    def _path(self, kind: str) -> Path:
        return self._folder / "segments" / f"{segment_name(self.number)}.{kind}"

    def __len__(self) -> int:
        return len(self._ids)

    def add(self, records: Sequence[Record], keys: np.ndarray, features: np.ndarray) -> None:
        """records (n), keys (n, K) float, features (n, T, C) float."""
        self.add_encoded(
            records, encode_keys(keys, self.geometry.key_dim), encode_rows(features, self.geometry)
        )  # fmt: skip

    def add_encoded(self, records: Sequence[Record], keys: np.ndarray, rows: np.ndarray) -> None:
        """keys (n, K) float16 normalised, rows (n, stride) uint8: the bytes as they are stored."""
        if not len(records) == len(keys) == len(rows):
            raise InvalidRequest(f"{len(records)} records, {len(keys)} keys and {len(rows)} features do not pair up")
        payload = self.geometry.record_bytes
        for record, row in zip(records, rows, strict=True):
            if self._ids and record.id <= self._ids[-1]:
                raise InvalidRequest(f"id {record.id} does not follow {self._ids[-1]}")
            self._ids.append(record.id)
            self._crcs.append(durable.zlib.crc32(row[:payload]))
        self._file.write(np.ascontiguousarray(rows).reshape(-1).data)
        self._keys.append(np.ascontiguousarray(keys, "<f2"))
        self._records.extend(records)

    def finish(self) -> tuple[SegmentEntry, np.ndarray]:
        """Syncs the segment's files and gives them their names. Returns its entry and the fp64 sum of its keys."""
        keys = np.concatenate(self._keys or [np.empty((0, self.geometry.key_dim), "<f2")])
        try:
            footer, trailer_crc = pack_footer(
                np.array(self._ids, np.int64), np.array(self._crcs, np.uint32), self.geometry, self._header_crc
            )
            self._file.write(footer)
            sums = {
                "hseg": self._file.finish(),
                "keys": durable.write_file(self._path("keys"), keys.tobytes()),
                "parquet": durable.write_file(self._path("parquet"), pairs.encode(self._records)),
            }
        except BaseException:
            self.discard()
            raise
        durable.sync_folder(self._folder / "segments")
        ids = self._ids or [0]
        entry = SegmentEntry(self.number, len(self._ids), ids[0], ids[-1], trailer_crc, sums)
        return entry, keys.astype(np.float64).sum(axis=0)

    def discard(self) -> None:
        self._file.discard()


@dataclass
class Finished:
    """A whole segment that waits for its commit; `notes` is what the work wants back after a restart."""

    entry: SegmentEntry
    key_sum: np.ndarray
    notes: dict[str, Any] = field(default_factory=dict)


class Job:
    """A change that writes segments `base.next_segment`, … and commits them at once, named by what it would write."""

    def __init__(self, folder: Path, base: Manifest, spec: dict[str, Any]) -> None:
        self.folder, self.base = folder, base
        identity = [base.generation, encoder_digest(base.encoder, base.key_kind).hex(), asdict(base.geometry),
                    base.segment_records, spec]  # fmt: skip
        self.name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    def _sidecar(self, number: int) -> Path:
        return self.folder / "segments" / f"{segment_name(number)}.json"

    def finished(self, number: int) -> Finished | None:
        """The segment, if an earlier run of this same job wrote it whole."""
        path = self._sidecar(number)
        try:
            raw = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise DatabaseError(f"{path}: reading failed: {error.strerror}") from error
        try:
            body = _unseal(raw, path)
            if body["job"] != self.name:
                return None
            entry = segment_from_json(body["entry"], str(path))
            read_tables(self.folder, self._probe(entry), entry)
            for kind in ("keys", "parquet"):
                size = segment_path(self.folder, entry, kind).stat().st_size
                if size != entry.files[kind].bytes:
                    return None
            key_sum = np.frombuffer(base64.b64decode(body["key_sum"]), "<f8")
            return Finished(entry, key_sum, body["notes"])
        except (DatabaseCorrupt, KeyError, TypeError, ValueError, OSError) as error:
            # A damaged leftover is not a damaged database: write that segment again.
            log.warning("%s: leftover of an earlier run is not whole (%s); writing it again", path, error)
            return None

    def _probe(self, entry: SegmentEntry) -> Manifest:
        return replace(self.base, segments=(entry,))

    def write(self, number: int, fill: Callable[[SegmentWriter], dict[str, Any] | None]) -> Finished:
        """Writes one segment through `fill`, which returns notes, and marks it whole."""
        writer = SegmentWriter(self.folder, self.base.geometry, number, self.base.encoder_digest)
        try:
            notes = fill(writer) or {}
            entry, key_sum = writer.finish()
        except BaseException:
            writer.discard()
            raise
        body = {
            "job": self.name, "entry": asdict(entry), "notes": notes,
            "key_sum": base64.b64encode(key_sum.astype("<f8").tobytes()).decode(),
        }  # fmt: skip
        durable.write_file(self._sidecar(number), _seal(body))
        durable.sync_folder(self.folder / "segments")
        return Finished(entry, key_sum, notes)

    def unfinished_others(self) -> list[str]:
        """Names of whole segments that another job left here."""
        found = []
        for path in sorted((self.folder / "segments").glob("*.json")):
            with contextlib.suppress(DatabaseCorrupt, OSError):
                if _unseal(path.read_bytes(), path).get("job") != self.name:
                    found.append(path.stem)
        return found

    def forget(self, mine: Callable[[int], bool] = lambda number: True) -> None:
        """Takes the marks off segments that wait for a commit: they are written again, whoever wrote them."""
        for path in (self.folder / "segments").glob("*.json"):
            if path.stem.isdigit() and mine(int(path.stem)):
                with durable.naming(path, "deleting"):
                    path.unlink()

    def clear(self, mine: Callable[[int], bool] = lambda number: True) -> None:
        """Deletes what no generation and no run of this job needs, among the segment numbers that are `mine`."""
        used = {entry.number for entry in self.base.segments}
        keep = set(used)
        for path in (self.folder / "segments").glob("*.json"):
            if path.stem.isdigit() and int(path.stem) not in used and self.finished(int(path.stem)):
                keep.add(int(path.stem))
        for path in sorted((self.folder / "segments").iterdir()):
            stem = path.name.split(".")[0]
            if not stem.isdigit() or not mine(int(stem)):
                continue
            number, part = int(stem), path.name.endswith(".part")
            committed_sidecar = number in used and path.suffix == ".json"
            if part or committed_sidecar or (number not in keep and is_segment_file(path.name)):
                with durable.naming(path, "deleting"):
                    path.unlink(missing_ok=True)


def _seal(body: dict[str, Any]) -> bytes:
    text = json.dumps(body, sort_keys=True)
    return f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}\n".encode()


def _unseal(raw: bytes, path: Path) -> dict[str, Any]:
    digest, _, text = raw.partition(b"\n")
    text = text.removesuffix(b"\n")
    if hashlib.sha256(text).hexdigest().encode() != digest:
        raise DatabaseCorrupt(f"{path}: its SHA-256 does not match its text")
    body = json.loads(text)
    if not isinstance(body, dict):
        raise DatabaseCorrupt(f"{path}: not a JSON object")
    return body


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
    if len(raw) != expected.bytes or durable.zlib.crc32(raw) != expected.crc32:
        raise DatabaseCorrupt(f"{path}: its size or CRC-32 is not the manifest's")
    try:
        removed = np.load(io.BytesIO(raw), allow_pickle=False)
    except (ValueError, EOFError, SyntaxError, TypeError) as error:
        raise DatabaseCorrupt(f"{path}: not an array of ids: {error}") from error
    if removed.dtype != np.int64 or removed.shape != (manifest.removed,) or np.any(np.diff(removed) <= 0):
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
