"""Exact search: blocked matmul and top-k over every key, on the CPU or a GPU. The oracle that recall is measured by."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ragturbo.errors import InvalidRequest
from ragturbo.ops import describe, topk
from ragturbo.retrieval.retriever import check_k, check_keys, excluded_ids, like, to_host
from ragturbo.retrieval.snapshot import Snapshot

# Rows converted to fp32 at a time on the CPU: 8 MB at 1,024 wide, which stays in the caches.
_BLOCK = 2048


class ExactRetriever:
    """Cosine with every stored key, in fp32. `device` other than the CPU holds all keys there in fp16."""

    name = "exact"
    query_kind = "key"

    def __init__(self, snapshot: Snapshot, *, device: str | torch.device = "cpu", centred: bool = False) -> None:
        self.snapshot, self.centred = snapshot, centred
        self.device = torch.device(device)
        self._dim = snapshot.geometry.key_dim
        # torch shares the memory of the snapshot's keys on the CPU.
        self.keys = torch.from_numpy(snapshot.keys).to(self.device)
        self.ids = torch.from_numpy(np.ascontiguousarray(snapshot.ids)).to(self.device)
        self.dead = torch.from_numpy(~snapshot.alive).to(self.device)
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
        query = keys.detach().to(self.device, torch.float32) if isinstance(keys, Tensor) else torch.from_numpy(
            to_host(keys)
        ).to(self.device)  # fmt: skip
        # Where the keys are on a GPU a check would wait for it; NaN is refused after the search instead.
        check_keys(query.cpu().numpy(), self._dim)
        banned = excluded_ids(exclude, len(query))
        hidden = None if banned is None else [self._rows(ids) for ids in banned]
        ids, scores = self._search(query, k, hidden)
        if isinstance(keys, Tensor):
            return ids.to(keys.device), scores.to(keys.device)
        return like(keys, ids.cpu().numpy(), scores.cpu().numpy())

    def _rows(self, ids: np.ndarray) -> Tensor:
        rows = self.snapshot.rows_of(ids)
        return torch.from_numpy(rows[rows >= 0]).to(self.device)

    def search_into(self, keys: Tensor, ids: Tensor, scores: Tensor) -> None:
        """As `search`, into ids and scores (B, k) on the retriever's device: no host round trip, so it can be
        captured.
        """
        if keys.device != self.device:
            raise InvalidRequest(f"search_into needs keys on {self.device}, not {keys.device}")
        found_ids, found_scores = self._search(keys.float(), ids.shape[1], None)
        ids.copy_(found_ids)
        scores.copy_(found_scores)

    def _one_pass(self, query: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The kernel that reads every key once; a removed pair's key is NaN there, and NaN is never returned."""
        rows, scores = topk(self._descriptor, query, k)
        there = rows >= 0
        return torch.where(there, self.ids[rows.clamp(min=0)], -1), scores

    def _search(self, query: Tensor, k: int, hidden: list[Tensor] | None) -> tuple[Tensor, Tensor]:
        query = torch.nn.functional.normalize(query, dim=1)
        if self.device.type == "cuda" and hidden is None and self._mean is None and k <= 64 and len(self.keys):
            return self._one_pass(query, k)
        offset = None
        if self._mean is not None:
            query = query - self._mean
            query = torch.nn.functional.normalize(query, dim=1)
            offset = query @ self._mean
        rows = len(self.keys)
        width = min(k, rows)
        block = rows if self.device.type != "cpu" else _BLOCK
        best: tuple[Tensor, Tensor] | None = None
        for start in range(0, rows, max(block, 1)):
            part = slice(start, start + block)
            scores = _products(self.keys[part], query)
            if offset is not None and self._scale is not None:
                scores = (scores - offset[:, None]) * self._scale[part]
            scores.masked_fill_(self.dead[part], float("-inf"))
            if hidden is not None:
                for row, banned in zip(scores, hidden, strict=True):
                    local = banned[(banned >= start) & (banned < start + scores.shape[1])] - start
                    row[local] = float("-inf")
            values, where = scores.topk(min(width, scores.shape[1]), dim=1)
            candidate = (values, where + start)
            if best is not None:
                candidate = (torch.cat([best[0], candidate[0]], 1), torch.cat([best[1], candidate[1]], 1))
                # Stable: equal scores keep the lower id, which came first.
                order = candidate[0].argsort(dim=1, descending=True, stable=True)[:, :width]
                candidate = (candidate[0].gather(1, order), candidate[1].gather(1, order))
            best = candidate
        ids = torch.full((len(query), k), -1, dtype=torch.int64, device=self.device)
        out = torch.full((len(query), k), float("nan"), dtype=torch.float32, device=self.device)
        if best is not None:
            found = best[0] != float("-inf")
            ids[:, :width] = torch.where(found, self.ids[best[1]], -1)
            out[:, :width] = torch.where(found, best[0], float("nan"))
        return ids, out


def _products(keys: Tensor, query: Tensor) -> Tensor:
    """(N, K) fp16, (B, K) fp32 -> (B, N) fp32, as if both were fp32."""
    if keys.device.type != "cuda":
        return query @ keys.float().T
    # The keys are read once, in fp16: the query goes in as two fp16 halves whose sum is its fp32 value.
    high = query.half()
    low = ((query - high.float()) * 2048).half()
    both = torch.mm(torch.cat([high, low]), keys.T, out_dtype=torch.float32)
    return both[: len(query)] + both[len(query) :] / 2048
