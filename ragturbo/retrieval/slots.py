"""Which row is in which slot of a cache tier. Request frequencies choose the slot to overwrite; pins protect slots.

A request pins the slots it reads until its last read is over (on a device: until an event behind its last kernel has
completed). Pins are kept per slot: one oldest epoch for all would let a long request hold every slot used since it
began.
"""

from __future__ import annotations

import threading
import time

import numpy as np

from ragturbo.errors import Overloaded

_SAMPLE = 16


class Frequencies:
    """How often each row was requested, halved at intervals so that old requests lose weight."""

    def __init__(self, rows: int, slots: int) -> None:
        self._counts = np.zeros(rows, np.float32)
        self._interval = 10 * max(slots, 100)
        self._left = self._interval

    def add(self, rows: np.ndarray) -> None:
        self._counts[rows] += 1
        self._left -= len(rows)
        if self._left <= 0:
            self._counts *= 0.5
            self._left = self._interval

    def of(self, rows: np.ndarray) -> np.ndarray:
        return self._counts[rows]


class SlotTable:
    """`count` slots for rows 0…rows-1. Most hold the most requested rows; the last few are transient.

    The caller must hold `lock`, which is also the condition that `wait` waits on.
    """

    def __init__(self, rows: int, count: int, seed: int = 0) -> None:
        self.count = count
        # Rarely requested rows use the transient slots, so that a stream of them does not evict the frequent ones.
        self._kept = count - (0 if count >= rows else max(1, min(64, count // 4)))
        self.lock = threading.Condition()
        self.row_slot = np.full(rows, -1, np.int32)
        self.slot_row = np.full(count, -1, np.int64)
        self.ready = np.zeros(count, bool)
        self.pins = np.zeros(count, np.int32)
        self._last_use = np.zeros(count, np.int64)
        self._clock = 0
        self._unused = list(range(self._kept - 1, -1, -1))
        self._random = np.random.default_rng(seed)
        self.evicted = self.passed = 0

    def pin(self, slots: np.ndarray) -> None:
        """slots: without repetition."""
        self._clock += 1
        self.pins[slots] += 1
        self._last_use[slots] = self._clock

    def unpin(self, slots: np.ndarray) -> None:
        self.pins[slots] -= 1
        self.lock.notify_all()

    def can_place(self, count: int) -> bool:
        return len(self._unused) >= count or int((self.pins == 0).sum()) >= count

    def place(self, rows: np.ndarray, wanted: Frequencies, optional: bool = False) -> np.ndarray:
        """Give each of `rows` (in no slot yet) a slot: pinned once, not ready. `optional`: -1 instead of a transient
        slot."""
        return np.array([self._place(int(row), wanted, optional) for row in rows], np.int64)

    def _place(self, row: int, wanted: Frequencies, optional: bool) -> int:
        slot = self._unused.pop() if self._unused else self._victim(row, wanted)
        if slot < 0:
            if optional:
                return -1
            slot = self._transient()
        old = int(self.slot_row[slot])
        if old >= 0:
            self.row_slot[old] = -1
            self.evicted += 1
        self.row_slot[row], self.slot_row[slot] = slot, row
        self.ready[slot] = False
        self.pin(np.array([slot]))
        return slot

    def _victim(self, row: int, wanted: Frequencies) -> int:
        """The least requested of a few random slots if `row` is requested as often, else -1."""
        slots = self._random.integers(0, self._kept, _SAMPLE) if self._kept > _SAMPLE else np.arange(self._kept)
        slots = slots[self.pins[slots] == 0]
        if not len(slots):
            return -1
        rows = self.slot_row[slots]
        counts = np.where(rows >= 0, wanted.of(np.maximum(rows, 0)), -1)
        least = int(counts.argmin())
        return int(slots[least]) if counts[least] <= wanted.of(np.array([row]))[0] else -1

    def _transient(self) -> int:
        """The least recently used transient slot; any other free one if all of those are being read."""
        for begin, end in ((self._kept, self.count), (0, self._kept)):
            free = begin + np.flatnonzero(self.pins[begin:end] == 0)
            if len(free):
                self.passed += 1
                return int(free[self._last_use[free].argmin()])
        raise Overloaded(f"all {self.count} slots are being read")

    def drop(self, slots: np.ndarray) -> None:
        """Remove rows whose read failed. Their pins remain until the requests that hold them release them."""
        for slot in slots.tolist():
            row = int(self.slot_row[slot])
            if row >= 0:
                self.row_slot[row] = -1
            self.slot_row[slot] = -1
            self.ready[slot] = False
        self.lock.notify_all()

    def wait(self, deadline: float, why: str) -> None:
        left = deadline - time.monotonic()
        if left <= 0:
            raise Overloaded(f"{why}; release leases sooner, or give the cache more bytes")
        self.lock.wait(min(left, 0.05))
