"""The segments of a generation: which id is in which row, the checksum of each record, the keys in memory."""

from __future__ import annotations

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from ragturbo.errors import DatabaseCorrupt, DatabaseError
from ragturbo.retrieval import durable, store
from ragturbo.retrieval.format import HEADER_BYTES, check_footer, check_header
from ragturbo.retrieval.manifest import Manifest, SegmentEntry, segment_path
from ragturbo.retrieval.pairs import PairsFile

_FAILURES = {"crc": "wrong checksum", "short": "the file is cut short", "io": "reading failed"}


def read_tables(folder: Path, manifest: Manifest, entry: SegmentEntry) -> tuple[np.ndarray, np.ndarray]:
    """Return ids and CRC-32s of a segment, after checking its size, header and footer against the manifest."""
    path = segment_path(folder, entry.number, "hseg")
    geometry = manifest.geometry
    with durable.naming(path, "reading"), open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        if size != entry.files["hseg"].bytes:
            raise DatabaseCorrupt(f"{path}: {size} bytes, the manifest says {entry.files['hseg'].bytes}")
        header = file.read(HEADER_BYTES)
        crc = check_header(header, str(path), geometry, entry.number, manifest.encoder_digest)
        file.seek(geometry.offset(entry.count))
        footer = file.read()
    ids, crcs = check_footer(footer, str(path), geometry, entry.count, crc, entry.trailer_crc32)
    if entry.count and (ids[0], ids[-1]) != (entry.first_id, entry.last_id):
        raise DatabaseCorrupt(f"{path}: ids {ids[0]}…{ids[-1]}, the manifest says {entry.first_id}…{entry.last_id}")
    return ids, crcs


class Segments:
    """All segments of one generation as one table of rows, in id order. Immutable and thread-safe."""

    def __init__(self, folder: Path, manifest: Manifest, before: Segments | None = None) -> None:
        """before: an earlier generation, whose open text and postings are used for segments that are the same."""
        self.folder, self.manifest, self.geometry = folder, manifest, manifest.geometry
        held: dict[int, tuple[SegmentEntry, PairsFile]] = {}
        if before is not None:
            held = {
                entry.number: (entry, pairs)
                for entry, pairs in zip(before.manifest.segments, before.pairs, strict=True)
            }
        entries = manifest.segments
        tables = [read_tables(folder, manifest, entry) for entry in entries]
        self.ids: np.ndarray = np.concatenate([np.empty(0, np.int64), *(ids for ids, _ in tables)])
        self.crcs: np.ndarray = np.concatenate([np.empty(0, np.uint32), *(crcs for _, crcs in tables)])
        self.starts = np.cumsum([0] + [entry.count for entry in entries], dtype=np.int64)
        # If ids have no gaps, row = id - first, without a search.
        rows = len(self.ids)
        self._first = int(self.ids[0]) if rows else 0
        self._contiguous = bool(rows and int(self.ids[-1]) - self._first + 1 == rows)
        self.paths = [segment_path(folder, entry.number, "hseg") for entry in entries]
        try:
            self._store = store.Store(
                [str(path) for path in self.paths], header_bytes=HEADER_BYTES, record_bytes=self.geometry.stride,
                payload_bytes=self.geometry.record_bytes, counts=[entry.count for entry in entries],
            )  # fmt: skip
            self.pairs: list[PairsFile] = [
                known[1]
                if (known := held.get(entry.number)) is not None and known[0] == entry
                else PairsFile(segment_path(folder, entry.number, "parquet"), entry.files["parquet"], ids)
                for entry, (ids, _) in zip(entries, tables, strict=True)
            ]
        except FileNotFoundError as error:
            raise DatabaseCorrupt(f"{error.filename}: the file is missing") from error
        except ValueError as error:
            raise DatabaseCorrupt(str(error)) from error
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise DatabaseError(
                    f"{folder}: {len(entries)} segments need more open files than allowed (ulimit -n); "
                    "run `ragturbo db compact`"
                ) from error
            raise DatabaseError(f"{error.filename or folder}: {error.strerror or error}") from error
        self.keys: np.ndarray = self._load_keys()

    def _load_keys(self) -> np.ndarray:
        """Read every key, (N, K) float16, into memory and check it, so that later damage on disk has no effect."""
        keys = np.empty((len(self.ids), self.geometry.key_dim), "<f2")

        def load(i: int) -> None:
            entry = self.manifest.segments[i]
            path, total = segment_path(self.folder, entry.number, "keys"), entry.files["keys"]
            view = keys[self.starts[i] : self.starts[i + 1]].reshape(-1).view(np.uint8).data
            with durable.naming(path, "reading"), open(path, "rb", buffering=0) as file:
                done = 0
                while done < len(view) and (got := file.readinto(view[done:])):
                    done += got
                longer = file.read(1)
            if done != total.bytes or longer:
                raise DatabaseCorrupt(f"{path}: its size is not the {total.bytes} bytes of the manifest")
            crc = store.crc32(view)
            if crc != total.crc32:
                raise DatabaseCorrupt(f"{path}: its CRC-32 is {crc:08x}, the manifest says {total.crc32:08x}")

        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            list(pool.map(load, range(len(self.manifest.segments))))
        return keys

    def rows_of(self, ids: np.ndarray) -> np.ndarray:
        """ids (n,) int64 -> their rows; -1 for an id that was never in this generation."""
        if not len(self.ids):
            return np.full(len(ids), -1, np.int64)
        if self._contiguous:
            rows = ids - self._first
            if len(rows) and rows.min() >= 0 and rows.max() < len(self.ids):
                return rows
            return np.where((rows >= 0) & (rows < len(self.ids)), rows, -1)
        rows = np.minimum(np.searchsorted(self.ids, ids), len(self.ids) - 1)
        return np.where(self.ids[rows] == ids, rows, -1)

    def locate(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows -> (segment, row in the segment)."""
        segments = np.searchsorted(self.starts, rows, side="right") - 1
        return segments, rows - self.starts[segments]

    def read_into(
        self, rows: np.ndarray, dst: Any, *, slots: np.ndarray | None = None, slot_bytes: int | None = None,
        checksums: bool = True, threads: int = 2,
    ) -> None:  # fmt: skip
        """Read records into slots of `dst`; see `PreadStore.read_into`. Raises DatabaseCorrupt for damaged records."""
        rows = np.ascontiguousarray(rows, np.int64)
        failures = self._store.read_into(
            rows, dst, slots=slots, slot_bytes=slot_bytes, threads=threads,
            expected_crc=self.crcs[rows] if checksums else None,
        )  # fmt: skip
        if failures:
            segments, inside = self.locate(rows)
            raise DatabaseCorrupt("; ".join(
                f"{self.paths[segments[i]]}: record {inside[i]} (id {self.ids[rows[i]]}): {_FAILURES[kind]}: {detail}"
                for i, kind, detail in failures[:8]
            ))  # fmt: skip

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Return records as stored, (n, record bytes) uint8, checked."""
        out = np.empty((len(rows), self.geometry.record_bytes), np.uint8)
        self.read_into(rows, out)
        return out
