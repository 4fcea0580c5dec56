"""A bounded cache of text encoder results, for services that see the same prompts again."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import replace

import torch
from torch import Tensor

from ragturbo.engine.request import Request


class PromptCache:
    """The last `capacity` prompts by exact tokens and bucket, least recently used dropped first.

    An entry is the retrieval key with the hidden states on the host or, if `keeps_kv`, the keys and values of all
    cross-attentions on the device. The bucket is part of the cache key because an encoder's bits depend on its batch
    size, and the same prompt, seed and bucket must give the same bytes whether or not the prompt was cached.
    """

    def __init__(self, capacity: int, *, keeps_kv: bool = False) -> None:
        self.capacity, self.keeps_kv = capacity, keeps_kv
        self._entries: OrderedDict[tuple[int, bytes], tuple[Tensor, Tensor]] = OrderedDict()
        self._lock = threading.Lock()
        self.hits = self.misses = 0

    def __len__(self) -> int:
        return len(self._entries)

    def known(self, batch: Request) -> Request | None:
        """The batch with cached results in place of its tokens, if all its prompts are cached."""
        if not self._takes(batch):
            return None
        with self._lock:
            found = [self._entries.get(key) for key in _keys(batch)]
            rows = [entry for entry in found if entry is not None]
            if len(rows) < len(found):
                self.misses += 1
                return None
            self.hits += 1
            for name in _keys(batch):
                self._entries.move_to_end(name)
        states = torch.stack([row for row, _ in rows])
        key = torch.stack([k for _, k in rows]) if batch.query_key is None else batch.query_key
        batch = replace(batch, input_ids=None, query_key=key)
        return replace(batch, text_kv=states) if self.keeps_kv else replace(batch, text=states)

    def clear(self) -> None:
        """Drop everything: cached values depend on the weights."""
        with self._lock:
            self._entries.clear()

    def _takes(self, batch: Request) -> bool:
        # With a query text, prompts and queries run as one batch of twice the size, which has other bits.
        return self.capacity > 0 and batch.input_ids is not None and batch.query_ids is None

    def remember(self, batch: Request, states: Tensor, key: Tensor) -> None:
        """Store copies of states (B, L, …) and key (B, K), whose buffers the next batch overwrites."""
        if not self._takes(batch):
            return
        key = key.to("cpu", copy=True)
        rows = [row.clone() if self.keeps_kv else row.to("cpu", copy=True) for row in states]
        with self._lock:
            for i, name in enumerate(_keys(batch)):
                self._entries[name] = (rows[i], key[i])
                self._entries.move_to_end(name)
            while len(self._entries) > self.capacity:
                self._entries.popitem(last=False)


def _keys(batch: Request) -> list[tuple[int, bytes]]:
    assert batch.input_ids is not None
    return [(len(batch), row.numpy().tobytes()) for row in batch.input_ids]
