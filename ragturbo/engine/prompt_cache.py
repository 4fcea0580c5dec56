"""A bounded memory of what the text encoder said, for services that see the same prompts again."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import replace

import torch
from torch import Tensor

from ragturbo.engine.step import StepBatch


class PromptCache:
    """The last `capacity` prompts, by exact tokens and bucket, least recently used out first: their retrieval key, and
    their hidden states on the host or, `as_context`, the keys and values of all cross-attentions on the device.

    The bucket belongs to the key: an encoder's bits depend on the batch it ran in, and the same prompt, seed and bucket
    must give the same bytes whether it was remembered or not.
    """

    def __init__(self, capacity: int, *, as_context: bool = False) -> None:
        self.capacity, self.as_context = capacity, as_context
        self._entries: OrderedDict[tuple[int, bytes], tuple[Tensor, Tensor]] = OrderedDict()
        self._lock = threading.Lock()
        self.hits = self.misses = 0

    def __len__(self) -> int:
        return len(self._entries)

    def known(self, batch: StepBatch) -> StepBatch | None:
        """The batch with what is remembered in the place of tokens, if every one of its prompts is known."""
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
        return replace(batch, context=states) if self.as_context else replace(batch, text=states)

    def clear(self) -> None:
        """After new weights: keys and values are products of them."""
        with self._lock:
            self._entries.clear()

    def _takes(self, batch: StepBatch) -> bool:
        # With another text to search by, the two run as one batch of the encoder: other bits.
        return self.capacity > 0 and batch.input_ids is not None and batch.query_ids is None

    def remember(self, batch: StepBatch, states: Tensor, key: Tensor) -> None:
        """states: (B, L, …), key: (B, K), as this batch's prompts gave them. Copies: both are another batch's next."""
        if not self._takes(batch):
            return
        key = key.to("cpu", copy=True)
        rows = [row.clone() if self.as_context else row.to("cpu", copy=True) for row in states]
        with self._lock:
            for i, name in enumerate(_keys(batch)):
                self._entries[name] = (rows[i], key[i])
                self._entries.move_to_end(name)
            while len(self._entries) > self.capacity:
                self._entries.popitem(last=False)


def _keys(batch: StepBatch) -> list[tuple[int, bytes]]:
    assert batch.input_ids is not None
    return [(len(batch), row.numpy().tobytes()) for row in batch.input_ids]
