"""`ragturbo.Database`: open, search, read, change and verify a folder of pairs and their H-space features."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ragturbo.errors import DatabaseCorrupt, DatabaseError, DatabaseMismatch, InvalidRequest
from ragturbo.retrieval import scann, writer
from ragturbo.retrieval import verify as verification
from ragturbo.retrieval.compact import compact
from ragturbo.retrieval.durable import writer_lock
from ragturbo.retrieval.format import Geometry, decode_rows
from ragturbo.retrieval.info import DatabaseInfo, describe
from ragturbo.retrieval.manifest import load
from ragturbo.retrieval.pairs import Record
from ragturbo.retrieval.reindex import reindex
from ragturbo.retrieval.retriever import EXACT_BELOW, Retriever, check_k, check_results, like, to_ids
from ragturbo.retrieval.selection import Selection
from ragturbo.retrieval.snapshot import Snapshot, open_snapshot

if TYPE_CHECKING:
    import torch

    from ragturbo.retrieval.encoder import PairEncoder
    from ragturbo.retrieval.report import BuildReport

log = logging.getLogger("ragturbo")
RETRIEVERS = ("auto", "scann", "exact", "bm25")


class Database:
    """A database folder at one generation. Safe from any thread; `refresh()` moves it to the newest generation."""

    def __init__(self, folder: Path, snapshot: Snapshot, *, retriever: Any = "auto", checksums: bool = True,
                 threads: int = 2, device: Any = "cpu") -> None:  # fmt: skip
        if isinstance(retriever, str) and retriever not in RETRIEVERS:
            raise InvalidRequest(f"retriever={retriever!r} is not one of {', '.join(RETRIEVERS)}")
        self.path = folder
        self.checksums, self.threads, self.device = checksums, threads, device
        self._chosen = retriever
        self._state: tuple[Snapshot, dict[Any, Any]] = (snapshot, {})
        self._lock = threading.RLock()

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, verify: str = "quick", retriever: Any = "auto",
             checksums: bool = True, threads: int = 2, device: Any = "cpu") -> Database:  # fmt: skip
        """verify: "quick" proves sizes, manifest, tables, keys and index; "full" reads every byte. checksums: every
        record is checked as it is read. device: where exact search keeps its keys."""
        if verify not in ("quick", "full"):
            raise InvalidRequest(f"verify={verify!r} must be 'quick' or 'full'")
        folder = Path(path).expanduser()
        database = cls(folder, open_snapshot(folder), retriever=retriever, checksums=checksums, threads=threads,
                       device=device)  # fmt: skip
        if database.choice()[0] == "scann":
            # The index is loaded and proven now, not in the first request.
            try:
                database.retriever()
            except DatabaseCorrupt:
                # Unless a writer has replaced this generation and deleted its folder meanwhile, it is damaged.
                if not database.refresh():
                    raise
                database.retriever()
        if verify == "full":
            database.verify("full")
        return database

    @classmethod
    def build(cls, pairs: Any, path: str | os.PathLike[str], **options: Any) -> Database:
        """Encodes `pairs` into a new database and indexes it; see `ragturbo.retrieval.build.build` for every option."""
        from ragturbo.retrieval.build import build

        build(pairs, path, **options)
        return cls.open(path)

    @classmethod
    def write(cls, path: str | os.PathLike[str], batches: Any, *, geometry: Geometry, key_kind: str = "pooled",
              encoder: dict[str, Any] | None = None, segment_records: int | None = None) -> Database:  # fmt: skip
        """A database of pairs that are encoded already: batches of (records, keys (n, K), features (n, T, C)).
        Appends to one that is there and agrees."""
        folder = Path(path).expanduser()
        start = writer.empty_manifest(geometry, key_kind, encoder or {}, segment_records)
        writer.write_encoded(folder, start, batches)
        return cls.open(folder)

    # What is in it

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
        name, why = self.choice()
        return describe(self.snapshot, name, why)

    def frozen(self) -> Database:
        """The same generation as an object of its own, which no later `append`, `remove` or `refresh` changes."""
        view = Database.__new__(Database)
        view.__dict__.update(self.__dict__)
        view._lock = threading.RLock()
        return view

    def refresh(self) -> bool:
        """Moves to the generation that CURRENT names now. True if it is another one; searches that run keep theirs."""
        with self._lock:
            manifest = load(self.path)
            before, made = self._state
            if manifest.generation == before.manifest.generation:
                return False
            snapshot, ready = open_snapshot(self.path, before), {}
            index = made.get(("scann", None))
            if index is not None and snapshot.manifest.index == before.manifest.index:
                # Searches go on without loading the index again.
                ready["scann", None] = scann.ScannRetriever(snapshot, why=index.why, before=index)
            self._state = (snapshot, ready)
            return True

    def check_encoder(self, fingerprints: Mapping[str, str], key_kind: str) -> None:
        """Refuses a model whose encoder did not make this database."""
        if key_kind != self.key_kind:
            raise DatabaseMismatch(f"{self.path} has {self.key_kind!r} keys, the model makes {key_kind!r} ones")
        for part, found in fingerprints.items():
            built = self.encoder.get(part)
            if built is not None and built != found:
                raise DatabaseMismatch(
                    f"{self.path} was built with another {part}: its fingerprint is {built}, the model's is {found}. "
                    "Build the database again with this model, or load the model it was built with."
                )

    # Reading

    def choice(self) -> tuple[str, str]:
        """Which retriever searches, and why."""
        chosen, snapshot = self._chosen, self.snapshot
        if not isinstance(chosen, str):
            return getattr(chosen, "name", type(chosen).__name__), "given by the caller"
        if chosen != "auto":
            return chosen, "asked for"
        if len(snapshot) < EXACT_BELOW:
            return "exact", f"{len(snapshot)} pairs, fewer than {EXACT_BELOW}: brute force is exact and as fast"
        if snapshot.manifest.index is None:
            return "exact", "the database has no index; make one with `ragturbo db reindex`"
        if not scann.available():
            return "exact", "the package scann is not installed"
        return "scann", f"{len(snapshot)} pairs with a saved index"

    def retriever(self, name: Any = None, *, centred: bool | None = None) -> Retriever:
        """The retriever of this generation, made once: "scann", "exact", "bm25", "auto", or an object with `search`."""
        if name is None and centred is None:
            # The common call, at half a millisecond a search: no choosing and no reasons.
            found = self._state[1].get(None)
            if found is not None:
                return found
        chosen = self._chosen if name is None else name
        if not isinstance(chosen, str):
            if not isinstance(chosen, Retriever):
                raise InvalidRequest(f"retriever={chosen!r} has no search(keys, k, *, exclude=None)")
            return chosen
        if chosen not in RETRIEVERS:
            raise InvalidRequest(f"retriever={chosen!r} is not one of {', '.join(RETRIEVERS)}")
        why = "asked for"
        if chosen == "auto":
            chosen, why = self.choice() if self._chosen == "auto" else ("exact", "asked for")
        snapshot, made = self._state
        own = centred is None or centred == snapshot.manifest.centred
        centred = snapshot.manifest.centred if centred is None else centred
        key = (chosen, centred if chosen == "exact" else None)
        with self._lock:
            if key not in made:
                made[key] = self._make(chosen, snapshot, centred, why)
            found = made[key]
            if name is None and own:
                made[None] = found
            if own and isinstance(found, scann.ScannRetriever):
                made["one", name] = found
            return found

    def _make(self, name: str, snapshot: Snapshot, centred: bool, why: str) -> Retriever:
        if name == "scann":
            return scann.ScannRetriever(snapshot, why=why)
        if name == "bm25":
            from ragturbo.retrieval.bm25 import Bm25Retriever

            return Bm25Retriever(snapshot, why=why)
        from ragturbo.retrieval.exact import ExactRetriever

        return ExactRetriever(snapshot, device=self.device, centred=centred, why=why)

    def search(
        self, keys: Any, k: int = 1, *, exclude: Any = None, min_score: float | None = None,
        max_similarity: float | None = None, diversity: float = 0.0, centred: bool | None = None, retriever: Any = None,
    ) -> tuple[Any, Any]:  # fmt: skip
        """keys (B, K) floats (prompts for bm25) -> ids (B, k) int64, scores (B, k) float32, best first; id -1 and NaN
        where there is no further neighbour. exclude: ids never returned, (m,) or (B, m). min_score, max_similarity
        and diversity: see `Selection`. centred: cosines about the mean of the keys; None is the database's own
        setting."""
        plain = min_score is None and max_similarity is None and not diversity and centred is None
        if plain and exclude is None and (retriever is None or type(retriever) is str):
            # After half a millisecond in ScaNN's tables every line of Python is cold: the common call takes few.
            ready = self._state[1].get(("one", retriever))
            if ready is not None and (found := ready.search_one(keys, k)) is not None:
                return found
        searcher = self.retriever(retriever, centred=centred)
        if plain and isinstance(searcher, scann.ScannRetriever):
            return searcher.search(keys, k, exclude=exclude)
        snapshot = getattr(searcher, "snapshot", self.snapshot)
        if centred is not None and getattr(searcher, "name", "") == "scann" and searcher.config.centred != centred:  # type: ignore[attr-defined]
            raise InvalidRequest(
                f"the ScaNN index is {'not ' if centred else ''}centred; reindex it, or search with retriever='exact'"
            )
        check_k(k)
        selection = Selection(min_score, max_similarity, diversity)
        many = selection.candidates(k)
        ids, scores = searcher.search(keys, many, exclude=exclude)
        check_results(ids, scores, len(keys), many, getattr(searcher, "name", type(searcher).__name__))
        if selection == Selection():
            return ids, scores
        host = [value.cpu().numpy() if hasattr(value, "cpu") else np.asarray(value) for value in (ids, scores)]
        return like(ids, *selection.apply(host[0], host[1], k, snapshot))

    def rows(self, ids: Any, *, checksums: bool | None = None) -> np.ndarray:
        """ids (…,) -> the records as stored, (…, record bytes) uint8. Zeros where the id is -1."""
        snapshot, array = self.snapshot, to_ids(ids)
        rows = snapshot.rows(array.reshape(-1))
        out = np.empty((len(rows), self.geometry.record_bytes), np.uint8)
        there = np.flatnonzero(rows >= 0)
        out[rows < 0] = 0
        if len(there):
            snapshot.segments.read_into(
                rows[there], out, slots=there, checksums=self.checksums if checksums is None else checksums,
                threads=self.threads,
            )  # fmt: skip
        return out.reshape(*array.shape, -1)

    def features(self, ids: Any, *, dtype: torch.dtype | None = None) -> torch.Tensor:
        """ids (…,) -> (…, T, C) on the CPU: float16 as stored, int8 dequantised to float32. Zeros for an id of -1."""
        import torch

        rows = self.rows(ids)
        flat = decode_rows(rows.reshape(-1, rows.shape[-1]), self.geometry)
        out = torch.from_numpy(flat).reshape(*rows.shape[:-1], self.geometry.tokens, self.geometry.channels)
        return out if dtype is None else out.to(dtype)

    def keys(self, ids: Any) -> torch.Tensor:
        """ids (…,) -> (…, K) float32 on the CPU, as stored: normalised, uncentred. Zeros where the id is -1."""
        import torch

        snapshot, array = self.snapshot, to_ids(ids)
        rows = snapshot.rows(array.reshape(-1))
        keys = np.zeros((len(rows), self.geometry.key_dim), np.float32)
        keys[rows >= 0] = snapshot.keys[rows[rows >= 0]]
        return torch.from_numpy(keys).reshape(*array.shape, -1)

    def records(self, ids: Any, *, thumbnails: bool = True) -> list[Record]:
        """The pairs as they were given, in the order of ids."""
        snapshot = self.snapshot
        return [snapshot.record(int(id), thumbnails) for id in to_ids(ids).reshape(-1)]

    # Changing and proving

    def append(
        self, pairs: Any, *, encoder: PairEncoder | None = None, model: Any = None, **options: Any
    ) -> BuildReport:
        """Encodes and adds pairs. `encoder` or `model` must be the one the database was built with."""
        from ragturbo.retrieval.build import append

        report = append(pairs, self.path, encoder=encoder, model=model, **options)
        self.refresh()
        return report

    def append_encoded(self, batches: Sequence[writer.Batch]) -> None:
        """Adds pairs whose keys and features are known: batches of (records, keys (n, K), features (n, T, C))."""
        writer.write_encoded(self.path, self.snapshot.manifest, batches)
        self.refresh()

    def remove(self, ids: Any = None, *, where: Mapping[str, Any] | None = None) -> int:
        """Takes pairs out of every search from now on: by id, or all whose columns have these values (or one of a
        list of values). Their bytes leave the disk with `compact()`. Returns how many were removed."""
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
        """Deletes removed pairs from the disk and merges small segments."""
        compact(self.path)
        self.refresh()

    def reindex(
        self, config: scann.ScannConfig | None = None, *, centred: bool | None = None, threads: int = 0
    ) -> None:
        """Builds the ScaNN index anew over all live pairs; below 20,000 there is none, exact search is as fast."""
        reindex(self.path, config, centred=centred, threads=threads)
        self.refresh()

    def verify(self, level: str = "full", *, on_file: Callable[[str], None] | None = None) -> None:
        """Raises `DatabaseCorrupt` that names what is damaged. "full" reads every byte of this generation."""
        problems = verification.problems(self.snapshot, level, on_file)
        verification.refuse(self.path, problems)


def _matching(snapshot: Snapshot, where: Mapping[str, Any]) -> np.ndarray:
    """Live ids whose columns equal the given values."""
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
            raise InvalidRequest(f"no pair has a column {column!r}; there are {', '.join(sorted(known)) or 'none'}")
    hit = np.concatenate(masks or [np.empty(0, bool)]) & snapshot.alive
    return snapshot.ids[hit]


def open_database(database: Any, **options: Any) -> Database:
    """A Database as it is, or the one in a folder."""
    if isinstance(database, Database):
        return database
    if isinstance(database, (str, os.PathLike)):
        return Database.open(database, **options)
    raise DatabaseError(f"{database!r} is neither a folder nor a ragturbo.Database")
