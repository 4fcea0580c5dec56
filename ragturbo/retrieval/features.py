"""Cache of feature rows in three tiers: disk, page-locked host memory, device memory.

The memory of a tier never moves, so that captured CUDA graphs can read it by address. If all rows fit in a tier, they
are loaded once and stay.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ragturbo.errors import InvalidRequest
from ragturbo.retrieval import store
from ragturbo.retrieval.database import Database
from ragturbo.retrieval.retriever import to_ids
from ragturbo.retrieval.slots import Frequencies, SlotTable

_DEFAULT_HOST = 1 << 30
_LOAD = 512
# Seconds that a request waits for a slot, or for another request's read, before it is refused.
_PATIENCE = 30.0


@dataclass
class CacheStats:
    """Counts of requested rows."""

    device_hits: int = 0
    host_hits: int = 0
    disk_reads: int = 0
    passed: int = 0
    """Rows read into a transient slot because they are requested too rarely."""
    evicted: int = 0
    promoted: int = 0

    def to_dict(self) -> dict[str, int]:
        return asdict(self)


@dataclass
class Lease:
    """Rows that stay in memory until `release`.

    host_slots and device_slots are (n,) int64, -1 if the row is not in that tier or the id is -1. The bytes of a row
    start at slot * `stride` of the tier.
    """

    cache: FeatureCache
    host_slots: np.ndarray
    device_slots: np.ndarray
    host_pins: list[np.ndarray] = field(default_factory=list)
    device_pins: list[np.ndarray] = field(default_factory=list)
    released: bool = False

    def release(self, after: Any = None) -> None:
        """Allow the rows to be overwritten.

        Args:
            after: CUDA event recorded behind the last kernel that reads the rows; they stay until it has completed.
        """
        if not self.released:
            self.released = True
            self.cache._release(self, after)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class FeatureCache:
    """Feature rows of one generation of a database. Thread-safe."""

    def __init__(
        self, database: Database, *, host_bytes: int | None = None, device_bytes: int | None = None,
        device: str | torch.device = "cpu", checksums: bool = True, threads: int = 2,
    ) -> None:  # fmt: skip
        """Args:
        host_bytes: size of the host tier, page-locked if there is CUDA; None: all rows, at most 1 GiB.
        device_bytes: size of the device tier; None or 0: none.
        device: of the device tier and of the result of `rows`.
        checksums: check each record against its CRC-32 as it is read.
        threads: threads for reading records.
        """
        self.database = database.frozen()
        self.device = torch.device(device)
        self._snapshot = self.database.snapshot
        self.geometry = self._snapshot.geometry
        self.stride = self.geometry.stride
        self._read_options: dict[str, Any] = {"checksums": checksums, "threads": threads, "slot_bytes": self.stride}
        self.stats = CacheStats()
        rows = len(self._snapshot.ids)
        budget = min(rows * self.stride, _DEFAULT_HOST) if host_bytes is None else host_bytes
        slots = min(max(rows, 1), budget // self.stride)
        if slots < 1:
            raise InvalidRequest(f"host_bytes={host_bytes!r} holds no row: one takes {self.stride} bytes")
        self._table = SlotTable(max(rows, 1), slots)
        self._wanted = Frequencies(max(rows, 1), slots)
        self._host, self.page_locked, self.why_not_locked, self._arena = store.host_buffer(slots * self.stride)
        self.host_rows = self._host.reshape(slots, self.stride)
        """(slots, stride) uint8: the host tier itself."""
        self._host_tensor = torch.from_numpy(self.host_rows)
        self.resident = slots >= rows
        """Whether the host tier holds every row."""
        self._hot: SlotTable | None = None
        self.device_rows: Tensor | None = None
        hot = min(rows, (device_bytes or 0) // self.stride)
        if hot > 0:
            self._hot = SlotTable(rows, hot, seed=1)
            self.device_rows = torch.zeros(hot, self.stride, dtype=torch.uint8, device=self.device)
            self._copied: dict[int, Any] = {}
        self._pending: deque[tuple[Any, Lease]] = deque()
        self._stats_lock = threading.Lock()
        # Rows in host memory are then the result itself: one gather on the host is enough.
        self._gathers_on_host = (
            self.resident and self._hot is None and self.device.type == "cpu"
            and self.geometry.dtype == "float16" and self.geometry.record_bytes == self.stride
        )  # fmt: skip
        if self.resident:
            self._load_all(rows)

    @property
    def host_ptr(self) -> int:
        """Address of slot 0 of the host tier. It never changes."""
        return int(self._host.ctypes.data)

    @property
    def device_host_ptr(self) -> int:
        """Address of the host tier for kernels; 0 if it is not page-locked."""
        return int(getattr(self._arena, "device_ptr", 0))

    @property
    def device_ptr(self) -> int:
        return 0 if self.device_rows is None else self.device_rows.data_ptr()

    def _load_all(self, rows: int) -> None:
        """Load row i into slot i, in order: the disk reads ahead."""
        for start in range(0, rows, _LOAD):
            part = np.arange(start, min(rows, start + _LOAD))
            self._snapshot.segments.read_into(part, self._host, slots=part, **self._read_options)
        self._table.row_slot[:rows] = np.arange(rows)
        self._table.slot_row[:rows] = np.arange(rows)
        self._table.ready[:rows] = True

    def lease(self, ids: Any) -> Lease:
        """Read the rows of ids (n,) into memory and keep them there until the lease is released."""
        array = to_ids(ids).reshape(-1)
        rows = self._snapshot.rows(array)
        lease = Lease(self, np.full(len(rows), -1, np.int64), np.full(len(rows), -1, np.int64))
        self._release_completed()
        try:
            self._pin_device_rows(lease, rows)
            cold = (rows >= 0) & (lease.device_slots < 0)
            self._pin_host_rows(lease, np.unique(rows[cold]))
            lease.host_slots[cold] = self._table.row_slot[rows[cold]]
            if self._hot is not None:
                self._promote(lease, rows)
        except BaseException:
            self._unpin(lease)
            raise
        return lease

    def _pin_host_rows(self, lease: Lease, rows: np.ndarray) -> None:
        """Pin `rows` in the host tier, reading those that are missing."""
        table = self._table
        if self.resident:
            # Slots are never overwritten, so nothing is pinned.
            with self._stats_lock:
                self._wanted.add(rows)
                self.stats.host_hits += len(rows)
            return
        if len(rows) > table.count:
            raise InvalidRequest(f"{len(rows)} rows at once do not fit in the {table.count} of the host tier")
        deadline = time.monotonic() + _PATIENCE
        # The slot pinned for each row. A slot changes if the request that was reading it fails.
        pinned = np.full(len(rows), -1, np.int64)
        with table.lock:
            self._wanted.add(rows)
        while True:
            self._release_completed()
            with table.lock:
                slots = table.row_slot[rows]
                missing, held = slots < 0, slots[(slots >= 0) & (slots != pinned)]
                # Rows in memory are pinned before any slot is given away.
                table.pin(held)
                if not table.can_place(int(missing.sum())):
                    # All or nothing: two requests that each hold half of what both need would deadlock.
                    table.unpin(held)
                    table.wait(deadline, f"{missing.sum()} rows found no free slot among {table.count}")
                    continue
                lease.host_pins.append(held)
                self.stats.host_hits += len(held)
                pinned = slots.astype(np.int64)
                if not missing.any():
                    if table.ready[slots].all():
                        return
                    table.wait(deadline, "another request's read did not end")
                    continue
                mine = pinned[missing] = table.place(rows[missing], self._wanted)
                lease.host_pins.append(mine)
                self.stats.disk_reads += len(mine)
                self.stats.evicted, self.stats.passed = table.evicted, table.passed
            try:
                self._snapshot.segments.read_into(rows[missing], self._host, slots=mine, **self._read_options)
            except BaseException:
                with table.lock:
                    table.drop(mine)
                raise
            with table.lock:
                table.ready[mine] = True
                table.lock.notify_all()

    def _pin_device_rows(self, lease: Lease, rows: np.ndarray) -> None:
        table = self._hot
        if table is None:
            return
        with table.lock:
            slots = np.where(rows >= 0, table.row_slot[rows], -1)
            slots[(slots >= 0) & ~table.ready[slots]] = -1
            lease.device_slots[:] = slots
            found = np.unique(slots[slots >= 0])
            table.pin(found)
            lease.device_pins.append(found)
            self.stats.device_hits += len(found)
            if self.device.type == "cuda":
                stream = torch.cuda.current_stream(self.device)
                for slot in found.tolist():
                    if slot in self._copied:
                        stream.wait_event(self._copied[slot])
            hot_rows = table.slot_row[found]
        with self._table.lock:
            self._wanted.add(hot_rows)

    def _promote(self, lease: Lease, rows: np.ndarray) -> None:
        """Copy frequently requested rows from the host tier to the device tier, for later requests."""
        table = self._hot
        assert table is not None and self.device_rows is not None
        on_host = lease.host_slots >= 0
        candidates, first = np.unique(rows[on_host], return_index=True)
        sources = lease.host_slots[on_host][first]
        fits = table.count >= len(table.row_slot)
        often = np.ones(len(candidates), bool) if fits else self._wanted.of(candidates) >= 2
        with table.lock:
            new = often & (table.row_slot[candidates] < 0)
            slots = table.place(candidates[new], self._wanted, optional=True)
            placed = slots[slots >= 0]
            lease.device_pins.append(placed)
            self.stats.promoted += len(placed)
            for slot, source in zip(placed.tolist(), sources[new][slots >= 0].tolist(), strict=True):
                self.device_rows[slot].copy_(self._host_tensor[source], non_blocking=True)
            if len(placed) and self.device.type == "cuda":
                self._copied.update(dict.fromkeys(placed.tolist(), self._event()))
            table.ready[placed] = True

    def _event(self) -> Any:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _release(self, lease: Lease, after: Any) -> None:
        if after is None and self._hot is not None and self.device.type == "cuda":
            after = self._event()
        if after is not None and not after.query():
            self._pending.append((after, lease))
        else:
            self._unpin(lease)

    def _unpin(self, lease: Lease) -> None:
        for table, pins in ((self._table, lease.host_pins), (self._hot, lease.device_pins)):
            if table is not None and pins:
                with table.lock:
                    for slots in pins:
                        table.unpin(slots)
                    pins.clear()

    def _release_completed(self) -> None:
        """Unpin leases whose events have completed. It takes both locks: never call it with the device tier's held."""
        for _ in range(len(self._pending)):
            try:
                event, lease = self._pending.popleft()
            except IndexError:
                return
            if event.query():
                self._unpin(lease)
            else:
                self._pending.append((event, lease))

    def rows(self, ids: Any) -> Tensor:
        """ids (…,) -> (…, T, C) on the cache's device: float16 as stored, int8 dequantised to float32; zeros for -1.

        The result is a copy that later reads do not overwrite.
        """
        array = to_ids(ids)
        flat = array.reshape(-1)
        shape = (*array.shape, self.geometry.tokens, self.geometry.channels)
        if self._gathers_on_host and (raw := self._resident_rows(flat)) is not None:
            return raw.view(torch.float16).view(shape)
        # Half the tier at a time, so that other requests find free slots.
        step = len(flat) if self.resident else max(1, self._table.count // 2)
        parts = [self._copy(flat[start : start + step]) for start in range(0, max(len(flat), 1), max(step, 1))]
        return self._decode(parts[0] if len(parts) == 1 else torch.cat(parts)).reshape(shape)

    def _resident_rows(self, ids: np.ndarray) -> Tensor | None:
        """Gather rows that are all resident: row i is in slot i. None if an id is -1."""
        rows = self._snapshot.rows(ids)
        if not len(rows) or rows.min() < 0:
            return None
        with self._stats_lock:
            self.stats.host_hits += len(rows)
        return torch.index_select(self._host_tensor, 0, torch.from_numpy(rows))

    def _copy(self, ids: np.ndarray) -> Tensor:
        size = self.geometry.record_bytes
        out = torch.empty(len(ids), size, dtype=torch.uint8, device=self.device)
        with self.lease(ids) as lease:
            if self.device.type == "cpu" and size == self.stride and (lease.host_slots >= 0).all():
                np.take(self.host_rows, lease.host_slots, axis=0, out=out.numpy(), mode="clip")
                return out
            for i, slot in enumerate(lease.host_slots.tolist()):
                if slot >= 0:
                    out[i].copy_(self._host_tensor[slot, :size], non_blocking=True)
                elif lease.device_slots[i] >= 0:
                    assert self.device_rows is not None
                    out[i].copy_(self.device_rows[int(lease.device_slots[i]), :size])
                else:
                    out[i].zero_()
            if self.device.type == "cuda":
                lease.release(after=self._event())
        return out

    def _decode(self, raw: Tensor) -> Tensor:
        """(n, record bytes) uint8 -> (n, T, C)."""
        geometry = self.geometry
        if geometry.dtype == "float16":
            return raw.view(torch.float16)
        split = geometry.tokens * geometry.channels
        values = raw[:, :split].contiguous().view(torch.int8).reshape(len(raw), geometry.tokens, geometry.channels)
        scales = raw[:, split:].reshape(-1).clone().view(torch.float32).reshape(len(raw), geometry.tokens, 1)
        return values * scales
