"""Pairs with one caption and one image: which pair of a database was the first."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ragturbo.errors import DatabaseCorrupt
from ragturbo.retrieval.manifest import SegmentEntry, segment_path
from ragturbo.retrieval.report import Notes

REASON = "a duplicate of pair"


class FirstPairs:
    """The first id of each caption and image. Another caption of the same image is another pair."""

    def __init__(self) -> None:
        self._ids: dict[bytes, int] = {}

    def first(self, caption: str, sha256: str | None, id: int) -> int | None:
        """Return the earlier id of this caption and image; None if `id` is the first."""
        if sha256 is None:
            return None
        found = self._ids.setdefault(_digest(caption, sha256), id)
        return None if found == id else found

    def forget(self, caption: str, sha256: str | None) -> None:
        """Forget a pair that is not stored after all."""
        if sha256 is not None:
            self._ids.pop(_digest(caption, sha256), None)

    def add(self, folder: Path, entries: Iterable[SegmentEntry], removed: np.ndarray) -> None:
        """Add the pairs of segments without the removed ids."""
        gone = set(removed.tolist())
        for entry in entries:
            for row in _read(folder, entry, ["id", "caption", "sha256"]).to_pylist():
                if row["id"] not in gone:
                    self.first(row["caption"], row["sha256"], row["id"])


def _digest(caption: str, sha256: str) -> bytes:
    return hashlib.blake2b(f"{sha256} {caption}".encode(), digest_size=16).digest()


def note_duplicates(
    folder: Path, entries: Iterable[SegmentEntry], removed: np.ndarray, first_new: int, notes: Notes
) -> None:
    """Note each pair from id `first_new` on that repeats an earlier one.

    Args:
        entries: all segments of the database, in the order of their ids.
        removed: ids that do not count.
    """
    entries = [entry for entry in entries if entry.count]
    shas = [_read(folder, entry, ["sha256"]).column(0) for entry in entries]
    repeated = _repeated(shas)
    if not len(repeated):
        return
    firsts, gone = FirstPairs(), set(removed.tolist())
    for entry, sha in zip(entries, shas, strict=True):
        mask = pc.is_in(sha, value_set=repeated)
        if not pc.any(mask).as_py():
            continue
        for row in _read(folder, entry, ["id", "caption", "source", "sha256"]).filter(mask).to_pylist():
            if row["id"] in gone:
                continue
            first = firsts.first(row["caption"], row["sha256"], row["id"])
            if first is not None and row["id"] >= first_new:
                notes.add("duplicate", f"pair {row['id']} ({row['source'] or row['caption']}) repeats pair {first}")


def _repeated(shas: list[pa.ChunkedArray]) -> pa.Array:
    """The images that occur more than once. Most inputs have none, and then no caption is read."""
    chunks: Iterator[pa.Array] = (chunk for sha in shas for chunk in sha.chunks)
    counts = pc.value_counts(pa.chunked_array(list(chunks), pa.string()))
    values, times = counts.field("values"), counts.field("counts")
    return values.filter(pc.and_(pc.greater(times, 1), pc.is_valid(values)))


def _read(folder: Path, entry: SegmentEntry, columns: list[str]) -> pa.Table:
    path = segment_path(folder, entry.number, "parquet")
    try:
        return pq.ParquetFile(path).read(columns=columns, use_threads=False)
    except (pa.ArrowException, OSError, KeyError) as error:
        raise DatabaseCorrupt(f"{path}: not the pairs of a segment: {error}") from error
