"""A database as kernels read it: keys on the device and features in page-locked memory, by address and count.

Graphs read the addresses from the arena that is uploaded with every request, so a database swap needs no new recording,
and a request's search, features and records come from one generation. The first request after a swap uploads its keys.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from ragturbo.engine.database import DatabaseGeneration
    from ragturbo.retrieval.snapshot import Snapshot


class DeviceKeys:
    """All keys of a generation on the device in fp16. Keys of removed pairs are NaN, which a search never returns."""

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
    """One generation's keys and features in memory. `keys` is None if the search runs on the host."""

    def __init__(self, database: DatabaseGeneration, device: torch.device) -> None:
        self.database, self.snapshot = database, database.database.snapshot
        self.rows = database.cache
        self.address = self.rows.device_host_ptr or self.rows.host_ptr
        self.keys = DeviceKeys(self.snapshot, device) if _on_device(database, device) else None
        self.ids = np.append(self.snapshot.ids, -1)
        """By row. Row -1, a missing neighbour, is the last entry: id -1."""

    @property
    def form(self) -> str:
        if self.keys is None:
            return "three graphs"
        return "one graph" if self.rows.resident else "ids to the host"

    def descriptors(self) -> Tensor:
        """(4, 2) int64: address and count of the searched keys, the stored keys, the features in page-locked memory and
        the features in the device cache."""
        searched = stored = n = 0
        if self.keys is not None:
            searched, stored, n = self.keys.searched.data_ptr(), self.keys.stored.data_ptr(), self.keys.count
        hot = 0 if self.rows.device_rows is None else len(self.rows.device_rows)
        rows = [[self.address, len(self.rows.host_rows)], [self.rows.device_ptr, hot]]
        return torch.tensor([[searched, n], [stored, n], *rows])


def _on_device(database: DatabaseGeneration, device: torch.device) -> bool:
    """Whether to search on the device: for "exact"; for "auto" if the keys fit there or there is no index. Any other
    retriever searches on the host."""
    asked, snapshot = database.asked_retriever, database.database.snapshot
    if not isinstance(asked, str) or asked not in ("auto", "exact"):
        return False
    if asked == "exact":
        return True
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # Centred keys are kept in addition to the stored ones.
        if snapshot.keys.nbytes * (2 if snapshot.manifest.centred else 1) < free // 4:
            return True
    return database.database.choice()[0] == "exact"


def _upload(keys: np.ndarray, dead: np.ndarray, device: torch.device) -> Tensor:
    table = torch.from_numpy(np.ascontiguousarray(keys)).to(device, copy=True)
    if len(dead):
        table[torch.from_numpy(dead).to(device)] = float("nan")
    return table
