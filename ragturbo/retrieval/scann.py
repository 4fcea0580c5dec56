"""Approximate search with ScaNN. An index is configured by the size of the database and saved with its generation."""

from __future__ import annotations

import importlib.util
import math
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ragturbo.checks import whole
from ragturbo.errors import DatabaseCorrupt, DatabaseError, InvalidRequest
from ragturbo.retrieval import durable, store
from ragturbo.retrieval.manifest import IndexEntry
from ragturbo.retrieval.npy import read_ids, write_ids
from ragturbo.retrieval.retriever import check_k, check_keys, excluded_ids, flag, like, to_host
from ragturbo.retrieval.snapshot import Snapshot

IDS = "ids.npy"
# ScaNN unpickles this file if it exists. We never write it, and refuse an index that has it.
_PICKLE = "scann_docids.pkl"
# leaves_to_search and reorder are tuned for this many neighbours.
_SHALLOW = 16
_FLOAT32 = np.dtype(np.float32)
_ASSET = re.compile(r'asset_path:\s*"([^"]*)"')


@dataclass(frozen=True)
class ScannConfig:
    """Settings of an index. Those of `by_size` were measured to reach a recall@10 of at least 0.95."""

    leaves: int
    """Partitions of the tree; 0: no tree."""
    leaves_to_search: int
    reorder: int
    """Candidates rescored with their bfloat16 vectors."""
    dims_per_block: int = 4
    soar: bool = True
    anisotropic: float = 0.2
    training_sample: int = 100_000
    centred: bool = False

    def __post_init__(self) -> None:
        least = {"leaves": 0, "leaves_to_search": 0, "reorder": 1, "dims_per_block": 1, "training_sample": 1}
        for name, bound in least.items():
            object.__setattr__(self, name, whole(name, getattr(self, name), bound, 2**31 - 1))
        for name in ("soar", "centred"):
            object.__setattr__(self, name, flag(name, getattr(self, name)))
        if self.leaves and not 1 <= self.leaves_to_search <= self.leaves:
            raise InvalidRequest(
                f"leaves_to_search={self.leaves_to_search} must be from 1 to {self.leaves}, the number of leaves",
                option="leaves_to_search",
            )

    @classmethod
    def by_size(cls, rows: int, centred: bool = False) -> ScannConfig:
        if rows < 100_000:
            return cls(0, 0, 100, soar=False, centred=centred)
        leaves = round(math.sqrt(rows))
        # At 630,000 pairs, twice the leaves took 1.7 times as long for the same recall: the reorder count bounds it.
        return cls(leaves, max(20, round(leaves / 40)), 100, centred=centred)


def available() -> bool:
    """Whether the package scann is installed; it is not imported."""
    return importlib.util.find_spec("scann") is not None


def _scann() -> Any:
    try:
        from scann.scann_ops.py import scann_ops_pybind
    except ImportError as error:
        raise DatabaseError(f"the package scann cannot be imported: {error}; install it, or use 'exact'") from error
    return scann_ops_pybind


def build_searcher(keys: np.ndarray, config: ScannConfig, threads: int = 0) -> Any:
    """keys: (N, K) float32, normalised. The result is not reproducible: compare indexes by recall, not by bytes."""
    builder = _scann().builder(keys, 10, "dot_product").set_n_training_threads(threads)
    from scann.scann_ops.py.scann_builder import ReorderType

    rows = len(keys)
    sample = min(config.training_sample, rows)
    if config.leaves:
        builder = builder.tree(
            config.leaves, config.leaves_to_search, training_sample_size=sample,
            soar_lambda=1.5 if config.soar else None, overretrieve_factor=2.0 if config.soar else None,
        )  # fmt: skip
    builder = builder.score_ah(
        config.dims_per_block, anisotropic_quantization_threshold=config.anisotropic, training_sample_size=sample
    )
    return builder.reorder(min(config.reorder, rows), quantize=ReorderType.BFLOAT16).build()


def vectors(snapshot: Snapshot, rows: np.ndarray, centred: bool) -> np.ndarray:
    """Return the keys of `rows` for an index: (n, K) fp32, of length 1, centred if requested."""
    out = np.empty((len(rows), snapshot.geometry.key_dim), np.float32)
    for start in range(0, len(rows), 16384):
        part = rows[start : start + 16384]
        block = snapshot.keys[part].astype(np.float32)
        if centred:
            block = (block - snapshot.key_mean) / snapshot.centred_norms[part, None]
        out[start : start + 16384] = block
    return out


