"""The one contract every engine runs: StepBatch in, StepResult out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass
class Retrieved:
    """What was found for B queries: ids (B, k) int64, scores (B, k) fp32, keys (B, k, K) fp32, h_retr (B, k, S, C).

    A missing neighbour has id -1, score NaN and rows of zeros. `scores` are the retriever's own; λ comes from `keys`,
    the stored keys, and so is the same for every retriever.
    """

    ids: Tensor
    scores: Tensor
    keys: Tensor
    h_retr: Tensor


class Source(Protocol):
    """A database as an engine sees it. One object is one generation: it never changes under a running batch."""

    def search(self, keys: Tensor, texts: Sequence[str] | None, k: int) -> tuple[Tensor, Tensor]: ...

    def gather(self, ids: Tensor, scores: Tensor) -> Retrieved: ...


@dataclass
class StepBatch:
    """B images that run together. Tensors have B rows; everything else is shared by all rows."""

    latents: Tensor
    """(B, c, h, w) fp32 unit Gaussian noise."""
    lam: Tensor
    """(B,) fp32; NaN where λ is the cosine."""
    w: Tensor
    """(B,) fp32, Eq. 3."""
    min_score: Tensor
    """(B,) fp32; -inf where every neighbour counts."""
    input_ids: Tensor | None = None
    """(B, L) int64, or None where `text` is given."""
    text: Tensor | None = None
    """(B, L, D) hidden states given by the caller."""
    context: Tensor | None = None
    """(B, L, ΣC): keys and values of the folded UNet's cross-attentions, remembered by the engine itself."""
    query_ids: Tensor | None = None
    """(B, L) int64: other text to search by."""
    query_key: Tensor | None = None
    """(B, K) fp32: a key to search by."""
    negative_ids: Tensor | None = None
    negative_text: Tensor | None = None
    retrieved: Retrieved | None = None
    """Neighbours given by the caller; None: search yourself."""
    texts: tuple[str, ...] = ()
    """What a lexical retriever searches by: the queries, or the prompts."""
    seeds: tuple[int | None, ...] = ()
    """For schedulers that draw noise on the way; None where the caller gave latents."""
    mode: str = "none"
    k: int = 0
    source: Source | None = None
    num_inference_steps: int = 1
    guidance_scale: float = 0.0
    per: str = "sample"
    want: str = "uint8"
    """"uint8", "float" or "latent"."""
    min_bucket: int = 1

    def __len__(self) -> int:
        return self.latents.shape[0]

    def slice(self, start: int, stop: int) -> StepBatch:
        fields: dict[str, Any] = {
            name: value[start:stop] for name in _ROW_FIELDS if (value := getattr(self, name)) is not None
        }
        if self.retrieved is not None:
            rows = {name: getattr(self.retrieved, name)[start:stop] for name in _RETRIEVED_FIELDS}
            fields["retrieved"] = Retrieved(**rows)
        return replace(self, seeds=self.seeds[start:stop], texts=self.texts[start:stop], **fields)

    @property
    def guided(self) -> bool:
        return self.guidance_scale > 1.0

    @property
    def key(self) -> tuple[Any, ...]:
        """Batches with equal keys may run as one."""
        tensors = [getattr(self, name) for name in _TEXT_FIELDS]
        given = None if self.retrieved is None else tuple(self.retrieved.h_retr.shape[1:])
        return (
            tuple(self.latents.shape[1:]),
            tuple(None if t is None else tuple(t.shape[1:]) for t in tensors),
            given,
            self.mode,
            self.k,
            id(self.source),
            self.num_inference_steps,
            self.guidance_scale,
            self.per,
            self.want,
            self.min_bucket,
        )


_TEXT_FIELDS = ("input_ids", "text", "query_ids", "query_key", "negative_ids", "negative_text")
_ROW_FIELDS = ("latents", "lam", "w", "min_score", *_TEXT_FIELDS)
_RETRIEVED_FIELDS = ("ids", "scores", "keys", "h_retr")


def join(batches: list[StepBatch], bucket: int) -> StepBatch:
    """Batches of one key as a single batch of `bucket` rows; the rows past their sum repeat the last one."""
    rows = sum(len(b) for b in batches)
    if len(batches) == 1 and rows == bucket:
        return batches[0]

    def stack(parts: list[Tensor]) -> Tensor:
        filler = parts[-1][-1:].expand(bucket - rows, *parts[-1].shape[1:])
        return torch.cat([*parts, filler])

    first = batches[0]
    fields: dict[str, Any] = {
        name: stack([getattr(b, name) for b in batches]) for name in _ROW_FIELDS if getattr(first, name) is not None
    }
    if first.retrieved is not None:
        given = [b.retrieved for b in batches if b.retrieved is not None]
        fields["retrieved"] = Retrieved(**{n: stack([getattr(r, n) for r in given]) for n in _RETRIEVED_FIELDS})
    for name in ("seeds", "texts"):
        values = tuple(v for b in batches for v in getattr(b, name))
        fields[name] = values + values[-1:] * (bucket - rows)
    return replace(first, **fields)


@dataclass
class StepResult:
    """B rows on the host. Rows of padding are still here; `rows` cuts a request's own out."""

    ok: Tensor
    """(B,) bool: every value of the row is finite."""
    lam: Tensor
    ids: Tensor
    scores: Tensor
    cosine: Tensor
    """(B, k)"""
    valid: Tensor
    uint8: Tensor | None = None
    """(B, H, W, 3)"""
    image: Tensor | None = None
    """(B, 3, H, W) fp32 in [0, 1]"""
    latents: Tensor | None = None
    timings: dict[str, float] = field(default_factory=dict)
    bucket: int = 0
    ended: float = 0.0
    """time.perf_counter() when the engine was done."""

    def rows(self, start: int, stop: int) -> StepResult:
        """Copies, so that one request's rows do not keep a whole batch alive; all rows are the batch itself."""
        if (start, stop) == (0, len(self.ok)):
            return self
        cut = {
            name: value[start:stop].clone() if isinstance(value := getattr(self, name), Tensor) else value
            for name in ("ok", "lam", "ids", "scores", "cosine", "valid", "uint8", "image", "latents")
        }
        return StepResult(**cut, timings=dict(self.timings), bucket=self.bucket, ended=self.ended)


class Engine(Protocol):
    name: str

    def run(self, batch: StepBatch) -> StepResult: ...

    def encode_pairs(self, captions: list[str], images: Tensor) -> tuple[Tensor, Tensor]:
        """Sec. 3.2 on the spot: images (B, 3, H, W) in [-1, 1] -> keys (B, K), features (B, T, C)."""
        ...

    def load_adapter(self, path: str | os.PathLike[str]) -> None: ...

    def describe(self) -> dict[str, Any]:
        """What was chosen and why, for `gen.info`."""
        ...
