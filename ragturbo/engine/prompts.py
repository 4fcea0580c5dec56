"""A bounded memory of what the text encoder said, for services that see the same prompts again."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import replace

import torch
from torch import Tensor

from ragturbo.engine.step import StepBatch


class PromptCache:
    """The last `capacity` prompts' hidden states and keys, by exact tokens and bucket, least recently used out first.

    The bucket belongs to the key: an encoder's bits depend on the batch it ran in, and the same prompt, seed and bucket
    must give the same bytes whether it was remembered or not.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._entries: OrderedDict[tuple[int, bytes], tuple[Tensor, Tensor]] = OrderedDict()
        self._lock = threading.Lock()
        self.hits = self.misses = 0

    def __len__(self) -> int:
        return len(self._entries)

    def known(self, batch: StepBatch) -> StepBatch | None:
        """The batch with hidden states in the place of tokens, if every one of its prompts is known."""
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
        text = torch.stack([hidden for hidden, _ in rows])
        key = torch.stack([k for _, k in rows]) if batch.query_key is None else batch.query_key
        return replace(batch, input_ids=None, text=text, query_key=key)

    def _takes(self, batch: StepBatch) -> bool:
        # With another text to search by, the two run as one batch of the encoder: other bits.
        return self.capacity > 0 and batch.input_ids is not None and batch.query_ids is None

    def remember(self, batch: StepBatch, hidden: Tensor, key: Tensor) -> None:
        """hidden: (B, L, D), key: (B, K), as the encoder gave them for this batch's prompts."""
        if not self._takes(batch):
            return
        # On the host: a later request brings them to the device with the rest of what it brings.
        hidden, key = hidden.to("cpu", copy=True), key.to("cpu", copy=True)
        with self._lock:
            for i, name in enumerate(_keys(batch)):
                self._entries[name] = (hidden[i], key[i])
                self._entries.move_to_end(name)
            while len(self._entries) > self.capacity:
                self._entries.popitem(last=False)


def _keys(batch: StepBatch) -> list[tuple[int, bytes]]:
    assert batch.input_ids is not None
    return [(len(batch), row.numpy().tobytes()) for row in batch.input_ids]
