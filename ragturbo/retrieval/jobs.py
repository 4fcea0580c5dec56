"""Writing segments, one at a time and resumable.

A sidecar (`segments/000007.json`) marks a complete segment of a job that is not committed yet: another run of the same
job takes it over. This module imports neither torch nor diffusers.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import logging
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ragturbo.errors import DatabaseCorrupt, DatabaseError, InvalidRequest
from ragturbo.retrieval import durable, pairs
from ragturbo.retrieval.format import Geometry, encode_keys, encode_rows, pack_footer, pack_header
from ragturbo.retrieval.manifest import SEGMENT_FILES, Manifest, SegmentEntry, segment_path, typed
from ragturbo.retrieval.pairs import Record
from ragturbo.retrieval.segments import read_tables

log = logging.getLogger("ragturbo")


class SegmentWriter:
    """Writes one segment, whose files get their names in `finish`."""

    def __init__(self, folder: Path, geometry: Geometry, number: int, digest: bytes) -> None:
        """digest: of the encoder, see `Manifest.encoder_digest`."""
        self._folder, self.geometry, self.number = folder, geometry, number
        header = pack_header(geometry, number, digest)
        self._header_crc = int.from_bytes(header[-4:], "little")
        self._file = durable.NewFile(segment_path(folder, number, "hseg"))
        self._ids: list[int] = []
        self._crcs: list[int] = []
        self._keys: list[np.ndarray] = []
        self._records: list[Record] = []
        try:
            self._file.write(header)
        except BaseException:
            self.discard()
            raise

    def add(self, records: Sequence[Record], keys: np.ndarray, features: np.ndarray) -> None:
        """records (n), keys (n, K) float, features (n, T, C) float."""
        self.add_encoded(records, encode_keys(keys, self.geometry.key_dim), encode_rows(features, self.geometry))

    def add_encoded(self, records: Sequence[Record], keys: np.ndarray, rows: np.ndarray) -> None:
        """records (n), keys (n, K) float16 normalised, rows (n, stride) uint8: the bytes as they are stored."""
        if not len(records) == len(keys) == len(rows):
            raise InvalidRequest(f"{len(records)} records, {len(keys)} keys and {len(rows)} features do not pair up")
        payload = self.geometry.record_bytes
        for record, row in zip(records, rows, strict=True):
            if self._ids and record.id <= self._ids[-1]:
                raise InvalidRequest(f"id {record.id} does not follow {self._ids[-1]}")
            self._ids.append(record.id)
            self._crcs.append(zlib.crc32(row[:payload]))
        self._file.write(np.ascontiguousarray(rows).reshape(-1).data)
        self._keys.append(np.ascontiguousarray(keys, "<f2"))
        self._records.extend(records)

    def finish(self) -> tuple[SegmentEntry, np.ndarray]:
        """Sync and name the files; `discard` after an error. Return the manifest entry and the fp64 sum of the keys."""
        keys = np.concatenate(self._keys or [np.empty((0, self.geometry.key_dim), "<f2")])
        ids, crcs = np.array(self._ids, np.int64), np.array(self._crcs, np.uint32)
        footer, trailer_crc = pack_footer(ids, crcs, self.geometry, self._header_crc)
        self._file.write(footer)
        parquet = segment_path(self._folder, self.number, "parquet")
        sums = {
            "hseg": self._file.finish(),
            "keys": durable.write_file(segment_path(self._folder, self.number, "keys"), keys.tobytes()),
            "parquet": durable.write_file(parquet, pairs.encode(self._records)),
        }
        durable.sync_folder(self._folder / "segments")
        first, last = (self._ids[0], self._ids[-1]) if self._ids else (0, 0)
        entry = SegmentEntry(self.number, len(ids), first, last, trailer_crc, sums)
        return entry, keys.astype(np.float64).sum(axis=0)

    def discard(self) -> None:
        self._file.discard()


@dataclass
class Finished:
    """A complete segment that is not committed yet. `notes`: data of its writer, kept across a restart."""

    entry: SegmentEntry
    key_sum: np.ndarray
    notes: dict[str, Any] = field(default_factory=dict)


class Job:
    """A change that writes segments from `base.next_segment` on and commits them together. Its name is a hash of
    what it writes."""

    def __init__(self, folder: Path, base: Manifest, spec: dict[str, Any]) -> None:
        self.folder, self.base = folder, base
        identity = [base.generation, base.encoder_digest.hex(), asdict(base.geometry), base.segment_records, spec]
        self.name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    def finished(self, number: int) -> Finished | None:
        """Return the segment if an earlier run of this job completed it."""
        path = segment_path(self.folder, number, "json")
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
            entry = typed(SegmentEntry, body["entry"], "entry")
            read_tables(self.folder, replace(self.base, segments=(entry,)), entry)
            for kind in ("keys", "parquet"):
                if segment_path(self.folder, number, kind).stat().st_size != entry.files[kind].bytes:
                    return None
            return Finished(entry, np.frombuffer(base64.b64decode(body["key_sum"]), "<f8"), body["notes"])
        except (DatabaseCorrupt, KeyError, TypeError, ValueError, OSError) as error:
            # The database itself is not damaged: write this segment again.
            log.warning("%s: the segment of an earlier run is incomplete (%s); writing it again", path, error)
            return None

    def write(self, number: int, fill: Callable[[SegmentWriter], dict[str, Any] | None]) -> Finished:
        """Write one segment through `fill`, which returns notes, and mark it as complete."""
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
        durable.write_file(segment_path(self.folder, number, "json"), _seal(body))
        durable.sync_folder(self.folder / "segments")
        return Finished(entry, key_sum, notes)

    def unfinished_others(self) -> list[str]:
        """Names of complete segments that another job left uncommitted."""
        found = []
        for path in sorted((self.folder / "segments").glob("*.json")):
            with contextlib.suppress(DatabaseCorrupt, OSError):
                if _unseal(path.read_bytes(), path).get("job") != self.name:
                    found.append(path.stem)
        return found

    def clear(self, mine: Callable[[int], bool] = lambda number: True, resume: bool = True) -> None:
        """Delete files that neither a generation nor, with `resume`, a run of this job needs.

        Args:
            mine: which segment numbers may be deleted.
        """
        folder = self.folder / "segments"
        used = {entry.number for entry in self.base.segments}
        marked = {int(path.stem) for path in folder.glob("*.json") if path.stem.isdigit()} - used
        keep = used | {number for number in marked if resume and self.finished(number)}
        for path in sorted(folder.iterdir()):
            stem, _, kind = path.name.partition(".")
            if not stem.isdigit() or not mine(int(stem)):
                continue
            unused = kind in (*SEGMENT_FILES, "json") and int(stem) not in keep
            if unused or path.suffix == ".part" or (kind == "json" and int(stem) in used):
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
