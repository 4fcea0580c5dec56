"""Sample number n of a run: which source, which sample of it, and everything training reads of it.

All of it is a function of (seed, n). No process keeps a position, a buffer or a worker's state, so a resumed run goes
on at sample step·batch as if nothing had happened, on any number of processes.
"""

from __future__ import annotations

import functools
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ragturbo.errors import DatabaseMismatch, InvalidRequest
from ragturbo.train.shards import NeighborTable, Shards

if TYPE_CHECKING:
    from ragturbo.retrieval.database import Database

# Sources are mixed exactly within every block of this many samples.
_BLOCK = 1024


@dataclass(frozen=True)
class Batch:
    """What one micro-batch reads from disk."""

    z0: Tensor
    """(B, c, H, W) fp32"""
    noise: Tensor
    """(B, c, H, W) fp32: the noise that made z0, where there is one."""
    paired: Tensor
    """(B,) bool: whether there is."""
    input_ids: Tensor
    """(B, L) int64"""
    text: Tensor | None = None
    """(B, L, D), where the shards hold text states."""
    key: Tensor | None = None
    """(B, K) fp32, likewise."""
    ids: Tensor | None = None
    """(B, k) int64 rows of the database, −1 for none."""
    scores: Tensor | None = None
    """(B, k) fp32"""
    h_retr: Tensor | None = None
    """(B, k, T, C)"""
    retr_keys: Tensor | None = None
    """(B, k, K) fp32: the neighbours' keys."""

    def __len__(self) -> int:
        return len(self.z0)

    def to(self, device: torch.device) -> Batch:
        moved = {
            spec.name: value.to(device, non_blocking=True)
            for spec in fields(self)
            if (value := getattr(self, spec.name)) is not None
        }
        return replace(self, **moved)

    def pin(self) -> Batch:
        pinned = {s.name: value.pin_memory() for s in fields(self) if (value := getattr(self, s.name)) is not None}
        return replace(self, **pinned)


class Mixture:
    """Sources mixed by weight: each block of 1,024 samples holds every source's share, in an order of its own; each
    source is gone through in a new order every epoch."""

    def __init__(self, lengths: Sequence[int], weights: Sequence[float], seed: int) -> None:
        shares = np.asarray(weights, float) / sum(weights) * _BLOCK
        counts = np.floor(shares).astype(int)
        # The largest remainders take what rounding left.
        for j in np.argsort(counts - shares, kind="stable")[: _BLOCK - counts.sum()]:
            counts[j] += 1
        if (counts == 0).any():
            raise InvalidRequest(f"weights {list(weights)}: a source has no sample in {_BLOCK}; leave it out")
        self.lengths, self.counts, self.seed = list(lengths), counts, seed
        self._template = np.repeat(np.arange(len(counts)), counts)
        self._block = functools.lru_cache(maxsize=4)(self._make_block)
        self._order = functools.lru_cache(maxsize=2 * len(counts))(self._make_order)

    def __call__(self, n: int) -> tuple[int, int]:
        """Number of a sample -> (source, index in it)."""
        block, place = divmod(n, _BLOCK)
        sources, ranks = self._block(block)
        source = int(sources[place])
        epoch, rank = divmod(block * int(self.counts[source]) + int(ranks[place]), self.lengths[source])
        return source, int(self._order(source, epoch)[rank])

    def _make_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        order = np.random.default_rng([self.seed, 1, block]).permutation(self._template)
        ranks = np.empty(_BLOCK, np.int64)
        for source, count in enumerate(self.counts):
            ranks[order == source] = np.arange(count)
        return order, ranks

    def _make_order(self, source: int, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, 2, source, epoch]).permutation(self.lengths[source])


