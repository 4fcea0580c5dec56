"""`ragturbo.Database`: open, search, read, change and verify a folder of pairs and their H-space features."""

from __future__ import annotations

import importlib.util
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ragturbo.errors import DatabaseCorrupt, DatabaseError, DatabaseMismatch, InvalidRequest
from ragturbo.retrieval import scann, writer
from ragturbo.retrieval.compact import compact
from ragturbo.retrieval.durable import writer_lock
from ragturbo.retrieval.format import Geometry, decode_rows
from ragturbo.retrieval.info import DatabaseInfo, describe
from ragturbo.retrieval.manifest import load
from ragturbo.retrieval.pairs import Record
from ragturbo.retrieval.reindex import reindex
from ragturbo.retrieval.retriever import EXACT_BELOW, Retriever, check_k, check_results, like, to_ids, to_numpy
from ragturbo.retrieval.selection import Selection
from ragturbo.retrieval.snapshot import Snapshot, open_snapshot
from ragturbo.retrieval.verify import problems

if TYPE_CHECKING:
    import torch

    from ragturbo.retrieval.build import BuildReport
    from ragturbo.retrieval.encoder import PairEncoder

RETRIEVERS = ("auto", "scann", "exact", "bm25", "hybrid")


class Database:
    """A database folder at one generation. Thread-safe; `refresh()` moves it to the newest generation."""

    def __init__(self, folder: Path, snapshot: Snapshot, *, retriever: Any = "auto", checksums: bool = True,
                 threads: int = 2, device: Any = "cpu") -> None:  # fmt: skip
        _check_retriever(retriever, snapshot)
        self.path = folder
        self.checksums, self.threads, self.device = checksums, threads, device
        self.asked_retriever: Any = retriever
        """The `retriever` that `open` was given. `choice()` returns what "auto" resolves to."""
        self._state: tuple[Snapshot, dict[Any, Retriever]] = (snapshot, {})
        self._lock = threading.RLock()
        self._frozen = False

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, verify: str = "quick", retriever: Any = "auto",
             checksums: bool = True, threads: int = 2, device: Any = "cpu") -> Database:  # fmt: skip
        """Open the newest generation of a database. No index is loaded before the first search needs one.

        Args:
            verify: "quick" checks the manifest, file sizes, record tables and keys; "full" reads every byte.
            retriever: "auto", "exact", "scann", "bm25", "hybrid" or an object with `search` (see `Retriever`).
            checksums: check each record against its CRC-32 as it is read.
            threads: threads for reading records.
            device: where exact search keeps its keys.

        Raises:
            InvalidRequest: unknown retriever.
            DatabaseError: no database, or the retriever's package or index is missing.
            DatabaseCorrupt: a file is damaged.
        """
        if verify not in ("quick", "full"):
            raise InvalidRequest(f"verify={verify!r} must be 'quick' or 'full'")
        folder = Path(path).expanduser()
        database = cls(folder, open_snapshot(folder), retriever=retriever, checksums=checksums, threads=threads,
                       device=device)  # fmt: skip
        if verify == "full":
            database.verify("full")
        return database

    @classmethod
    def build(cls, pairs: Any, path: str | os.PathLike[str], **options: Any) -> Database:
        """Encode `pairs` into a new database and index it. Options: see `ragturbo.retrieval.build.build`."""
        from ragturbo.retrieval.build import build

        build(pairs, path, **options)
        return cls.open(path)

    @classmethod
    def write(cls, path: str | os.PathLike[str], batches: Any, *, geometry: Geometry, key_kind: str = "pooled",
              encoder: dict[str, Any] | None = None, segment_records: int | None = None) -> Database:  # fmt: skip
        """Store pairs that are already encoded: batches of (records, keys (n, K), features (n, T, C)).

        Appends if there is a database at `path`, which must have the same geometry, key kind and encoder.
        """
        folder = Path(path).expanduser()
        start = writer.empty_manifest(geometry, key_kind, encoder or {}, segment_records)
        writer.write_encoded(folder, start, batches)
        return cls.open(folder)

    @classmethod
    def copy(cls, source: str | os.PathLike[str], path: str | os.PathLike[str]) -> Database:
        """Copy a database to a new folder, with the same ids, and open the copy.

        Args:
            source: a folder, or a model with a database of its own: "shapes", a model's folder or a hub id.

        Raises:
            DatabaseError: there is no such database, or `path` holds something already.
        """
        from ragturbo.retrieval.copy import copy, find

        folder = Path(path).expanduser()
        copy(find(source), folder)
        return cls.open(folder)

    @property
    def snapshot(self) -> Snapshot:
        return self._state[0]

    @property
    def geometry(self) -> Geometry:
        return self.snapshot.geometry

    @property
    def encoder(self) -> dict[str, Any]:
        """Fingerprints and settings of the encoder that made the keys and features."""
        return dict(self.snapshot.manifest.encoder)

    @property
    def key_kind(self) -> str:
        return self.snapshot.manifest.key_kind

    def __len__(self) -> int:
        return len(self.snapshot)

    def __repr__(self) -> str:
        return f"Database({str(self.path)!r}, {len(self)} pairs, generation {self.snapshot.manifest.generation})"

    @property
    def ids(self) -> np.ndarray:
        """All live ids, ascending."""
        return self.snapshot.ids[self.snapshot.alive]

    @property
    def info(self) -> DatabaseInfo:
        return describe(self.snapshot, *self.choice())

    def frozen(self) -> Database:
        """Return a view of this generation that no later `append`, `remove` or `refresh` changes."""
        view = Database.__new__(Database)
        view.__dict__.update(self.__dict__)
        view._lock = threading.RLock()
        view._frozen = True
        return view

    def refresh(self) -> bool:
        """Move to the newest generation; returns whether there was a newer one. Running searches keep the old one."""
        with self._lock:
            manifest = load(self.path)
            before, ready = self._state
            if manifest.generation == before.manifest.generation:
                return False
            snapshot, kept = open_snapshot(self.path, before), dict[Any, Retriever]()
            index = ready.get(("scann", None))
            if isinstance(index, scann.ScannRetriever) and snapshot.manifest.index == before.manifest.index:
                # The index is unchanged, so it is not loaded again.
                kept["scann", None] = scann.ScannRetriever(snapshot, before=index)
            self._state = (snapshot, kept)
            return True

    def check_encoder(self, fingerprints: Mapping[str, str], key_kind: str) -> None:
        """Raise DatabaseMismatch if the database was built by a model with other fingerprints or another key."""
        if key_kind != self.key_kind:
            raise DatabaseMismatch(f"{self.path} has {self.key_kind!r} keys, the model makes {key_kind!r} ones")
        for part, found in fingerprints.items():
            built = self.encoder.get(part)
            if built is not None and built != found:
                raise DatabaseMismatch(
                    f"{self.path} was built with another {part}: its fingerprint is {built}, the model's is {found}. "
                    "Build the database again with this model, or load the model it was built with."
                )

    def choice(self) -> tuple[str, str]:
        """Return the name of the retriever that searches by default, and why it was chosen."""
        return self._choice(self.snapshot)

    def _choice(self, snapshot: Snapshot) -> tuple[str, str]:
        asked = self.asked_retriever
        if not isinstance(asked, str):
            return getattr(asked, "name", type(asked).__name__), "given by the caller"
        return (asked, "requested") if asked != "auto" else self._by_size(snapshot)

    def _by_size(self, snapshot: Snapshot) -> tuple[str, str]:
        if len(snapshot) < EXACT_BELOW:
            return "exact", f"{len(snapshot)} pairs, fewer than {EXACT_BELOW}: brute force is exact and as fast"
        if snapshot.manifest.index is None:
            return "exact", "the database has no index; make one with `ragturbo db reindex`"
        if not scann.available():
            return "exact", "the package scann is not installed"
        return "scann", f"{len(snapshot)} pairs with a saved index"

    def retriever(self, name: Any = None, *, centred: bool | None = None) -> Retriever:
        """Return a retriever of this generation. The first call for a kind of retriever loads its index.

        Args:
            name: "exact", "scann", "bm25", "hybrid" or an object with `search`; None and "auto": the default.
            centred: subtract the mean of the keys before the cosine; None: the setting of this database.
        """
        snapshot, ready = self._state
        # Called by every search: a retriever that was made before is returned without checks.
        if (name is None or type(name) is str) and (found := ready.get((name, centred))) is not None:
            return found
        asked = self.asked_retriever if name is None or (isinstance(name, str) and name == "auto") else name
        _check_retriever(asked, snapshot)
        if not isinstance(asked, str):
            return asked
        kind = self._choice(snapshot)[0] if asked == "auto" else asked
        mean = snapshot.manifest.centred if centred is None else centred
        with self._lock:
            try:
                found = self._made(kind, mean, snapshot, ready)
            except DatabaseCorrupt:
                # The generation may have been replaced, and its index deleted, since it was opened.
                if self._frozen or not self.refresh():
                    raise
                return self.retriever(name, centred=centred)
            ready[name, centred] = found
            return found

    def _made(self, kind: str, centred: bool, snapshot: Snapshot, ready: dict[Any, Any]) -> Any:
        key = (kind, centred if kind in ("exact", "hybrid") else None)
        if key not in ready:
            ready[key] = self._make(kind, centred, snapshot, ready)
        return ready[key]

    def _make(self, kind: str, centred: bool, snapshot: Snapshot, ready: dict[Any, Any]) -> Retriever:
        if kind == "scann":
            return scann.ScannRetriever(snapshot)
        if kind == "bm25":
            from ragturbo.retrieval.bm25 import Bm25Retriever

            return Bm25Retriever(snapshot)
        if kind == "hybrid":
            from ragturbo.retrieval.hybrid import HybridRetriever

            dense = self._made(self._by_size(snapshot)[0], centred, snapshot, ready)
            return HybridRetriever(dense, self._made("bm25", centred, snapshot, ready))
        from ragturbo.retrieval.exact import ExactRetriever

        return ExactRetriever(snapshot, device=self.device, centred=centred)

    def search(
        self, keys: Any, k: int = 1, *, texts: Sequence[str] | None = None, exclude: Any = None,
        min_score: float | None = None, max_similarity: float | None = None, diversity: float = 0.0,
        centred: bool | None = None, retriever: Any = None,
    ) -> tuple[Any, Any]:  # fmt: skip
        """Find the k nearest pairs of each query.

        Args:
            keys: (B, K) floats; a list of prompts for bm25.
            texts: B prompts, for hybrid.
            exclude: ids that are not returned, (m,) for all queries or (B, m) per query, padded with -1.
            min_score, max_similarity, diversity: see `Selection`.
            centred, retriever: see `retriever`.

        Returns:
            ids (B, k) int64 and scores (B, k) float32, best first; -1 and NaN if there are fewer than k neighbours.
        """
        plain = texts is None and min_score is None and max_similarity is None and not diversity and centred is None
        if plain and exclude is None and (retriever is None or type(retriever) is str):
            # A short path for the common call: a search in ScaNN's tables evicts Python's own data from the CPU cache.
            ready = self._state[1].get((retriever, None))
            if type(ready) is scann.ScannRetriever and (found := ready.search_one(keys, k)) is not None:
                return found
        searcher: Any = self.retriever(retriever, centred=centred)
        name = getattr(searcher, "name", type(searcher).__name__)
        both = getattr(searcher, "query_kind", "key") == "both"
        if texts is not None and not both:
            raise InvalidRequest(f"texts has no effect with retriever {name!r}; use 'hybrid'")
        if isinstance(searcher, scann.ScannRetriever):
            if plain:
                return searcher.search(keys, k, exclude=exclude)
            if centred is not None and searcher.config.centred != centred:
                state = "not " if centred else ""
                raise InvalidRequest(f"the ScaNN index is {state}centred; reindex it, or use retriever='exact'")
        check_k(k)
        selection = Selection(min_score, max_similarity, diversity)
        many = selection.candidates(k)
        ids, scores = searcher.search(keys, many, exclude=exclude, **({"texts": texts} if both else {}))
        check_results(ids, scores, len(keys), many, name)
        if selection == Selection():
            return ids, scores
        snapshot = getattr(searcher, "snapshot", self.snapshot)
        return like(ids, *selection.apply(to_numpy(ids), to_numpy(scores), k, snapshot))

    def rows(self, ids: Any) -> np.ndarray:
        """ids (…,) -> the records as stored, (…, record bytes) uint8. Zeros for id -1."""
        snapshot, array = self.snapshot, to_ids(ids)
        rows = snapshot.rows(array.reshape(-1))
        out = np.zeros((len(rows), self.geometry.record_bytes), np.uint8)
        stored = np.flatnonzero(rows >= 0)
        if len(stored):
            snapshot.segments.read_into(
                rows[stored], out, slots=stored, checksums=self.checksums, threads=self.threads
            )  # fmt: skip
        return out.reshape(*array.shape, -1)

    def features(self, ids: Any) -> torch.Tensor:
        """ids (…,) -> (…, T, C) on the CPU: float16 as stored, int8 dequantised to float32. Zeros for id -1."""
        import torch

        rows = self.rows(ids)
        flat = decode_rows(rows.reshape(-1, rows.shape[-1]), self.geometry)
        return torch.from_numpy(flat).reshape(*rows.shape[:-1], self.geometry.tokens, self.geometry.channels)

    def keys(self, ids: Any) -> torch.Tensor:
        """ids (…,) -> (…, K) float32 on the CPU: normalised, not centred. Zeros for id -1."""
        import torch

        snapshot, array = self.snapshot, to_ids(ids)
        rows = snapshot.rows(array.reshape(-1))
        keys = np.zeros((len(rows), self.geometry.key_dim), np.float32)
        keys[rows >= 0] = snapshot.keys[rows[rows >= 0]]
        return torch.from_numpy(keys).reshape(*array.shape, -1)

    def records(self, ids: Any, *, thumbnails: bool = True) -> list[Record]:
        """Return captions, sources and the user's columns of ids, in their order."""
        snapshot = self.snapshot
        return [snapshot.record(int(id), thumbnails) for id in to_ids(ids).reshape(-1)]

    def append(
        self, pairs: Any, *, encoder: PairEncoder | None = None, model: Any = None, **options: Any
    ) -> BuildReport:
        """Encode and add pairs with the encoder or model that built the database. See `build.append`."""
        from ragturbo.retrieval.build import append

        report = append(pairs, self.path, encoder=encoder, model=model, **options)
        self.refresh()
        return report

    def remove(self, ids: Any = None, *, where: Mapping[str, Any] | None = None) -> int:
        """Remove pairs from every later search. `compact()` deletes their bytes.

        Args:
            ids: the pairs to remove.
            where: instead of ids, {column: value or list of values}; a pair must match all of them.

        Returns:
            The number of pairs removed.
        """
        if (ids is None) == (where is None):
            raise InvalidRequest("remove takes either ids or where={column: value}")
        with writer_lock(self.path):
            snapshot = open_snapshot(self.path)
            chosen = to_ids(ids).reshape(-1) if where is None else _matching(snapshot, where)
            before = snapshot.manifest.removed
            manifest = snapshot.manifest
            if len(chosen):
                manifest = writer.remove(self.path, chosen, manifest, snapshot.ids)
        self.refresh()
        return manifest.removed - before

    def compact(self) -> None:
        """Delete removed pairs from the disk and merge small segments."""
        compact(self.path)
        self.refresh()

    def reindex(
        self, config: scann.ScannConfig | None = None, *, centred: bool | None = None, threads: int = 0
    ) -> None:
        """Build the ScaNN index over all live pairs. Without `config`, none is built below 20,000 pairs."""
        reindex(self.path, config, centred=centred, threads=threads)
        self.refresh()

    def verify(self, level: str = "full") -> None:
        """Raise DatabaseCorrupt with a list of what is damaged. "full" reads every byte of this generation."""
        found = list(problems(self.snapshot, level))
        if found:
            more = f"; and {len(found) - 8} more" if len(found) > 8 else ""
            raise DatabaseCorrupt(f"{self.path} is damaged: " + "; ".join(found[:8]) + more)


