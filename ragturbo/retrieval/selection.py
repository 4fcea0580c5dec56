"""Selection among a retriever's candidates: minimum score, near-duplicates, diversity."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ragturbo.checks import FLOAT32_MAX, number
from ragturbo.errors import InvalidRequest
from ragturbo.retrieval.retriever import MAX_K
from ragturbo.retrieval.snapshot import Snapshot


@dataclass(frozen=True)
class Selection:
    """Options of a search.

    min_score: on the scale of the retriever.
    max_similarity: drop candidates whose key has at least this cosine with a better one.
    diversity: 0 selects the best scores, 1 the most different keys (maximal marginal relevance, λ = 1 - diversity).
    """

    min_score: float | None = None
    max_similarity: float | None = None
    diversity: float = 0.0

    def __post_init__(self) -> None:
        # Numbers of NumPy become Python's.
        if self.min_score is not None:
            object.__setattr__(self, "min_score", number("min_score", self.min_score, -FLOAT32_MAX))
        if self.max_similarity is not None:
            object.__setattr__(self, "max_similarity", number("max_similarity", self.max_similarity, -1.0, 1.0))
            if self.max_similarity == -1:
                raise InvalidRequest("max_similarity=-1 would drop every candidate but the best; use k=1")
        object.__setattr__(self, "diversity", number("diversity", self.diversity, 0.0, 1.0))

    @property
    def compares(self) -> bool:
        """Whether candidates are compared with each other, which needs more than k of them."""
        return self.max_similarity is not None or self.diversity > 0

    def candidates(self, k: int) -> int:
        return min(max(4 * k, k + 32), MAX_K) if self.compares else k

    def apply(self, ids: np.ndarray, scores: np.ndarray, k: int, snapshot: Snapshot) -> tuple[np.ndarray, np.ndarray]:
        """ids, scores (B, n), n ≥ k, best first -> (B, k)."""
        out_ids = np.full((len(ids), k), -1, np.int64)
        out_scores = np.full((len(ids), k), np.nan, np.float32)
        good = ids >= 0
        if self.min_score is not None:
            good &= scores >= self.min_score
        for row, chosen in enumerate(map(np.flatnonzero, good)):
            if self.compares and len(chosen):
                chosen = chosen[self._choose(ids[row][chosen], scores[row][chosen], k, snapshot)]
            chosen = chosen[:k]
            out_ids[row, : len(chosen)] = ids[row][chosen]
            out_scores[row, : len(chosen)] = scores[row][chosen]
        return out_ids, out_scores

    def _choose(self, ids: np.ndarray, scores: np.ndarray, k: int, snapshot: Snapshot) -> list[int]:
        """Greedy maximal marginal relevance: (1 - d)·score - d·(largest cosine with the chosen ones)."""
        keys = snapshot.keys[snapshot.rows(ids)].astype(np.float32)
        cosines = keys @ keys.T
        # Scores may be of any size (BM25) and are scaled down to that of a cosine.
        spread = max(float(np.abs(scores).max()), 1.0)
        relevance = scores / spread
        left = np.ones(len(ids), bool)
        nearest = np.full(len(ids), -np.inf, np.float32)
        chosen: list[int] = []
        while len(chosen) < k and left.any():
            penalty = np.where(np.isfinite(nearest), nearest, 0)
            value = (1 - self.diversity) * relevance - self.diversity * penalty
            value[~left] = -np.inf
            best = int(value.argmax())
            chosen.append(best)
            left[best] = False
            nearest = np.maximum(nearest, cosines[best])
            if self.max_similarity is not None:
                left &= nearest < self.max_similarity
        return chosen
