"""One open generation, shared by readers and retrievers. Immutable: a change does not affect a running search."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np

from ragturbo.errors import DatabaseCorrupt, InvalidRequest
from ragturbo.messages import many
from ragturbo.retrieval import writer
from ragturbo.retrieval.manifest import Manifest, load, read_current
from ragturbo.retrieval.pairs import Record
from ragturbo.retrieval.segments import Segments


class UnknownId(InvalidRequest, KeyError):
    """No live pair has this id."""

    # That of KeyError shows the repr of the message.
    __str__ = Exception.__str__


class Snapshot:
    def __init__(self, folder: Path, manifest: Manifest, before: Snapshot | None = None) -> None:
        """before: a snapshot whose open segments are used where they are the same."""
        self.folder, self.manifest, self.geometry = folder, manifest, manifest.geometry
        held = None if before is None else before.segments
        same = held is not None and held.manifest.segments == manifest.segments
        self.segments: Segments = held if held is not None and same else Segments(folder, manifest, held)
        self.ids = self.segments.ids
        """(N,) int64, ascending, removed pairs included."""
        self.keys = self.segments.keys
        """(N, K) float16, L2-normalised."""
        removed = writer.removed_ids(folder, manifest)
        rows = self.segments.rows_of(removed)
        if (rows < 0).any():
            raise DatabaseCorrupt(f"{folder}: removed.npy names id {removed[rows < 0][0]}, which no segment holds")
        self.alive = np.ones(len(self.ids), bool)
        self.alive[rows] = False

    def __len__(self) -> int:
        return self.manifest.rows - self.manifest.removed

    @cached_property
    def key_mean(self) -> np.ndarray:
        """(K,) float32: mean of the stored keys, subtracted by centring."""
        return np.array(self.manifest.key_mean, np.float32)

    @cached_property
    def centred_norms(self) -> np.ndarray:
        """(N,) float32: lengths of the centred keys; infinity for a key that equals the mean and has no direction."""
        norms = np.empty(len(self.keys), np.float32)
        for start in range(0, len(self.keys), 16384):
            block = self.keys[start : start + 16384].astype(np.float32) - self.key_mean
            norms[start : start + 16384] = np.linalg.norm(block, axis=1)
        norms[norms == 0] = np.inf
        return norms

    def rows_of(self, ids: np.ndarray) -> np.ndarray:
        return self.segments.rows_of(ids)

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """Return the rows of ids (n,), -1 for id -1. Raises InvalidRequest for any other id that is not stored."""
        rows = self.segments.rows_of(ids)
        if len(rows) and rows.min() >= 0:
            return rows
        missing = (rows < 0) & (ids != -1)
        if missing.any():
            raise InvalidRequest(f"id {int(ids[missing][0])} is not in the database {self.folder}")
        return rows

    def record(self, id: int, thumbnail: bool = True) -> Record:
        row = self.rows_of(np.array([id]))
        if row[0] < 0:
            raise self._unknown(id)
        segments, inside = self.segments.locate(row)
        return self.segments.pairs[int(segments[0])].record(int(inside[0]), thumbnail)

    def live_record(self, id: int) -> Record:
        """Return the pair with an id, with its thumbnail. Raises UnknownId if there is none or it was removed."""
        row = int(self.rows_of(np.array([id]))[0]) if id < 2**63 else -1
        if row < 0 or not self.alive[row]:
            raise self._unknown(id, removed=row >= 0)
        return self.record(id)

    def _unknown(self, id: int, removed: bool = False) -> UnknownId:
        state = "was removed from" if removed else "is not in"
        hint = "; id -1 stands for a neighbour that was not found" if id == -1 else ""
        return UnknownId(f"pair {id} {state} the database {self.folder}, which has {self._range()}{hint}")

    def _range(self) -> str:
        live = self.ids[self.alive]
        return f"{many(len(live), 'pair')} from id {live[0]} to {live[-1]}" if len(live) else "no pairs"

    def records(self, thumbnails: bool = True) -> Iterator[Record]:
        """Yield all live pairs in the order of their ids."""
        segments = self.segments
        for start, stop, pairs in zip(segments.starts[:-1], segments.starts[1:], segments.pairs, strict=True):
            yield from pairs.records(np.flatnonzero(self.alive[start:stop]).tolist(), thumbnails)


def open_snapshot(folder: Path, before: Snapshot | None = None) -> Snapshot:
    """Open the current generation; start over if a writer replaces it and deletes its files meanwhile."""
    for _ in range(100):
        name = read_current(folder)
        try:
            return Snapshot(folder, load(folder), before)
        except DatabaseCorrupt:
            if read_current(folder) == name:
                raise
    raise DatabaseCorrupt(f"{folder}: its generation changed 100 times while it was being opened")
