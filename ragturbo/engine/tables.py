"""A database in memory, as kernels see it: keys on the device, rows in page-locked memory, both by address and count.

A graph reads the addresses from the arena that is uploaded with every request, so a swap of the database is nothing but
other numbers in the next request, and a request's search, rows and records are of one generation.
"""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ragturbo.errors import InvalidRequest

if TYPE_CHECKING:
    from ragturbo.engine.source import DatabaseSource
    from ragturbo.retrieval.snapshot import Snapshot

log = logging.getLogger("ragturbo")
# Room for what is appended to a database while it is served.
_SLACK = 1.05
_ALIGN = 128


class HostRows:
    """Feature records in page-locked memory that never moves: all of a database's, or as many as the budget holds.

    Slot i holds row i where everything fits. Otherwise the least recently used slot makes way; the engine's thread runs
    one batch at a time, so a slot in use is never one that is being replaced.
    """

    def __init__(self, snapshot: Snapshot, budget: int | None, *, checksums: bool = True, threads: int = 2) -> None:
        geometry = snapshot.geometry
        self.stride = -(-geometry.record_bytes // _ALIGN) * _ALIGN
        rows = len(snapshot.ids)
        most = _default_budget() if budget is None else budget
        self.capacity = max(min(int(rows * _SLACK) + 64, most // self.stride), 1)
        self.resident = self.capacity >= rows
        self._checksums, self._threads = checksums, threads
        self._memory = _page_locked(self.capacity * self.stride)
        self.address: int = getattr(self._memory, "device_ptr", 0) or _address(self._memory)
        self._ids = np.empty(0, np.int64)
        self._slot_of: OrderedDict[int, int] = OrderedDict()
        self._free: list[int] = [] if self.resident else list(range(self.capacity))[::-1]
        self.counts = {"hits": 0, "misses": 0}
        if self.resident:
            self.extend(snapshot)

    def fits(self, snapshot: Snapshot) -> bool:
        """Whether this memory can serve that generation too: the same records, and perhaps more behind them."""
        if not self.resident:
            return True
        known = len(self._ids)
        return len(snapshot.ids) <= self.capacity and np.array_equal(snapshot.ids[:known], self._ids)

    def extend(self, snapshot: Snapshot) -> None:
        known = len(self._ids)
        new = np.arange(known, len(snapshot.ids))
        if len(new):
            self._read(snapshot, new, new)
            self._ids = snapshot.ids.copy()

    def slots(self, snapshot: Snapshot, ids: np.ndarray) -> np.ndarray:
        """ids (…,), -1 for none -> where their records are, read from the disk where they were not."""
        flat = ids.reshape(-1)
        out = np.full(flat.shape, -1, np.int64)
        if self.resident:
            out[flat >= 0] = snapshot.rows(flat[flat >= 0])
            self.counts["hits"] += int((flat >= 0).sum())
            return out.reshape(ids.shape)
        wanted = list(dict.fromkeys(int(i) for i in flat if i >= 0))
        if len(wanted) > self.capacity:
            raise InvalidRequest(
                f"one batch reads {len(wanted)} rows and host_cache holds {self.capacity}: give it more memory"
            )
        missing = [i for i in wanted if i not in self._slot_of]
        for i in wanted:
            if i in self._slot_of:
                self._slot_of.move_to_end(i)
        if missing:
            slots = [self._free_slot() for _ in missing]
            try:
                self._read(snapshot, snapshot.rows(np.array(missing)), np.array(slots))
            except BaseException:
                self._free += slots
                raise
            self._slot_of.update(zip(missing, slots, strict=True))
        self.counts["misses"] += len(missing)
        self.counts["hits"] += len(wanted) - len(missing)
        out[flat >= 0] = [self._slot_of[int(i)] for i in flat if i >= 0]
        return out.reshape(ids.shape)

    def _free_slot(self) -> int:
        return self._free.pop() if self._free else self._slot_of.popitem(last=False)[1]

    def _read(self, snapshot: Snapshot, rows: np.ndarray, slots: np.ndarray) -> None:
        snapshot.segments.read_into(
            rows, self._memory, slots=slots.astype(np.int64), slot_bytes=self.stride, checksums=self._checksums,
            threads=self._threads,
        )  # fmt: skip


class DeviceKeys:
    """All keys of a generation on the device in fp16. A removed pair's are NaN, which a search never returns."""

    def __init__(self, snapshot: Snapshot, device: torch.device) -> None:
        self.centred = snapshot.manifest.centred
        self.count = len(snapshot.ids)
        host = snapshot.keys
        dead = np.flatnonzero(~snapshot.alive)
        self.stored = _upload(host, dead, device)
        self.searched, self.mean = self.stored, None
        if self.centred:
            centred = (host.astype(np.float32) - snapshot.key_mean) / snapshot.centred_norms[:, None]
            self.searched = _upload(centred.astype(np.float16), dead, device)
            self.mean = torch.from_numpy(snapshot.key_mean)

    @property
    def bytes(self) -> int:
        return self.stored.nbytes * (2 if self.centred else 1)


class Tables:
    """What one source needs in memory. `keys` is None where the search runs on the host."""

    def __init__(self, source: DatabaseSource, rows: HostRows, keys: DeviceKeys | None) -> None:
        self.source, self.rows, self.keys = source, rows, keys
        self.snapshot = source.database.snapshot

    @property
    def form(self) -> str:
        if self.keys is None:
            return "three graphs"
        return "one graph" if self.rows.resident else "ids to the host"

    def descriptors(self) -> Tensor:
        """(3, 2) int64: address and count of the keys that are searched, of the keys as stored, and of the rows."""
        n = 0 if self.keys is None else self.keys.count
        found = [0, 0] if self.keys is None else [self.keys.searched.data_ptr(), self.keys.stored.data_ptr()]
        rows = len(self.snapshot.ids) if self.rows.resident else self.rows.capacity
        return torch.tensor([[found[0], n], [found[1], n], [self.rows.address, rows]])


def open_tables(source: DatabaseSource, last: Tables | None, *, budget: int | None, device: torch.device) -> Tables:
    """`last`: tables of an earlier generation, whose row memory is used again where it fits."""
    snapshot = source.database.snapshot
    rows = None
    if last is not None and last.source.live is source.live and last.rows.fits(snapshot):
        rows = last.rows
        if rows.resident:
            rows.extend(snapshot)
    if rows is None:
        rows = HostRows(snapshot, budget, checksums=source.database.checksums, threads=source.database.threads)
    keys = DeviceKeys(snapshot, device) if _on_device(source, device) else None
    return Tables(source, rows, keys)


def _on_device(source: DatabaseSource, device: torch.device) -> bool:
    """Search by brute force on the device where that was asked for, or where nothing was and the keys have room."""
    if source.named == "exact" or (source.named == "auto" and source.retriever_name == "exact"):
        return True
    if source.named != "auto" or device.type != "cuda":
        return False
    free, _ = torch.cuda.mem_get_info(device)
    return source.database.snapshot.keys.nbytes < free // 4


def _upload(keys: np.ndarray, dead: np.ndarray, device: torch.device) -> Tensor:
    table = torch.from_numpy(np.ascontiguousarray(keys)).to(device, copy=True)
    if len(dead):
        table[torch.from_numpy(dead).to(device)] = float("nan")
    return table


def _default_budget() -> int:
    """A quarter of the machine's memory: page-locked memory is lost to everything else."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4


def _page_locked(size: int) -> Any:
    try:
        from ragturbo import _native
    except ImportError:
        return np.zeros(size, np.uint8)
    return _native.PinnedArena(size)


def _address(memory: Any) -> int:
    return memory.ptr if hasattr(memory, "ptr") else memory.ctypes.data
