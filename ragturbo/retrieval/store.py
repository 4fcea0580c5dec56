"""Positioned reads of many records into one buffer: `ragturbo._native.Store`, or the same contract in Python.

The native store copies from maps of its files and knows how to survive a file that is truncated under them. Python does
not, so its twin reads: there a truncated file is a short read.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

try:
    from ragturbo import _native
except ImportError:
    _native = None  # type: ignore[assignment]

Failure = tuple[int, str, str]


class PreadStore:
    """What `_native.Store` does, without it: records of `record_bytes` from byte `header_bytes` on, in many files."""

    def __init__(
        self, paths: Sequence[str], *, header_bytes: int, record_bytes: int, payload_bytes: int, counts: Sequence[int]
    ) -> None:
        self._paths = [os.fspath(path) for path in paths]
        self._header, self._stride, self._payload = header_bytes, record_bytes, payload_bytes
        self._counts = [int(count) for count in counts]
        self._fds: list[int] = []
        self._pool: ThreadPoolExecutor | None = None
        try:
            for path, count in zip(self._paths, self._counts, strict=True):
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                self._fds.append(fd)
                size, need = os.fstat(fd).st_size, header_bytes + count * record_bytes
                if size < need:
                    raise ValueError(f"{path}: {size} bytes, {count} records need {need}")
        except BaseException:
            self.close()
            raise

    def read_into(
        self, segments: np.ndarray | None, rows: np.ndarray, dst: Any, slots: np.ndarray | None = None,
        slot_bytes: int | None = None, expected_crc: np.ndarray | None = None, threads: int = 2,
    ) -> list[Failure]:  # fmt: skip
        if segments is None:
            # Counted through all files.
            ends = np.cumsum(self._counts)
            if len(rows) and not 0 <= rows.min() <= rows.max() < ends[-1]:
                raise IndexError(f"rows {rows.min()}…{rows.max()} of {ends[-1]}")
            segments = np.searchsorted(ends, rows, side="right").astype(np.int32)
            rows = rows - (ends - self._counts)[segments]
        view = memoryview(dst).cast("B")
        step = self._payload if slot_bytes is None else slot_bytes
        places = np.arange(len(rows)) if slots is None else slots
        # All arguments are proven first, so that a bad one reads nothing.
        if not len(segments) == len(rows) == len(places) or step < self._payload:
            raise ValueError("segments, rows and slots must be of one length, and a slot must hold a record")
        if len(np.unique(places)) != len(places):
            raise ValueError("two records cannot go to one slot")
        for segment, row, place in zip(segments.tolist(), rows.tolist(), places.tolist(), strict=True):
            if not 0 <= segment < len(self._fds) or not 0 <= row < self._counts[segment]:
                raise IndexError(f"no record {row} in segment {segment}")
            if not 0 <= place or place * step + self._payload > len(view):
                raise IndexError(f"slot {place} is outside the destination")

        def read(begin: int, end: int) -> list[Failure]:
            failures = []
            for i in range(begin, end):
                start = int(places[i]) * step
                target = view[start : start + self._payload]
                if problem := self._read_one(int(segments[i]), int(rows[i]), target):
                    failures.append((i, *problem))
                elif expected_crc is not None and (crc := zlib.crc32(target)) != int(expected_crc[i]):
                    failures.append((i, "crc", f"CRC-32 {crc:08x}, expected {int(expected_crc[i]):08x}"))
            return failures

        count = len(rows)
        if threads <= 1 or count < 8:
            return read(0, count)
        if self._pool is None:
            self._pool = ThreadPoolExecutor(4, thread_name_prefix="ragturbo-pread")
        cuts = np.linspace(0, count, threads + 1).astype(int)
        parts = [self._pool.submit(read, int(a), int(b)) for a, b in zip(cuts[:-1], cuts[1:], strict=True)]
        return [failure for part in parts for failure in part.result()]

    def _read_one(self, segment: int, row: int, target: memoryview) -> tuple[str, str] | None:
        offset, done = self._header + row * self._stride, 0
        while done < len(target):
            try:
                got = os.preadv(self._fds[segment], [target[done:]], offset + done)
            except OSError as error:
                return "io", error.strerror or str(error)
            if got == 0:
                return "short", f"{done} of {len(target)} bytes"
            done += got
        return None

    def close(self) -> None:
        for fd in self._fds:
            os.close(fd)
        self._fds = []
        if self._pool is not None:
            self._pool.shutdown()

    def __del__(self) -> None:
        if getattr(self, "_fds", None):
            self.close()


def open_store(
    paths: Sequence[str], *, header_bytes: int, record_bytes: int, payload_bytes: int, counts: Sequence[int]
) -> Any:
    kind: Any = PreadStore if _native is None else _native.Store
    return kind(
        list(paths), header_bytes=header_bytes, record_bytes=record_bytes, payload_bytes=payload_bytes,
        counts=list(counts),
    )  # fmt: skip


def crc32(data: Any, value: int = 0) -> int:
    return zlib.crc32(data, value) if _native is None else _native.crc32(data, value)


def host_buffer(nbytes: int) -> tuple[np.ndarray, bool, str, Any]:
    """Memory whose address never changes: (uint8 view, page-locked?, why not, owner)."""
    if _native is not None:
        arena: Any = _native.PinnedArena(nbytes)
        return np.frombuffer(arena, np.uint8), arena.page_locked, arena.reason, arena
    block = np.empty(nbytes + 4096, np.uint8)
    shift = -block.ctypes.data % 4096
    return block[shift : shift + nbytes], False, "ragturbo._native is not built", block
