"""Feature rows in three tiers: disk, a page-locked set in host memory, a hot set on the device.

Each tier has a byte budget and an address that never moves, so that a captured graph can read it. A database that
fits in a tier is resident there: no row is ever read twice.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ragturbo.config import parse_bytes
from ragturbo.errors import InvalidRequest
from ragturbo.retrieval import store
from ragturbo.retrieval.database import Database
from ragturbo.retrieval.retriever import to_ids
from ragturbo.retrieval.slots import Frequencies, SlotTable

log = logging.getLogger("ragturbo")
_DEFAULT_HOST = 1 << 30
_LOAD = 512
# How long a request waits for a slot or for another request's read before it is refused.
_PATIENCE = 30.0


@dataclass
class CacheStats:
    """Counted by row asked for."""

    device_hits: int = 0
    host_hits: int = 0
    disk_reads: int = 0
    passed: int = 0
    """Rows read but not kept: asked for too rarely."""
    evicted: int = 0
    promoted: int = 0

    def to_dict(self) -> dict[str, int]:
        return asdict(self)


@dataclass
class Lease:
    """Rows held still until `release`. host_slots and device_slots are (n,) int64, -1 where the row is not in that tier
    or the id is -1; a row's bytes start at slot * `stride` of the tier."""

    cache: FeatureCache
    ids: np.ndarray
    host_slots: np.ndarray
    device_slots: np.ndarray
    host_pins: list[np.ndarray] = field(default_factory=list)
    device_pins: list[np.ndarray] = field(default_factory=list)
    released: bool = False

    def release(self, after: Any = None) -> None:
        """after: a CUDA event, recorded behind the last kernel that reads the rows; they stay until it has passed."""
        if not self.released:
            self.released = True
            self.cache._release(self, after)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class FeatureCache:
    """The rows of one generation of a database, in memory as far as the budgets go. Safe from any thread.

    host_bytes: page-locked where CUDA is present; None: the whole database up to 1 GiB. device_bytes: of `device`; None
    or 0: no device tier. device: where `rows` puts its result.
    """

    def __init__(
        self, database: Database, *, host_bytes: int | str | None = None, device_bytes: int | str | None = None,
        device: str | torch.device = "cpu", checksums: bool = True, threads: int = 2,
    ) -> None:  # fmt: skip
        self.database = database.frozen()
        self.device = torch.device(device)
        self._snapshot = self.database.snapshot
        self.geometry = self._snapshot.geometry
        self.stride = self.geometry.stride
        self._checksums, self._threads = checksums, threads
        self.stats = CacheStats()
        rows = len(self._snapshot.ids)
        host = parse_bytes(host_bytes, "host_bytes")
        budget = min(rows * self.stride, _DEFAULT_HOST) if host is None else host
        slots = min(max(rows, 1), budget // self.stride)
        if slots < 1:
            raise InvalidRequest(f"host_bytes={host_bytes!r} holds no row: one takes {self.stride} bytes")
        self._table = SlotTable(max(rows, 1), slots)
        self._wanted = Frequencies(max(rows, 1), slots)
        self._host, self.page_locked, self.why_not_locked, self._arena = store.host_buffer(slots * self.stride)
        self.host_rows = self._host.reshape(slots, self.stride)
        """(slots, stride) uint8: the host tier itself."""
        self.resident = slots >= rows
        self._hot = self._device_tier(parse_bytes(device_bytes, "device_bytes") or 0, rows)
        self._pending: deque[tuple[Any, Lease]] = deque()
        self._prefetcher: ThreadPoolExecutor | None = None
        self._stats_lock = threading.Lock()
        self._host_tensor = torch.from_numpy(self.host_rows)
        # One copy on the host gives the answer: all rows are here, as they are stored, for a caller on the CPU.
        self._whole = (
            self.resident and self._hot is None and self.device.type == "cpu"
            and self.geometry.dtype == "float16" and self.geometry.record_bytes == self.stride
        )  # fmt: skip
        if self.resident:
            self._load_all(rows)

    def _device_tier(self, budget: int, rows: int) -> SlotTable | None:
        slots = min(rows, budget // self.stride)
        if slots < 1:
            self.device_rows: Tensor | None = None
            return None
        self.device_rows = torch.zeros(slots, self.stride, dtype=torch.uint8, device=self.device)
        self._copied: dict[int, Any] = {}
        return SlotTable(rows, slots, seed=1)

    @property
    def host_ptr(self) -> int:
        """Address of slot 0 of the host tier. It never changes."""
        return int(self._host.ctypes.data)

    @property
    def device_host_ptr(self) -> int:
        """The same memory's address for kernels; 0 where it is not page-locked."""
        return int(getattr(self._arena, "device_ptr", 0))

    @property
    def device_ptr(self) -> int:
        return 0 if self.device_rows is None else self.device_rows.data_ptr()

    def _load_all(self, rows: int) -> None:
        """Slot i holds row i. The rows come in order, so the disk reads ahead."""
        for start in range(0, rows, _LOAD):
            part = np.arange(start, min(rows, start + _LOAD))
            self._snapshot.segments.read_into(
                part, self._host, slots=part, slot_bytes=self.stride, checksums=self._checksums, threads=self._threads
            )
        self._table.row_slot[:rows] = np.arange(rows)
        self._table.slot_row[:rows] = np.arange(rows)
        self._table.ready[:rows] = True

    # Taking rows

    def lease(self, ids: Any) -> Lease:
        """Brings the rows of ids (n,) into memory and holds them there until the lease is released."""
        array = to_ids(ids).reshape(-1)
        rows = self._snapshot.rows(array)
        lease = Lease(self, array, np.full(len(rows), -1, np.int64), np.full(len(rows), -1, np.int64))
        self._reap()
        try:
            self._take_hot(lease, rows)
            cold = (rows >= 0) & (lease.device_slots < 0)
            self._bring(lease, np.unique(rows[cold]))
            lease.host_slots[cold] = self._table.row_slot[rows[cold]]
            if self._hot is not None:
                self._promote(lease, rows)
        except BaseException:
            self._unpin(lease)
            raise
        return lease

    def _bring(self, lease: Lease, rows: np.ndarray) -> None:
        """Has all of `rows` in the host tier, pinned by the lease."""
        table = self._table
        if self.resident:
            # Nothing is ever overwritten here, so nothing is pinned.
            with self._stats_lock:
                self._wanted.add(rows)
                self.stats.host_hits += len(rows)
            return
        if len(rows) > table.count:
            raise InvalidRequest(f"{len(rows)} rows at once do not fit in the {table.count} of the host tier")
        deadline = time.monotonic() + _PATIENCE
        with table.lock:
            self._wanted.add(rows)
            while True:
                self._reap()
                slots = table.row_slot[rows]
                missing, held = rows[slots < 0], slots[slots >= 0]
                # What is here already is pinned before any slot is given away.
                table.pin(held)
                if table.can_place(len(missing)):
                    break
                # All or nothing: two requests that each hold half of what both need would wait for ever.
                table.unpin(held)
                table.wait(deadline, f"{len(missing)} rows found no free slot among {table.count}")
            lease.host_pins.append(held)
            self.stats.host_hits += len(held)
            mine = self._placed(lease, missing)
        self._read(missing, mine)
        self._await_others(lease, rows, deadline)

    def _placed(self, lease: Lease, rows: np.ndarray) -> np.ndarray:
        mine = self._table.place(rows, self._wanted)
        lease.host_pins.append(mine)
        self.stats.disk_reads += len(rows)
        self.stats.evicted, self.stats.passed = self._table.evicted, self._table.passed
        return mine

    def _read(self, rows: np.ndarray, slots: np.ndarray) -> None:
        table = self._table
        if not len(rows):
            return
        try:
            self._snapshot.segments.read_into(
                rows, self._host, slots=slots, slot_bytes=self.stride, checksums=self._checksums, threads=self._threads
            )
        except BaseException:
            with table.lock:
                table.drop(slots)
            raise
        with table.lock:
            table.ready[slots] = True
            table.lock.notify_all()

    def _await_others(self, lease: Lease, rows: np.ndarray, deadline: float) -> None:
        """Rows that another request is reading at this moment. Where its read failed, they are read again here."""
        table = self._table
        while True:
            with table.lock:
                slots = table.row_slot[rows]
                lost = rows[slots < 0]
                if not len(lost):
                    if table.ready[slots].all():
                        return
                    table.wait(deadline, "another request's read did not end")
                    continue
                if not table.can_place(len(lost)):
                    table.wait(deadline, f"{len(lost)} rows found no free slot among {table.count}")
                    continue
                mine = self._placed(lease, lost)
            self._read(lost, mine)

    def _take_hot(self, lease: Lease, rows: np.ndarray) -> None:
        """Pins what is on the device already."""
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
        """Copies rows that are asked for often enough from the host tier to the device, for the next request."""
        table = self._hot
        assert table is not None and self.device_rows is not None
        here = lease.host_slots >= 0
        candidates, first = np.unique(rows[here], return_index=True)
        sources = lease.host_slots[here][first]
        fits = table.count >= len(table.row_slot)
        often = np.ones(len(candidates), bool) if fits else self._wanted.of(candidates) >= 2
        with table.lock:
            new = often & (table.row_slot[candidates] < 0)
            slots = table.place(candidates[new], self._wanted, optional=True)
            placed = slots[slots >= 0]
            lease.device_pins.append(placed)
            self.stats.promoted += len(placed)
            for slot, source in zip(placed.tolist(), sources[new][slots >= 0].tolist(), strict=True):
                self.device_rows[slot].copy_(torch.from_numpy(self.host_rows[source]), non_blocking=True)
            if len(placed) and self.device.type == "cuda":
                event = torch.cuda.Event()
                event.record(torch.cuda.current_stream(self.device))
                self._copied.update(dict.fromkeys(placed.tolist(), event))
            table.ready[placed] = True

    def _release(self, lease: Lease, after: Any) -> None:
        if after is None and self._hot is not None and self.device.type == "cuda":
            after = torch.cuda.Event()
            after.record(torch.cuda.current_stream(self.device))
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

    def _reap(self) -> None:
        """Releases leases whose events have passed. Never called with the device tier's lock held: it takes both."""
        for _ in range(len(self._pending)):
            try:
                event, lease = self._pending.popleft()
            except IndexError:
                return
            if event.query():
                self._unpin(lease)
            else:
                self._pending.append((event, lease))

    def rows(self, ids: Any, *, dtype: torch.dtype | None = None) -> Tensor:
        """ids (…,) -> (…, T, C) on the cache's device: float16 as stored, int8 dequantised to float32; zeros for -1.

        The result is a copy: it stays as it is whatever becomes of the cache.
        """
        array = to_ids(ids)
        flat = array.reshape(-1)
        if self._whole and (raw := self._resident_rows(flat)) is not None:
            out = raw.view(torch.float16).view(*array.shape, self.geometry.tokens, self.geometry.channels)
            return out if dtype is None else out.to(dtype)
        # Half the tier at a time, so that other requests find room beside a large one.
        step = len(flat) if self.resident else max(1, self._table.count // 2)
        parts = [self._copy(flat[start : start + step]) for start in range(0, max(len(flat), 1), max(step, 1))]
        raw = parts[0] if len(parts) == 1 else torch.cat(parts)
        out = self._decode(raw).reshape(*array.shape, self.geometry.tokens, self.geometry.channels)
        return out if dtype is None else out.to(dtype)

    def _resident_rows(self, ids: np.ndarray) -> Tensor | None:
        """Row i lies in slot i for good, so nothing is looked up or pinned. None where an id is -1."""
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
                    out[i].copy_(torch.from_numpy(self.host_rows[slot, :size]), non_blocking=True)
                elif lease.device_slots[i] >= 0:
                    assert self.device_rows is not None
                    out[i].copy_(self.device_rows[int(lease.device_slots[i]), :size])
                else:
                    out[i].zero_()
            if self.device.type == "cuda":
                event = torch.cuda.Event()
                event.record(torch.cuda.current_stream(self.device))
                lease.release(after=event)
        return out

    def _decode(self, raw: Tensor) -> Tensor:
        """(n, record bytes) uint8 -> (n, T, C)."""
        geometry = self.geometry
        if geometry.dtype == "float16":
            return raw.view(torch.float16).reshape(len(raw), geometry.tokens, geometry.channels)
        split = geometry.tokens * geometry.channels
        values = raw[:, :split].contiguous().view(torch.int8).reshape(len(raw), geometry.tokens, geometry.channels)
        scales = raw[:, split:].reshape(-1).clone().view(torch.float32).reshape(len(raw), geometry.tokens, 1)
        return values * scales

    def prefetch(self, ids: Any) -> Future[None]:
        """Starts bringing rows in; the Future is done when they are."""
        array = to_ids(ids).copy().reshape(-1)
        with self._stats_lock:
            if self._prefetcher is None:
                self._prefetcher = ThreadPoolExecutor(1, thread_name_prefix="ragturbo-prefetch")
        return self._prefetcher.submit(self._prefetch, array)

    def _prefetch(self, ids: np.ndarray) -> None:
        step = max(1, self._table.count // 2)
        for start in range(0, len(ids), step):
            self.lease(ids[start : start + step]).release()

    def close(self) -> None:
        if self._prefetcher is not None:
            self._prefetcher.shutdown()

    def __enter__(self) -> FeatureCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