def _check_retriever(asked: Any, snapshot: Snapshot) -> None:
    """Raise if a retriever cannot be made, without importing ScaNN or loading its index."""
    if not isinstance(asked, str):
        if not isinstance(asked, Retriever):
            raise InvalidRequest(f"retriever={asked!r} has no search(keys, k, *, exclude=None)")
        return
    if asked not in RETRIEVERS:
        raise InvalidRequest(f"retriever={asked!r} is not one of {', '.join(RETRIEVERS)}")
    if asked == "scann" and importlib.util.find_spec("scann") is None:
        raise DatabaseError("retriever 'scann' needs the package scann: pip install scann, or use 'exact'")
    if asked == "scann" and snapshot.manifest.index is None:
        raise DatabaseError(f"{snapshot.folder} has no ScaNN index; make one with `ragturbo db reindex`")


def _matching(snapshot: Snapshot, where: Mapping[str, Any]) -> np.ndarray:
    """Return the live ids whose columns equal the given values."""
    if not where:
        raise InvalidRequest("where={} would remove everything; name a column and a value")
    known: set[str] = set()
    masks = []
    for pairs in snapshot.segments.pairs:
        table = pairs.text()
        known.update(table.column_names)
        mask = np.ones(len(table), bool)
        for column, value in where.items():
            wanted = set(value) if isinstance(value, (list, tuple, set, frozenset)) else {value}
            values = table.column(column).to_pylist() if column in table.column_names else [None] * len(table)
            mask &= np.array([entry in wanted for entry in values], bool)
        masks.append(mask)
    for column in where:
        if column not in known:
            raise InvalidRequest(f"no pair has a column {column!r}; columns: {', '.join(sorted(known)) or 'none'}")
    hit = np.concatenate(masks or [np.empty(0, bool)]) & snapshot.alive
    return snapshot.ids[hit]
