"""The segments of a generation, opened and proven: which id is where, every record's checksum, the keys in memory."""

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


def read_tables(folder: Path, manifest: Manifest, entry: SegmentEntry) -> tuple[np.ndarray, np.ndarray]:
    """Ids and CRC-32s of one segment, after its size, header and footer have been proven against the manifest."""
    path = segment_path(folder, entry, "hseg")
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
    """All segments of one generation as one table of rows, in id order. Immutable; safe from any thread."""

    def __init__(self, folder: Path, manifest: Manifest, *, load_keys: bool = True, load_pairs: bool = True) -> None:
        self.folder, self.manifest, self.geometry = folder, manifest, manifest.geometry
        entries = manifest.segments
        tables = [read_tables(folder, manifest, entry) for entry in entries]
        empty: list[Any] = [np.empty(0, np.int64)]
        self.ids: np.ndarray = np.concatenate([ids for ids, _ in tables] or empty)
        self.crcs: np.ndarray = np.concatenate([crcs for _, crcs in tables] or [np.empty(0, np.uint32)])
        self.starts = np.cumsum([0] + [entry.count for entry in entries], dtype=np.int64)
        # Ids without a gap need no search: row = id - first.
        rows = len(self.ids)
        self._first = int(self.ids[0]) if rows else 0
        self._contiguous = bool(rows and int(self.ids[-1]) - self._first + 1 == rows)
        paths = [segment_path(folder, entry, "hseg") for entry in entries]
        self.paths = paths
        try:
            self._store = store.open_store(
                [str(path) for path in paths], header_bytes=HEADER_BYTES, record_bytes=self.geometry.stride,
                payload_bytes=self.geometry.record_bytes, counts=[entry.count for entry in entries],
            )  # fmt: skip
            pairs = [
                PairsFile(segment_path(folder, entry, "parquet"), entry.files["parquet"], ids)
                for entry, (ids, _) in zip(entries, tables, strict=True)
            ] if load_pairs else []  # fmt: skip
        except FileNotFoundError as error:
            raise DatabaseCorrupt(f"{error.filename}: the file is missing") from error
        except ValueError as error:
            raise DatabaseCorrupt(str(error)) from error
        except OSError as error:
            raise _too_many_files(folder, error, len(entries)) from error
        self.pairs: list[PairsFile] = pairs
        self.keys: np.ndarray = self._load_keys() if load_keys else np.empty((0, self.geometry.key_dim), np.float16)

    def _load_keys(self) -> np.ndarray:
        """Every key, (N, K) float16, read once into memory and checked there: no later change on disk can reach it."""
        dim = self.geometry.key_dim
        keys = np.empty((len(self.ids), dim), "<f2")

        def load(i: int) -> None:
            entry = self.manifest.segments[i]
            path = segment_path(self.folder, entry, "keys")
            block = keys[self.starts[i] : self.starts[i + 1]]
            view = block.reshape(-1).view(np.uint8).data
            with durable.naming(path, "reading"), open(path, "rb", buffering=0) as file:
                done = 0
                while done < len(view) and (got := file.readinto(view[done:])):
                    done += got
                longer = file.read(1)
            if done != entry.files["keys"].bytes or longer:
                raise DatabaseCorrupt(f"{path}: its size is not the {entry.files['keys'].bytes} bytes of the manifest")
            crc = store.crc32(view)
            if crc != entry.files["keys"].crc32:
                raise DatabaseCorrupt(
                    f"{path}: its CRC-32 is {crc:08x}, the manifest says {entry.files['keys'].crc32:08x}"
                )

        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            list(pool.map(load, range(len(self.manifest.segments))))
        return keys

    def rows_of(self, ids: np.ndarray) -> np.ndarray:
        """Rows of ids (n,) int64; -1 where an id was never in this generation."""
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
        """Rows -> (segment, row inside it)."""
        segments = np.searchsorted(self.starts, rows, side="right") - 1
        return segments, rows - self.starts[segments]

    def read_into(
        self, rows: np.ndarray, dst: Any, *, slots: np.ndarray | None = None, slot_bytes: int | None = None,
        checksums: bool = True, threads: int = 2,
    ) -> None:  # fmt: skip
        """Reads the records of `rows` into slots of `dst`. A record that is not what was written is never returned."""
        rows = np.ascontiguousarray(rows, np.int64)
        failures = self._store.read_into(
            rows, dst, slots=slots, slot_bytes=slot_bytes,
            expected_crc=self.crcs[rows] if checksums else None, threads=threads,
        )  # fmt: skip
        if failures:
            segments, inside = self.locate(rows)
            raise DatabaseCorrupt("; ".join(self._describe(segments, inside, rows, f) for f in failures[:8]))

    def _describe(self, segments: np.ndarray, inside: np.ndarray, rows: np.ndarray, failure: store.Failure) -> str:
        i, kind, detail = failure
        what = {"crc": "wrong checksum", "short": "the file is cut short", "io": "reading failed"}.get(kind, kind)
        return f"{self.paths[segments[i]]}: record {inside[i]} (id {self.ids[rows[i]]}): {what}: {detail}"

    def read(self, rows: np.ndarray, *, checksums: bool = True, threads: int = 2) -> np.ndarray:
        """(n, record bytes) uint8, as stored."""
        out = np.empty((len(rows), self.geometry.record_bytes), np.uint8)
        if len(rows):
            self.read_into(rows, out, checksums=checksums, threads=threads)
        return out


def _too_many_files(folder: Path, error: OSError, segments: int) -> DatabaseError:
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return DatabaseError(
            f"{folder}: {segments} segments need more open files than allowed (ulimit -n); run `ragturbo db compact`"
        )
    return DatabaseError(f"{error.filename or folder}: {error.strerror or error}")
