"""`ragturbo.Database`: open, search, read, change and verify a folder of pairs and their H-space features."""

from __future__ import annotations

import importlib.util
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ragturbo.checks import texts as check_texts
from ragturbo.checks import whole
from ragturbo.config import one_of
from ragturbo.errors import DatabaseCorrupt, DatabaseError, DatabaseMismatch, InvalidRequest
from ragturbo.keywords import named
from ragturbo.messages import many, short
from ragturbo.model.find import Hub
from ragturbo.retrieval import ranks, scann, writer
from ragturbo.retrieval.compact import compact
from ragturbo.retrieval.durable import writer_lock
from ragturbo.retrieval.format import Geometry, decode_rows
from ragturbo.retrieval.info import DatabaseInfo, describe
from ragturbo.retrieval.manifest import database_folder, load
from ragturbo.retrieval.origin import known_origin
from ragturbo.retrieval.pairs import Record
from ragturbo.retrieval.reindex import reindex
from ragturbo.retrieval.retriever import (
    EXACT_BELOW,
    Retriever,
    at_most_one,
    check_k,
    check_results,
    flag,
    like,
    to_ids,
    to_numpy,
)
from ragturbo.retrieval.selection import Selection
from ragturbo.retrieval.snapshot import Snapshot, open_snapshot
from ragturbo.retrieval.verify import problems
from ragturbo.retrieval.where import matching

if TYPE_CHECKING:
    import torch

    from ragturbo.retrieval.encoder import PairEncoder
    from ragturbo.retrieval.report import BuildReport
    from ragturbo.retrieval.text_keys import TextKeys

log = logging.getLogger("ragturbo")
RETRIEVERS = ("auto", "scann", "exact", "bm25", "hybrid")


