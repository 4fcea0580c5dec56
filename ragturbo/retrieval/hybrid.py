"""Search by keys and by words at once, fused by the ranks in both lists."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ragturbo.errors import InvalidRequest
from ragturbo.retrieval.bm25 import Bm25Retriever
from ragturbo.retrieval.retriever import Hits, Retriever, check_k, excluded_ids, like, to_numpy

# Reciprocal rank fusion: the constant of Cormack et al. 2009, and the candidates taken from each list. ScaNN's index is
# tuned for 16 neighbours.
_RRF = 60
_DEPTH = 16


class HybridRetriever:
    """Score: the share of the query's rare words that the caption holds, plus 1 / (60 + rank) for each list.

    Captions with the query's one rare word (see `rare_at_most`) come first: their share is 1, and captions without it
    score at most 1 / 61. Their order is decided by BM25 and by the keys. Without a rare word, this is plain reciprocal
    rank fusion. Of equal scores, the lower id comes first.
    """

    name = "hybrid"
    query_kind = "both"

    def __init__(self, dense: Retriever, lexical: Bm25Retriever) -> None:
        self.dense, self.lexical = dense, lexical
        self.snapshot = lexical.snapshot

    def search(self, keys: Any, k: int, *, texts: Sequence[str] | None = None, exclude: Any = None) -> tuple[Any, Any]:
        hits = self.find(keys, k, texts=texts, exclude=exclude)
        return hits.ids, hits.scores

    def find(self, keys: Any, k: int, *, texts: Sequence[str] | None, exclude: Any = None) -> Hits:
        """keys: (B, K); texts: B queries, "" to search by the key alone."""
        check_k(k)
        if isinstance(texts, str) or texts is None or len(texts) != len(keys):
            raise InvalidRequest(
                f"retriever 'hybrid' searches by keys and words: give texts, one for each of {len(keys)} keys"
            )
        dense, cosines = map(to_numpy, self.dense.search(keys, max(k, _DEPTH), exclude=exclude))
        dense = np.take_along_axis(dense, np.lexsort((dense, -cosines)), 1)
        banned = excluded_ids(exclude, len(texts))
        ids = np.full((len(texts), k), -1, np.int64)
        scores, bm25 = (np.full((len(texts), k), np.nan, np.float32) for _ in range(2))
        shares = np.zeros((len(texts), k), np.float32)
        for i, text in enumerate(texts):
            matches = self.lexical.match(text, None if banned is None else banned[i])
            fused: dict[int, float] = {}
            for rows in (self.snapshot.rows_of(dense[i][dense[i] >= 0]), matches.best(max(k, _DEPTH))):
                for rank, row in enumerate(rows.tolist(), 1):
                    fused[row] = fused.get(row, 0.0) + 1 / (_RRF + rank)
            share = {row: 0.0 if matches.rare_share is None else float(matches.rare_share[row]) for row in fused}
            best = sorted(fused, key=lambda row: (-share[row] - fused[row], row))[:k]
            n, found = len(best), np.array(best, np.int64)
            ids[i, :n], bm25[i, :n] = self.snapshot.ids[found], matches.bm25[found]
            scores[i, :n], shares[i, :n] = [share[r] + fused[r] for r in best], [share[r] for r in best]
        return Hits(*like(keys, ids, scores), *like(keys, bm25, shares))
