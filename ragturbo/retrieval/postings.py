"""The words of one segment's captions: which rows hold a word, and how often."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np

from ragturbo.retrieval.words import words

_NONE = np.empty(0, np.int64)


class Postings:
    """An inverted index of captions. Immutable, as a segment is."""

    def __init__(self, captions: Sequence[str]) -> None:
        self._places: dict[str, int] = {}
        places = self._places
        tokens = [[places.setdefault(word, len(places)) for word in words(caption)] for caption in captions]
        self.lengths = np.array([len(row) for row in tokens], np.int64)
        """(n,) words of each caption."""
        total, n = int(self.lengths.sum()), max(len(tokens), 1)
        flat = np.fromiter(chain.from_iterable(tokens), np.int64, total)
        # Sorted by word, then by row.
        found, counts = np.unique(flat * n + np.repeat(np.arange(len(tokens)), self.lengths), return_counts=True)
        self._starts = np.searchsorted(found, np.arange(len(places) + 1) * n)
        self._rows, self._counts = found % n, counts.astype(np.float32)

    def of(self, word: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows that hold a word, ascending, and how often each does."""
        place = self._places.get(word)
        if place is None:
            return _NONE, _NONE
        part = slice(self._starts[place], self._starts[place + 1])
        return self._rows[part], self._counts[part]
