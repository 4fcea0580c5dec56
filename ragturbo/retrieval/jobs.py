"""Writing segments: one at a time, whole or not at all, resumable by the job they belong to.

A sidecar (`segments/000007.json`) marks a whole segment of a job that is not committed yet: a job of the same name
resumes after it. Neither torch nor diffusers is imported here.
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
from ragturbo.retrieval.format import Geometry, encode_keys, encode_rows, pack_footer, pack_header, segment_name
from ragturbo.retrieval.manifest import (
    Manifest,
    SegmentEntry,
    encoder_digest,
    is_segment_file,
    segment_from_json,
    segment_path,
)
from ragturbo.retrieval.pairs import Record
from ragturbo.retrieval.segments import read_tables

log = logging.getLogger("ragturbo")


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
            self._crcs.append(zlib.crc32(row[:payload]))
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