class Database:
    """A database folder at one generation. Thread-safe; `refresh()` moves it to the newest generation."""

    def __init__(self, folder: Path, snapshot: Snapshot, *, retriever: Any = "auto", checksums: bool = True,
                 threads: int = 2, device: Any = "cpu", model: Any = None) -> None:  # fmt: skip
        _check_retriever(retriever, snapshot)
        self.path = folder
        self.model = model
        """The model for searches by text and for `append`: a bundle, pipeline, name or folder. None: the one that built
        the database, if it is known."""
        self.checksums, self.threads, self.device = checksums, threads, device
        self.asked_retriever: Any = retriever
        """The `retriever` that `open` was given. `choice()` returns what "auto" resolves to."""
        self._state: tuple[Snapshot, dict[Any, Retriever]] = (snapshot, {})
        self._lock = threading.RLock()
        self._frozen = False
        self._report: BuildReport | None = None
        self._hub: Hub | None = None
        # The model that `search` was last given, and its text encoder.
        self._text_keys: tuple[Any, TextKeys] | None = None
        # Its own lock: loading takes seconds, in which other threads may search and refresh.
        self._text_lock = threading.Lock()

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, verify: str = "quick", retriever: Any = "auto",
             checksums: bool = True, threads: int = 2, device: Any = "cpu", model: Any = None) -> Database:  # fmt: skip
        """Open the newest generation of a database. No index is loaded before the first search needs one.

        Args:
            verify: "quick" checks the manifest, file sizes, record tables and keys; "full" reads every byte.
            retriever: "auto", "exact", "scann", "bm25", "hybrid" or an object with `search` (see `Retriever`).
            checksums: check each record against its CRC-32 as it is read.
            threads: threads for reading records.
            device: where exact search keeps its keys.
            model: for searches by text and for `append`: a bundle, pipeline, name or folder. It is loaded when it is
                needed. None: the one that built the database, if it is known.

        Raises:
            InvalidRequest: an option is invalid.
            DatabaseError: no database, or the retriever's package or index is missing.
            DatabaseCorrupt: a file is damaged.
        """
        one_of("verify", verify, ("quick", "full"))
        folder = database_folder(path)
        database = cls(folder, open_snapshot(folder), retriever=retriever, checksums=checksums,
                       threads=whole("threads", threads), device=device, model=model)  # fmt: skip
        if verify == "full":
            database.verify("full")
        return database

    @classmethod
    @named()
    def build(
        cls, pairs: Any, path: str | os.PathLike[str], *, model: Any = None, encoder: PairEncoder | None = None,
        key: str | None = None, feature_dtype: str = "float16", size: int | None = None,
        segment_records: int | None = None, index: bool = True, centred: bool = False, caption: str = "caption",
        image: str = "image", image_root: str | os.PathLike[str] | None = None, columns: Sequence[str] | None = None,
        thumbnails: bool = True, batch_size: int = 16, workers: int | None = None, dedupe: bool = False,
        strict: bool = False, resume: bool = True, device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None, vae: str = "full", local_files_only: bool = False,
        revision: str | None = None, cache_dir: str | os.PathLike[str] | None = None, token: str | bool | None = None,
        subfolder: str | None = None, variant: str | None = None,
        on_progress: Callable[[int, int | None, int], None] | None = None,
    ) -> Database:  # fmt: skip
        """Encode pairs into a new database, index it and open it. A killed build of the same input is resumed.

        `report` of the result says what was skipped and why; if there is something to say, it is logged as a warning.

        Args:
            pairs: a folder of images with .txt files, a .jsonl, .csv, .parquet or .tar file, a pattern or list of
                files, or an iterable of (caption, image[, metadata]).
            path: folder of the new database.
            model: a bundle, the name or folder of one, or a loaded pipeline of diffusers.
            encoder: instead of a model.
            key: "pooled" or "clip"; None: the model's own.
            feature_dtype: "float16", or "int8" with one scale per token.
            size: side of the images in pixels; None: the model's own.
            segment_records: pairs per segment; None: about 1 GiB.
            index: build the ScaNN index afterwards, from 20,000 pairs on.
            centred: search about the mean of the keys.
            caption, image: columns of a table; `image` may be a pattern of columns.
            image_root: folder of image paths; None: that of the table.
            columns: the user's own columns to keep; None: all.
            thumbnails: keep a WebP of at most 128 pixels a side.
            batch_size: images encoded at once.
            workers: threads that decode images; None: by the number of CPUs.
            dedupe: skip a pair whose caption and image are those of an earlier one; otherwise they are counted.
            strict: raise InvalidRequest at the first bad item instead of skipping it.
            resume: continue what a killed run left.
            device, dtype: "cuda" and float16 if there is a GPU, otherwise "cpu" and float32.
            vae: "full", "tiny", or a folder or hub id of an AutoencoderTiny.
            local_files_only, revision, cache_dir, token, subfolder, variant: as in diffusers' from_pretrained.
            on_progress: called with (done, total or None, skipped).

        Raises:
            InvalidRequest: an option is invalid, or no pair can be stored.
            ModelError: there is no such model.
            DatabaseError: `path` holds something else, or cannot be written.
        """
        from ragturbo.retrieval.build import build

        hub = Hub(local_files_only, revision, cache_dir, token, subfolder, variant)
        report = build(
            pairs, path, model=model, encoder=encoder, key=key, feature_dtype=feature_dtype, size=size,
            segment_records=segment_records, index=index, centred=centred, caption=caption, image=image,
            image_root=image_root, columns=columns, thumbnails=thumbnails, batch_size=batch_size, workers=workers,
            dedupe=dedupe, strict=strict, resume=resume, device=device, dtype=dtype, vae=vae, hub=hub,
            on_progress=on_progress,
        )  # fmt: skip
        database = cls.open(path, model=model)
        database._hub = hub
        database._keep(report)
        return database

    @classmethod
    def write(cls, path: str | os.PathLike[str], batches: Any, *, geometry: Geometry, key_kind: str = "pooled",
              encoder: dict[str, Any] | None = None, segment_records: int | None = None) -> Database:  # fmt: skip
        """Store pairs that are already encoded: batches of (records, keys (n, K), features (n, T, C)).

        Appends if there is a database at `path`, which must have the same geometry, key kind and encoder.
        """
        folder = database_folder(path)
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

        folder = database_folder(path)
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
        size, report = self.encoder.get("size"), self.report
        parts = [repr(str(self.path)), many(len(self), "pair")]
        parts += [
            f"{size} px {self.geometry.dtype}" if size else self.geometry.dtype,
            f"retriever {self.choice()[0]!r}",
        ]
        if report is not None and report.skipped:
            parts.append(f"{len(report.skipped)} skipped: see report")
        return f"Database({', '.join(parts)})"

    def __getitem__(self, id: int) -> Record:
        """Return the pair with an id, with its thumbnail.

        Raises:
            UnknownId: a KeyError; there is no such pair, or it was removed.
        """
        if isinstance(id, slice) or hasattr(id, "__len__"):
            raise InvalidRequest(f"db[{short(id)}]: one id gives one pair; db.records(ids) gives many", option="id")
        return self.snapshot.live_record(whole("id", id, -1))

    def __iter__(self) -> Iterator[Record]:
        """Yield all pairs, with thumbnails, in the order of their ids."""
        return self.snapshot.records()

    def __contains__(self, id: object) -> bool:
        """Whether a pair with this id is stored and not removed."""
        if not isinstance(id, (int, np.integer)) or isinstance(id, bool) or not 0 <= id < 2**63:
            return False
        row = int(self.snapshot.rows_of(np.array([id], np.int64))[0])
        return row >= 0 and bool(self.snapshot.alive[row])

    @property
    def report(self) -> BuildReport | None:
        """What the last build or append stored, skipped and noted; None if the folder has no report of one."""
        if self._report is not None:
            return self._report
        from ragturbo.retrieval.report import BuildReport

        return BuildReport.find(self.path)

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
            # That of an older generation; the newest one is on disk.
            self._report = None
            snapshot, kept = open_snapshot(self.path, before), dict[Any, Retriever]()
            index = ready.get(("scann", None))
            if isinstance(index, scann.ScannRetriever) and snapshot.manifest.index == before.manifest.index:
                # The index is unchanged, so it is not loaded again.
                kept["scann", None] = scann.ScannRetriever(snapshot, before=index)
            self._state = (snapshot, kept)
            return True

    def check_encoder(self, fingerprints: Mapping[str, str], key_kind: str) -> None:
        """Raise DatabaseMismatch if the database was built by a model with other fingerprints or another key."""
        different = None
        if key_kind != self.key_kind:
            different = f"has {self.key_kind!r} keys, the model makes {key_kind!r} ones"
        for part, found in fingerprints.items():
            built = self.encoder.get(part)
            if different is None and built is not None and built != found:
                different = f"was built with another {part} ({str(built)[:8]}, the model's is {found[:8]})"
        if different is not None:
            name = known_origin(self.path)
            hint = "load the model that built it" if name is None else f"load {name}, the model that built it"
            raise DatabaseMismatch(f"{self.path} {different}; {hint}, or build the database again with this model")

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
        if centred is not None:
            centred = flag("centred", centred)
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
        centred: bool | None = None, retriever: Any = None, model: Any = None,
    ) -> tuple[Any, Any]:  # fmt: skip
        """Find the k nearest pairs of each query.

        Args:
            keys: a text or a list of B texts, or keys as (B, K) floats.
            k: neighbours of each query, at most 65,536.
            texts: B prompts for hybrid, if the queries are keys.
            exclude: ids that are not returned, (m,) for all queries or (B, m) per query, padded with -1.
            min_score, max_similarity, diversity: see `Selection`.
            centred, retriever: see `retriever`.
            model: encodes the texts: a bundle, pipeline, name or folder; None: `self.model`, or else the one that built
                the database. Its text encoder alone is loaded, once. Retriever "bm25" needs none.

        Returns:
            ids (B, k) int64 and scores (B, k) float32, best first; -1 and NaN if there are fewer than k neighbours.
            One text is a batch of one: (1, k).

        Raises:
            InvalidRequest: an option is invalid, or it is not known which model built the database.
            DatabaseMismatch: another model built the database.
        """
        plain = texts is None and min_score is None and max_similarity is None and not diversity and centred is None
        if plain and exclude is None and model is None and (retriever is None or type(retriever) is str):
            # A short path for the common call: a search in ScaNN's tables evicts Python's own data from the CPU cache.
            ready = self._state[1].get((retriever, None))
            if type(ready) is scann.ScannRetriever and (found := ready.search_one(keys, k)) is not None:
                return found[0], at_most_one(found[1])
        check_k(k)
        k, prompts = int(k), _prompts(keys)
        selection = Selection(min_score, max_similarity, diversity)
        searcher: Any = self.retriever(retriever, centred=centred)
        name = getattr(searcher, "name", type(searcher).__name__)
        kind = getattr(searcher, "query_kind", "key")
        both = kind == "both"
        if prompts is not None:
            if kind == "text":
                keys = prompts
            else:
                if not all(map(str.strip, prompts)):
                    raise InvalidRequest("the text to search by is empty", option="keys")
                keys = self.text_keys(model).encode(prompts)
                texts = prompts if both and texts is None else texts
        if model is not None and (prompts is None or kind == "text"):
            raise InvalidRequest("model has no effect: only a search by text and keys encodes texts", option="model")
        if texts is not None and not both:
            raise InvalidRequest(f"texts has no effect with retriever {name!r}; use 'hybrid'")
        if isinstance(searcher, scann.ScannRetriever):
            if plain:
                ids, scores = searcher.search(keys, k, exclude=exclude)
                return ids, at_most_one(scores)
            if centred is not None and searcher.config.centred != centred:
                state = "not " if centred else ""
                raise InvalidRequest(f"the ScaNN index is {state}centred; reindex it, or use retriever='exact'")
        wanted = selection.candidates(k)
        ids, scores = searcher.search(keys, wanted, exclude=exclude, **({"texts": texts} if both else {}))
        check_results(ids, scores, len(keys), wanted, name)
        if name in ("exact", "scann"):
            scores = at_most_one(scores)
        if selection == Selection():
            return ids, scores
        snapshot = getattr(searcher, "snapshot", self.snapshot)
        return like(ids, *selection.apply(to_numpy(ids), to_numpy(scores), k, snapshot))

    def text_keys(self, model: Any = None) -> TextKeys:
        """Return the encoder of texts into keys of this database; the last one stays loaded.

        Args:
            model: see `search`.
        """
        from ragturbo.retrieval.text_keys import load_text_keys

        asked = self.model if model is None else model
        with self._text_lock:
            held = self._text_keys
            if held is None or not _same(held[0], asked):
                held = asked, load_text_keys(asked, self.path, self.key_kind, self.check_encoder, self._hub)
                self._text_keys = held
            return held[1]

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

    @named()
    def append(
        self, pairs: Any, *, model: Any = None, encoder: PairEncoder | None = None, caption: str = "caption",
        image: str = "image", image_root: str | os.PathLike[str] | None = None, columns: Sequence[str] | None = None,
        thumbnails: bool = True, batch_size: int = 16, workers: int | None = None, dedupe: bool = False,
        strict: bool = False, resume: bool = True, device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None, vae: str = "full", local_files_only: bool = False,
        revision: str | None = None, cache_dir: str | os.PathLike[str] | None = None, token: str | bool | None = None,
        subfolder: str | None = None, variant: str | None = None,
        on_progress: Callable[[int, int | None, int], None] | None = None,
    ) -> BuildReport:  # fmt: skip
        """Encode and add pairs with the model that built the database.

        Args:
            model, encoder: None takes `self.model`, or else the model that built the database, if it is known.
            dedupe: skip a pair whose caption and image are those of an earlier or a stored one.
            pairs and the other options: see `build`.

        Returns:
            The report, which is also `self.report`. If it has something to say, it is logged as a warning.

        Raises:
            InvalidRequest: an option is invalid, or no pair can be stored.
            DatabaseMismatch: the model is not the one that built the database.
            DatabaseError: the database cannot be written.
        """
        from ragturbo.retrieval.build import append

        given = model if model is not None or encoder is not None else self.model
        report = append(
            pairs, self.path, model=given, encoder=encoder, caption=caption, image=image, image_root=image_root,
            columns=columns, thumbnails=thumbnails, batch_size=batch_size, workers=workers, dedupe=dedupe,
            strict=strict, resume=resume, device=device, dtype=dtype, vae=vae,
            hub=Hub(local_files_only, revision, cache_dir, token, subfolder, variant), on_progress=on_progress,
        )  # fmt: skip
        self.refresh()
        self._keep(report)
        return report

    def _keep(self, report: BuildReport) -> None:
        self._report = report
        lines = report.lines()
        if report.already:
            lines.insert(0, "the same input was stored before; nothing was added")
        if lines and ranks.current().first:
            log.warning("%s: %s", self.path, "\n".join(lines))

    def remove(self, ids: Any = None, *, where: Mapping[str, Any] | None = None) -> int:
        """Remove pairs from every later search. `compact()` deletes their bytes.

        Args:
            ids: the pairs to remove.
            where: instead of ids, {column: value or list of values}; a pair must match all of them.

        Returns:
            The number of pairs removed.
        """
        if (ids is None) == (where is None):
            both = "not both" if ids is not None else "and was given neither"
            raise InvalidRequest(f"remove takes ids, or where={{column: value}}, {both}", option="ids")
        with writer_lock(self.path):
            snapshot = open_snapshot(self.path)
            chosen = to_ids(ids).reshape(-1) if where is None else matching(snapshot, where)
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
            raise InvalidRequest(
                f"retriever={short(asked)} has no search(keys, k, *, exclude=None)", option="retriever"
            )
        return
    one_of("retriever", asked, RETRIEVERS)
    if asked == "scann" and importlib.util.find_spec("scann") is None:
        raise DatabaseError("retriever 'scann' needs the package scann: pip install scann, or use 'exact'")
    if asked == "scann" and snapshot.manifest.index is None:
        raise DatabaseError(f"{snapshot.folder} has no ScaNN index; make one with `ragturbo db reindex`")


def _prompts(queries: Any) -> list[str] | None:
    """Return texts to search by as a list; None for keys."""
    if isinstance(queries, str):
        found = [queries]
    elif isinstance(queries, np.ndarray) and queries.dtype.kind == "U":
        found = queries.reshape(-1).tolist()
    elif isinstance(queries, (list, tuple)) and any(isinstance(query, str) for query in queries):
        found = list(queries)
    else:
        return None
    for i, text in enumerate(found):
        if not isinstance(text, str):
            raise InvalidRequest(f"query {i} is {short(text)}, and others are texts", option="keys")
    return check_texts("keys", found, empty=True)


def _same(held: Any, asked: Any) -> bool:
    names = isinstance(held, (str, os.PathLike)) and isinstance(asked, (str, os.PathLike))
    return str(held) == str(asked) if names else held is asked
