"""Reads of many records into one buffer: `ragturbo._native.Store`, or the same interface in Python.

The native store copies from memory maps and handles the SIGBUS of a file that is truncated while it is read. Python
cannot handle SIGBUS, so `PreadStore` uses pread: a truncated file is a short read.
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

# Index in the request, kind ("io", "short" or "crc") and detail.
Failure = tuple[int, str, str]


class PreadStore:
    """Fixed-size records in many files: record r of a file starts at byte header_bytes + r * record_bytes."""

    def __init__(
        self, paths: Sequence[str], *, header_bytes: int, record_bytes: int, payload_bytes: int, counts: Sequence[int]
    ) -> None:
        self._header, self._stride, self._payload = header_bytes, record_bytes, payload_bytes
        self._ends = np.cumsum(counts, dtype=np.int64)
        self._starts = self._ends - np.array(counts, np.int64)
        self._fds: list[int] = []
        self._pool: ThreadPoolExecutor | None = None
        for path, count in zip(paths, counts, strict=True):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self._fds.append(fd)
            size, need = os.fstat(fd).st_size, header_bytes + count * record_bytes
            if size < need:
                raise ValueError(f"{path}: {size} bytes, {count} records need {need}")

    def read_into(
        self, rows: np.ndarray, dst: Any, *, slots: np.ndarray | None = None, slot_bytes: int | None = None,
        expected_crc: np.ndarray | None = None, threads: int = 2,
    ) -> list[Failure]:  # fmt: skip
        """Read records into slots of a buffer. All arguments are checked before anything is read.

        Args:
            rows: (n,) int64, counted through all files.
            dst: writable contiguous buffer; slot s starts at byte s * slot_bytes.
            slots: (n,) int64 without repetition; None: 0…n-1.
            slot_bytes: default: the payload.
            expected_crc: (n,) uint32; None: records are not checked.

        Returns:
            The records that could not be read; their slots hold undefined bytes.
        """
        view = memoryview(dst).cast("B")
        step = self._payload if slot_bytes is None else slot_bytes
        places = np.arange(len(rows)) if slots is None else slots
        if len(rows) != len(places) or step < self._payload:
            raise ValueError("rows and slots must be of one length, and a slot must hold a record")
        if len(np.unique(places)) != len(places):
            raise ValueError("two records cannot go to one slot")
        for name, values, count in (
            ("row", rows, int(self._ends[-1]) if len(self._ends) else 0),
            ("slot", places, (len(view) - self._payload) // step + 1),
        ):
            if len(values) and not 0 <= values.min() <= values.max() < count:
                raise IndexError(f"{name}s {values.min()}…{values.max()} of {count}")
        files = np.searchsorted(self._ends, rows, side="right")
        offsets = self._header + (rows - self._starts[files]) * self._stride

        def read(begin: int, end: int) -> list[Failure]:
            failures = []
            for i in range(begin, end):
                start = int(places[i]) * step
                target = view[start : start + self._payload]
                if problem := self._read_one(self._fds[files[i]], int(offsets[i]), target):
                    failures.append((i, *problem))
                elif expected_crc is not None and (crc := zlib.crc32(target)) != int(expected_crc[i]):
                    failures.append((i, "crc", f"CRC-32 {crc:08x}, expected {int(expected_crc[i]):08x}"))
            return failures

        if threads <= 1 or len(rows) < 8:
            return read(0, len(rows))
        if self._pool is None:
            self._pool = ThreadPoolExecutor(4, thread_name_prefix="ragturbo-pread")
        cuts = np.linspace(0, len(rows), threads + 1).astype(int).tolist()
        parts = [self._pool.submit(read, a, b) for a, b in zip(cuts[:-1], cuts[1:], strict=True)]
        return [failure for part in parts for failure in part.result()]

    @staticmethod
    def _read_one(fd: int, offset: int, target: memoryview) -> tuple[str, str] | None:
        done = 0
        while done < len(target):
            try:
                got = os.preadv(fd, [target[done:]], offset + done)
            except OSError as error:
                return "io", error.strerror or str(error)
            if got == 0:
                return "short", f"{done} of {len(target)} bytes"
            done += got
        return None

    def __del__(self) -> None:
        for fd in self._fds:
            os.close(fd)
        if self._pool is not None:
            self._pool.shutdown()


Store: Any = PreadStore if _native is None else _native.Store
crc32: Any = zlib.crc32 if _native is None else _native.crc32


def host_buffer(nbytes: int) -> tuple[np.ndarray, bool, str, Any]:
    """Allocate memory that never moves. Returns (uint8 view, whether it is page-locked, why not, owner)."""
    if _native is not None:
        arena: Any = _native.PinnedArena(nbytes)
        return np.frombuffer(arena, np.uint8), arena.page_locked, arena.reason, arena
    block = np.empty(nbytes + 4096, np.uint8)
    shift = -block.ctypes.data % 4096
    return block[shift : shift + nbytes], False, "ragturbo._native is not built", block
