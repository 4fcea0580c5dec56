"""BM25 over captions: search by words, which finds names that the text encoder does not know.

Postings belong to a segment and are kept for as long as it exists. Document frequencies are sums over the live pairs of
all segments, so that scores do not depend on how pairs are divided into segments.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from ragturbo.errors import InvalidRequest
from ragturbo.retrieval.items import kind_of
from ragturbo.retrieval.retriever import check_k, excluded_ids
from ragturbo.retrieval.snapshot import Snapshot
from ragturbo.retrieval.words import may_be_name, words

# Lucene's constants and formula.
_K1, _B = 1.5, 0.75


def rare_at_most(pairs: int) -> int:
    """The number of captions that may hold a rare word: half the square root of all, 2 of 20 and 70 of 20,000."""
    return max(1, math.isqrt(pairs) // 2)


@dataclass(frozen=True)
class Matches:
    """What a text has in common with every caption."""

    bm25: np.ndarray
    """(N,) fp32 by row; 0 for rows that are removed or excluded."""
    rare_share: np.ndarray | None
    """(N,) by row: the share of the text's rare words that the caption holds, weighted by idf; None without any."""

    def best(self, k: int) -> np.ndarray:
        """Return at most k rows, best first. If the text has rare words, only captions with one of them count, and
        those with the larger share come first. Of equal captions, the older one comes first."""
        if self.rare_share is not None:
            rows = np.flatnonzero(self.rare_share)
            return rows[np.lexsort((rows, -self.bm25[rows], -self.rare_share[rows]))][:k]
        rows = np.flatnonzero(self.bm25)
        scores = self.bm25[rows]
        if len(rows) > k:
            rows = rows[scores >= np.partition(scores, -k)[-k]]
        return rows[np.argsort(-self.bm25[rows], kind="stable")][:k]


class Bm25Retriever:
    """Scores are comparable within one query only. Captions without a common word are not found."""

    name = "bm25"
    query_kind = "text"

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        segments = snapshot.segments
        self._parts = [
            (int(start), pairs.postings()) for start, pairs in zip(segments.starts[:-1], segments.pairs, strict=True)
        ]
        lengths = np.concatenate([np.empty(0, np.int64), *(part.lengths for _, part in self._parts)])
        mean = lengths[snapshot.alive].mean() if len(snapshot) else 0.0
        self._norms = (_K1 * (1 - _B + _B * lengths / (mean or 1.0))).astype(np.float32)

    def search(self, keys: Any, k: int, *, exclude: Any = None) -> tuple[np.ndarray, np.ndarray]:
        """keys: B prompts."""
        check_k(k)
        prompts = [keys] if isinstance(keys, str) else keys
        if not isinstance(prompts, (list, tuple)) or not all(isinstance(prompt, str) for prompt in prompts):
            raise InvalidRequest(f"retriever 'bm25' searches by text: give prompts, not {kind_of(keys)}")
        banned = excluded_ids(exclude, len(prompts))
        ids = np.full((len(prompts), k), -1, np.int64)
        scores = np.full((len(prompts), k), np.nan, np.float32)
        for row, prompt in enumerate(prompts):
            bm25 = self.match(prompt, None if banned is None else banned[row]).bm25
            top = Matches(bm25, None).best(k)
            ids[row, : len(top)] = self.snapshot.ids[top]
            scores[row, : len(top)] = bm25[top]
        return ids, scores

    def match(self, text: str, exclude: np.ndarray | None = None) -> Matches:
        """Compare a text with every caption. exclude: ids that must not be found."""
        pairs = len(self.snapshot)
        most = rare_at_most(pairs)
        bm25 = np.zeros(len(self.snapshot.ids), np.float32)
        rare: list[tuple[np.ndarray, float]] = []
        for word, times in Counter(words(text)).items():
            rows, counts = self._postings(word)
            if not len(rows):
                continue
            idf = math.log(1 + (pairs - len(rows) + 0.5) / (len(rows) + 0.5))
            bm25[rows] += np.float32(times * idf) * counts / (counts + self._norms[rows])
            if len(rows) <= most and may_be_name(word):
                rare.append((rows, idf))
        share = None
        if rare:
            share = np.zeros(len(bm25))
            total = sum(idf for _, idf in rare)
            for rows, idf in rare:
                share[rows] += idf / total
        if exclude is not None:
            hidden = self.snapshot.rows_of(exclude)
            for values in (bm25, share):
                if values is not None:
                    values[hidden[hidden >= 0]] = 0
        return Matches(bm25, share)

    def _postings(self, word: str) -> tuple[np.ndarray, np.ndarray]:
        """The live rows of the generation that hold a word, and how often each does."""
        if len(self._parts) == 1:
            rows, counts = self._parts[0][1].of(word)
        else:
            found = [(rows + start, counts) for start, part in self._parts for rows, counts in [part.of(word)]]
            rows = np.concatenate([np.empty(0, np.int64), *(rows for rows, _ in found)])
            counts = np.concatenate([np.empty(0, np.float32), *(counts for _, counts in found)])
        if not self.snapshot.manifest.removed:
            return rows, counts
        alive = self.snapshot.alive[rows]
        return rows[alive], counts[alive]