class TrainingData:
    """Folders of shards, mixed, with the rows of their neighbours."""

    def __init__(
        self,
        sources: Sequence[Shards],
        weights: Sequence[float],
        seed: int,
        *,
        database: Database | None = None,
        num_neighbors: int = 0,
        random_neighbors: bool = False,
    ) -> None:
        self.sources, self.seed = list(sources), seed
        self.mixture = Mixture([len(source) for source in sources], weights, seed)
        self.database, self.num_neighbors = database, num_neighbors if database is not None else 0
        self.random_neighbors = random_neighbors
        self.tables = [self._table(source) if database and not random_neighbors else None for source in sources]
        shapes = {tuple(source.read(0, "latents").shape) for source in sources}
        if len(shapes) > 1:
            raise InvalidRequest(f"the sources' latents have different shapes: {sorted(shapes)}")
        self.shape: tuple[int, ...] = shapes.pop()
        self.text = all("text" in source.fields and "key" in source.fields for source in sources)
        self._rows = database.ids if database is not None and random_neighbors else None

    def _table(self, source: Shards) -> NeighborTable:
        table = source.neighbors()
        if table is None:
            raise InvalidRequest(f"{source.folder} has no neighbours yet: run `ragturbo data neighbors` on it")
        assert self.database is not None
        made_with, here = table.made_by["database"], database_name(self.database)
        if made_with != here:
            raise DatabaseMismatch(
                f"{source.folder}/neighbors was made with database {made_with}, this one is {here}: run `ragturbo data "
                "neighbors` again"
            )
        if table.k < self.num_neighbors:
            raise InvalidRequest(f"{source.folder} has {table.k} neighbours a sample, not {self.num_neighbors}")
        return table

    def batch(self, numbers: Sequence[int]) -> Batch:
        """The samples of these numbers, on the CPU."""
        places = [self.mixture(n) for n in numbers]
        z0 = torch.stack([self.sources[s].read(i, "latents") for s, i in places]).float()
        paired = torch.tensor(["noise" in self.sources[s].fields for s, _ in places])
        noise = torch.stack([self._noise(s, i) for s, i in places]).float()
        input_ids = torch.stack([self.sources[s].read(i, "input_ids") for s, i in places]).long()
        batch = Batch(z0, noise, paired, input_ids)
        if self.text:
            text, key = (torch.stack([self.sources[s].read(i, name) for s, i in places]) for name in ("text", "key"))
            batch = replace(batch, text=text, key=key.float())
        return self._with_neighbors(batch, numbers, places) if self.num_neighbors else batch

    def caption(self, n: int) -> str:
        source, index = self.mixture(n)
        return str(self.sources[source].record(index)["caption"])

    def _noise(self, source: int, index: int) -> Tensor:
        shards = self.sources[source]
        return shards.read(index, "noise") if "noise" in shards.fields else torch.zeros(self.shape)

    def _with_neighbors(self, batch: Batch, numbers: Sequence[int], places: Sequence[tuple[int, int]]) -> Batch:
        assert self.database is not None
        k = self.num_neighbors
        if self._rows is not None:
            drawn = [np.random.default_rng([self.seed, 3, n]).choice(self._rows, k) for n in numbers]
            ids, scores = torch.from_numpy(np.stack(drawn)), torch.ones(len(drawn), k)
        else:
            found = [self.tables[s].read(i) for s, i in places]  # type: ignore[union-attr]
            ids, scores = torch.stack([f[0][:k] for f in found]), torch.stack([f[1][:k] for f in found])
        h_retr, keys = self.database.features(ids), self.database.keys(ids)
        return replace(batch, ids=ids, scores=scores, h_retr=h_retr, retr_keys=keys)


def database_name(database: Database) -> str:
    """The generation a table of neighbours belongs to: rows and ids as they are now."""
    from ragturbo.retrieval.manifest import read_current

    return " ".join(read_current(database.path))


class Prefetcher:
    """Batches read ahead by one thread, in order. An error there is raised here, at its place in the order."""

    def __init__(self, load: Callable[[Any], Any], requests: Iterator[Any], depth: int) -> None:
        self._queue: queue.Queue[tuple[bool, Any]] = queue.Queue(maxsize=depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(load, requests), daemon=True, name="ragturbo-data")
        self._thread.start()

    def _run(self, load: Callable[[Any], Any], requests: Iterator[Any]) -> None:
        try:
            for request in requests:
                if not self._put((True, load(request))):
                    return
        # Whatever went wrong belongs to the caller, who waits for a batch.
        except BaseException as error:
            self._put((False, error))

    def _put(self, item: tuple[bool, Any]) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def next(self) -> Any:
        good, value = self._queue.get()
        if not good:
            raise value
        return value

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