def build_index(snapshot: Snapshot, config: ScannConfig, folder: Path, threads: int = 0) -> IndexEntry:
    """Build the index of all live pairs and save it in `folder`, which must be empty."""
    rows = np.flatnonzero(snapshot.alive)
    if len(rows) < 16:
        raise InvalidRequest(f"{len(rows)} pairs are too few for ScaNN; use exact search")
    if config.leaves > len(rows):
        raise InvalidRequest(f"{config.leaves} leaves are more than the {len(rows)} pairs; use fewer, or no tree")
    try:
        searcher = build_searcher(vectors(snapshot, rows, config.centred), config, threads)
        searcher.serialize(str(folder), relative_path=True)
    except (RuntimeError, ValueError) as error:
        raise DatabaseError(f"{folder}: ScaNN could not build an index of {len(rows)} pairs: {error}") from error
    durable.write_file(folder / IDS, write_ids(snapshot.ids[rows]))
    sums = {}
    for path in sorted(folder.iterdir()):
        durable.sync_file(path)
        sums[path.name] = durable.sum_file(path)
    durable.sync_folder(folder)
    return IndexEntry("scann", len(rows), asdict(config), sums)


def check_files(folder: Path, index: IndexEntry) -> None:
    """Raise DatabaseCorrupt unless the folder has exactly the files of the index, with their sizes and CRC-32s."""
    if _PICKLE in index.files:
        raise DatabaseCorrupt(f"{folder}: an index with {_PICKLE} is refused: it is a pickle")
    try:
        present = {path.name for path in folder.iterdir()}
    except OSError as error:
        raise DatabaseCorrupt(f"{folder}: cannot be listed: {error.strerror}") from error
    if present != set(index.files):
        odd = sorted(present ^ set(index.files))
        raise DatabaseCorrupt(f"{folder}: files differ from the manifest's: {', '.join(odd)}")

    def check(name: str) -> None:
        path, expected = folder / name, index.files[name]
        crc = size = 0
        with durable.naming(path, "reading"), open(path, "rb", buffering=0) as file:
            block = bytearray(min(1 << 22, max(expected.bytes, 1)))
            while got := file.readinto(block):
                crc, size = store.crc32(memoryview(block)[:got], crc), size + got
        if (size, crc) != (expected.bytes, expected.crc32):
            raise DatabaseCorrupt(f"{path}: {size} bytes with CRC-32 {crc:08x}, the manifest says {expected.bytes} "
                                  f"with {expected.crc32:08x}")  # fmt: skip

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        list(pool.map(check, sorted(index.files, key=lambda name: -index.files[name].bytes)))


