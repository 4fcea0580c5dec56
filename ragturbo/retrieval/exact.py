"""Exact search: matrix product and top-k over every key, on the CPU or a GPU. The reference for recall."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ragturbo.ops import describe, topk
from ragturbo.retrieval.retriever import check_k, check_keys, excluded_ids, like, to_host
from ragturbo.retrieval.snapshot import Snapshot

# Values converted to fp32 at a time on the CPU: 8 MB, which fit the caches.
_BLOCK = 1 << 21


class ExactRetriever:
    """Cosine with every stored key, in fp32. A `device` other than the CPU holds all keys in fp16."""

    name = "exact"
    query_kind = "key"

    def __init__(self, snapshot: Snapshot, *, device: str | torch.device = "cpu", centred: bool = False) -> None:
        self.snapshot = snapshot
        self.device = torch.device(device)
        # On the CPU, torch shares the memory of the snapshot's keys.
        self.keys = torch.from_numpy(snapshot.keys).to(self.device)
        self.ids = torch.from_numpy(np.ascontiguousarray(snapshot.ids)).to(self.device)
        self.dead = torch.from_numpy(~snapshot.alive).to(self.device)
        self._removed = not snapshot.alive.all()
        if self.device.type != "cpu":
            self.keys.masked_fill_(self.dead[:, None], float("nan"))
        self._descriptor = describe(self.keys.data_ptr(), len(self.keys), self.device)
        self._scale: Tensor | None = None
        self._mean: Tensor | None = None
        if centred:
            self._mean = torch.from_numpy(snapshot.key_mean).to(self.device)
            self._scale = torch.from_numpy(1 / snapshot.centred_norms).to(self.device)

    def search(self, keys: Any, k: int, *, exclude: Any = None) -> tuple[Any, Any]:
        check_k(k)
        host = to_host(keys)
        check_keys(host, self.snapshot.geometry.key_dim)
        query = keys.detach().float() if isinstance(keys, Tensor) else torch.from_numpy(host)
        banned = excluded_ids(exclude, len(query))
        hidden = None if banned is None else [self._rows(ids) for ids in banned]
        ids, scores = self._search(query.to(self.device), k, hidden)
        return like(keys, ids, scores)

    def _rows(self, ids: np.ndarray) -> Tensor:
        rows = self.snapshot.rows_of(ids)
        return torch.from_numpy(rows[rows >= 0]).to(self.device)

    def _one_pass(self, query: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Search with the kernel that reads every key once. Removed keys are NaN, which it never returns."""
        rows, scores = topk(self._descriptor, query, k)
        return torch.where(rows >= 0, self.ids[rows.clamp(min=0)], -1), scores

    def _search(self, query: Tensor, k: int, hidden: list[Tensor] | None) -> tuple[Tensor, Tensor]:
        query = torch.nn.functional.normalize(query, dim=1)
        if self.device.type == "cuda" and hidden is None and self._mean is None and k <= 64 and len(self.keys):
            return self._one_pass(query, k)
        offset = None
        if self._mean is not None:
            query = torch.nn.functional.normalize(query - self._mean, dim=1)
            offset = query @ self._mean
        rows = len(self.keys)
        width = min(k, rows)
        block = rows if self.device.type != "cpu" else _BLOCK // self.keys.shape[1]
        best: list[tuple[Tensor, Tensor]] = []
        for start in range(0, rows, max(block, 1)):
            part = slice(start, start + block)
            scores = _products(self.keys[part], query)
            if offset is not None and self._scale is not None:
                scores = (scores - offset[:, None]) * self._scale[part]
            if self._removed:
                scores.masked_fill_(self.dead[part], float("-inf"))
            for row, banned in zip(scores, hidden or (), strict=hidden is not None):
                local = banned[(banned >= start) & (banned < start + scores.shape[1])] - start
                row[local] = float("-inf")
            values, places = scores.topk(min(width, scores.shape[1]), dim=1)
            best.append((values, places + start))
        if not best:
            empty = torch.full((len(query), k), -1, device=self.device)
            return empty, empty.float().fill_(float("nan"))
        values, places = best[0]
        if len(best) > 1:
            values, places = (torch.cat(parts, 1) for parts in zip(*best, strict=True))
            # Stable: of equal scores, the lower id stays first.
            order = values.argsort(dim=1, descending=True, stable=True)[:, :width]
            values, places = values.gather(1, order), places.gather(1, order)
        ids = self.ids[places]
        if self._removed or hidden is not None:
            found = values != float("-inf")
            ids, values = torch.where(found, ids, -1), torch.where(found, values, float("nan"))
        if width < k:
            pad = (0, k - width)
            return torch.nn.functional.pad(ids, pad, value=-1), torch.nn.functional.pad(values, pad, value=float("nan"))
        return ids, values


def _products(keys: Tensor, query: Tensor) -> Tensor:
    """(N, K) fp16, (B, K) fp32 -> (B, N) fp32, as if both were fp32."""
    if keys.device.type != "cuda":
        return query @ keys.float().T
    # The keys are read once, in fp16. The query is split into two fp16 parts whose sum is its fp32 value.
    high = query.half()
    low = ((query - high.float()) * 2048).half()
    both = torch.mm(torch.cat([high, low]), keys.T, out_dtype=torch.float32)
    return both[: len(query)] + both[len(query) :] / 2048
