"""What retrieval and an engine return: `Retrieved` rows and the `Result` of a batch."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor


@dataclass
class Retrieved:
    """Neighbours of B images: ids (B, k) int64, scores (B, k) fp32, keys (B, k, K) fp32, h_retr (B, k, S, C).

    A missing neighbour has id -1, score NaN and rows of zeros. `scores` are the retriever's own. λ is computed from
    `keys`, the stored keys, and `rare_share` (B, k), see `Hits`; None for zeros.
    """

    ids: Tensor
    scores: Tensor
    keys: Tensor
    h_retr: Tensor
    rare_share: Tensor | None = None

    def __post_init__(self) -> None:
        if self.rare_share is None:
            self.rare_share = torch.zeros(self.ids.shape, device=self.ids.device)

    def map(self, function: Any) -> Retrieved:
        return Retrieved(*(function(getattr(self, name)) for name in RETRIEVED_FIELDS))


RETRIEVED_FIELDS = tuple(f.name for f in fields(Retrieved))


@dataclass
class Result:
    """B rows on the host. An engine's result includes padding rows; `rows` takes out one request's."""

    ok: Tensor
    """(B,) bool: every value of the row is finite."""
    lam: Tensor
    """(B,) λ of Eq. 5: the largest of `lams`."""
    ids: Tensor
    """(B, k), as all up to `lams`."""
    scores: Tensor
    cosine: Tensor
    valid: Tensor
    bm25: Tensor
    """NaN unless the retriever is hybrid."""
    lams: Tensor
    """λ of each neighbour."""
    uint8: Tensor | None = None
    """(B, H, W, 3)"""
    image: Tensor | None = None
    """(B, 3, H, W) fp32 in [0, 1]"""
    latents: Tensor | None = None
    timings: dict[str, float] = field(default_factory=dict)
    bucket: int = 0
    """Rows of the batch, padding included."""
    ended: float = 0.0
    """time.perf_counter() when the engine had finished."""

    def rows(self, start: int, stop: int) -> Result:
        """Copy out some rows, so that one request does not keep the whole batch alive. All rows: the result itself."""
        if (start, stop) == (0, len(self.ok)):
            return self
        cut = {name: value[start:stop].clone() for name, value in self._tensors().items()}
        return Result(**cut, timings=dict(self.timings), bucket=self.bucket, ended=self.ended)

    @classmethod
    def without_neighbours(cls, ok: Tensor, **images: Any) -> Result:
        none = torch.empty((len(ok), 0))
        return cls(ok, torch.zeros(len(ok)), none.long(), none, none, none.bool(), none, none, **images)

    @staticmethod
    def join(results: list[Result]) -> Result:
        """The results of one request's pieces as one. Times are summed, except the wait in the queue: a piece also
        waits for the pieces before it, so the request's wait is that of the first piece."""
        if len(results) == 1:
            return results[0]
        parts = [result._tensors() for result in results]
        timings: dict[str, float] = {}
        for result in results:
            for stage, seconds in result.timings.items():
                timings[stage] = timings.get(stage, 0.0) + seconds
        timings["queue"] = min(result.timings["queue"] for result in results)
        return Result(
            **{name: torch.cat([part[name] for part in parts]) for name in parts[0]},
            timings=timings,
            bucket=max(result.bucket for result in results),
            ended=max(result.ended for result in results),
        )

    def _tensors(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