class ScannRetriever:
    """The saved index of a generation. Newer pairs are searched exactly and merged; removed ones are left out."""

    name = "scann"
    query_kind = "key"

    def __init__(self, snapshot: Snapshot, before: ScannRetriever | None = None) -> None:
        """before: the retriever of an earlier generation, whose loaded index is used if it is the same."""
        self.snapshot, index = snapshot, snapshot.manifest.index
        assert index is not None
        self.folder = snapshot.folder / snapshot.manifest.generation_folder / index.kind
        try:
            self.config = ScannConfig(**index.config)
        except (TypeError, InvalidRequest) as error:
            raise DatabaseCorrupt(f"{self.folder}: the configuration in the manifest is invalid: {error}") from error
        self.index_ids: np.ndarray
        self.searcher: Any
        if before is not None and before.snapshot.manifest.index == index:
            self.index_ids, self.searcher = before.index_ids, before.searcher
        else:
            self.index_ids, self.searcher = self._load(index)
        rows = snapshot.rows_of(self.index_ids)
        self._hidden = (rows < 0) | ~snapshot.alive[np.maximum(rows, 0)] if len(snapshot.alive) else rows < 0
        self._hidden_count = int(self._hidden.sum())
        last = int(self.index_ids[-1])
        self._tail = np.flatnonzero((snapshot.ids > last) & snapshot.alive)
        # Converted to fp32 once: a search of the newest pairs is one matrix product.
        self._tail_keys = vectors(snapshot, self._tail, self.config.centred)
        self._dim = snapshot.geometry.key_dim
        # The searcher without ScaNN's Python wrapper: at half a millisecond per query, attribute look-ups matter.
        self._one = self.searcher.searcher.search
        self._one_key = (1, self._dim)
        plain = not (self._hidden_count or len(self._tail) or self.config.centred)
        self._shallow = min(_SHALLOW, self.config.reorder) if plain else 0

    def _load(self, index: IndexEntry) -> tuple[np.ndarray, Any]:
        pybind = _scann()
        check_files(self.folder, index)
        for name in _ASSET.findall((self.folder / "scann_assets.pbtxt").read_text(errors="replace")):
            if name not in index.files:
                raise DatabaseCorrupt(f"{self.folder}/scann_assets.pbtxt: {name!r} is not a file of the index")
        path = self.folder / IDS
        try:
            ids = read_ids(path.read_bytes())
        except (OSError, ValueError) as error:
            raise DatabaseCorrupt(f"{path}: not an array of ids: {error}") from error
        if ids.shape != (index.rows,) or index.rows == 0 or np.any(np.diff(ids) <= 0):
            raise DatabaseCorrupt(f"{path}: must be {index.rows} ascending int64 ids")
        try:
            searcher = pybind.load_searcher(str(self.folder))
            size = searcher.size()
        except (RuntimeError, ValueError, OSError) as error:
            raise DatabaseCorrupt(f"{self.folder}: ScaNN cannot load the index: {error}") from error
        if size != len(ids):
            raise DatabaseCorrupt(f"{self.folder}: the index holds {size} vectors, {IDS} has {len(ids)}")
        return ids, searcher

    def search(self, keys: Any, k: int, *, exclude: Any = None) -> tuple[Any, Any]:
        query = to_host(keys)
        if exclude is None and (found := self.search_one(query, k)) is not None:
            return found if query is keys else like(keys, *found)
        check_k(k)
        check_keys(query, self._dim)
        query = query / np.linalg.norm(query, axis=1, keepdims=True)
        if self.config.centred:
            query = query - self.snapshot.key_mean
            lengths = np.linalg.norm(query, axis=1, keepdims=True)
            query = query / np.where(lengths > 0, lengths, 1)
        banned = excluded_ids(exclude, len(query))
        rows = [self._merged(query[i], k, None if banned is None else banned[i]) for i in range(len(query))]
        return like(keys, np.stack([ids for ids, _ in rows]), np.stack([scores for _, scores in rows]))

    def search_one(self, keys: Any, k: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Search one float32 key (1, K) if no pair must be hidden or merged. Returns None if one must, or if the index
        found fewer than k; then use `search`."""
        if type(keys) is not np.ndarray or keys.shape != self._one_key or keys.dtype is not _FLOAT32:
            return None
        if type(k) is not int or not 0 < k <= self._shallow:
            return None
        query = keys[0]
        square = float(query.dot(query))
        if not 0.99999 < square < 1.00001:
            if not (math.isfinite(square) and square > 0):
                return None
            query = query / np.float32(math.sqrt(square))
        where, scores = self._one(query, k, -1, -1)
        if len(where) != k:
            return None
        return self.index_ids.take(where)[None], scores[None]

    def _merged(self, query: np.ndarray, k: int, banned: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Search one prepared key in the index and in the newer pairs."""
        hidden, visible, spare = self._hidden, len(self.index_ids) - self._hidden_count, 16 if self._hidden_count else 0
        if banned is not None:
            at = np.searchsorted(self.index_ids, banned).clip(max=len(self.index_ids) - 1)
            blocked = np.unique(at[(self.index_ids[at] == banned) & ~hidden[at]])
            hidden, visible, spare = hidden.copy(), visible - len(blocked), spare + len(blocked)
            hidden[blocked] = True
        where, scores = self._from_index(query, min(k, visible), spare, hidden)
        ids = self.index_ids[where]
        if len(self._tail):
            new_scores = self._tail_keys @ query
            new_ids = self.snapshot.ids[self._tail]
            if banned is not None:
                new_scores[np.isin(new_ids, banned)] = -np.inf
            top = np.argpartition(-new_scores, min(k, len(new_scores)) - 1)[:k]
            top = top[new_scores[top] > -np.inf]
            ids, scores = np.concatenate([ids, new_ids[top]]), np.concatenate([scores, new_scores[top]])
            order = np.lexsort((ids, -scores))
            ids, scores = ids[order], scores[order]
        out_ids, out_scores = np.full(k, -1, np.int64), np.full(k, np.nan, np.float32)
        n = min(k, len(ids))
        out_ids[:n], out_scores[:n] = ids[:n], scores[:n]
        return out_ids, out_scores

    def _from_index(
        self, query: np.ndarray, want: int, spare: int, hidden: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The best `want` vectors of the index that are not hidden: requests `spare` more, and repeats if too few."""
        if not want:
            return np.empty(0, np.int64), np.empty(0, np.float32)
        total = len(self.index_ids)
        ask = min(total, want + spare)
        # Tuned for the first few neighbours: finding more of them takes more leaves and candidates.
        deeper = -(-ask // _SHALLOW)
        reorder = self.config.reorder * deeper
        leaves = min(self.config.leaves, self.config.leaves_to_search * deeper)
        while True:
            # ScaNN silently caps k at the reorder count.
            reorder = min(total, max(reorder, 2 * ask))
            where, scores = self._one(query, ask, reorder, leaves if self.config.leaves else -1)
            # Results with a NaN score are padding, whatever their index.
            visible = ~np.isnan(scores)
            where, scores = where[visible].astype(np.int64), scores[visible]
            visible = ~hidden[where]
            if visible.sum() >= want:
                return where[visible][:want], scores[visible][:want]
            if ask >= total and leaves >= self.config.leaves:
                break
            ask, leaves = min(total, 4 * ask), min(self.config.leaves, 4 * leaves)
        # SOAR and hidden pairs can exhaust the index: score the visible vectors one by one.
        visible = np.flatnonzero(~hidden)
        rows = self.snapshot.rows_of(self.index_ids[visible])
        scores = np.concatenate([
            vectors(self.snapshot, rows[i : i + 16384], self.config.centred) @ query
            for i in range(0, len(rows), 16384)
        ])  # fmt: skip
        top = np.argsort(-scores, kind="stable")[:want]
        return visible[top], scores[top]
