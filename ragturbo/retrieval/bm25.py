"""BM25 over captions: search by words, for comparison and for names that embeddings miss."""

from __future__ import annotations

import sys
import threading
from types import ModuleType
from typing import Any

import numpy as np

from ragturbo.errors import InvalidRequest
from ragturbo.retrieval.retriever import check_k, excluded_ids
from ragturbo.retrieval.snapshot import Snapshot


class Bm25Retriever:
    """Scores are comparable within one query only. Captions without a common word are not found."""

    name = "bm25"
    query_kind = "text"

    def __init__(self, snapshot: Snapshot) -> None:
        bm25s = _bm25s()
        self.snapshot = snapshot
        self._tokenize = bm25s.tokenize
        self._index: Any = None
        tables = [pairs.text() for pairs in snapshot.segments.pairs]
        captions = [text for table in tables for text in table.column("caption").to_pylist()]
        tokens = bm25s.tokenize(captions, stopwords="en", show_progress=False)
        if tokens.vocab:
            self._index = bm25s.BM25()
            self._index.index(tokens, show_progress=False)

    def search(self, keys: Any, k: int, *, exclude: Any = None) -> tuple[np.ndarray, np.ndarray]:
        """keys: B prompts."""
        check_k(k)
        prompts = [keys] if isinstance(keys, str) else keys
        if not isinstance(prompts, (list, tuple)) or not all(isinstance(prompt, str) for prompt in prompts):
            raise InvalidRequest(f"retriever 'bm25' searches by text: give prompts (str), not {type(keys).__name__}")
        banned = excluded_ids(exclude, len(prompts))
        ids = np.full((len(prompts), k), -1, np.int64)
        scores = np.full((len(prompts), k), np.nan, np.float32)
        for row, prompt in enumerate(prompts):
            found = self._scores(prompt)
            if found is None:
                continue
            found[~self.snapshot.alive] = 0
            if banned is not None:
                hidden = self.snapshot.rows_of(banned[row])
                found[hidden[hidden >= 0]] = 0
            width = min(k, len(found))
            top = np.argpartition(-found, width - 1)[:width]
            top = top[np.lexsort((top, -found[top]))]
            top = top[found[top] > 0]
            ids[row, : len(top)] = self.snapshot.ids[top]
            scores[row, : len(top)] = found[top]
        return ids, scores

    def _scores(self, prompt: str) -> np.ndarray | None:
        if self._index is None:
            return None
        words = self._tokenize([prompt], stopwords="en", show_progress=False, return_ids=False)[0]
        known = [word for word in words if word in self._index.vocab_dict]
        return np.array(self._index.get_scores(known), np.float32) if known else None


_importing = threading.Lock()


def _bm25s() -> ModuleType:
    """Import bm25s as if JAX were not installed.

    Otherwise bm25s runs a JAX operation at import, and the first one on a GPU reserves three quarters of its memory.
    While it is imported, importing JAX in another thread fails.
    """
    with _importing:
        if "bm25s" in sys.modules:
            import bm25s

            return bm25s
        missing = object()
        jax: Any = sys.modules.get("jax", missing)
        sys.modules["jax"] = None  # type: ignore[assignment]
        try:
            import bm25s
        finally:
            if jax is missing:
                del sys.modules["jax"]
            else:
                sys.modules["jax"] = jax
        return bm25s
