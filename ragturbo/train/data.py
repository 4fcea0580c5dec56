"""Training batches by sample number, mixed from several sources.

The source, index and neighbours of sample n of a run are a function of (seed, n). There is no position or buffer to
store, so a resumed run continues at sample step·batch, on any number of processes.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ragturbo.errors import DatabaseMismatch, InvalidRequest
from ragturbo.train.shards import NeighborTable, Shards

if TYPE_CHECKING:
    from ragturbo.retrieval.database import Database

_BLOCK = 1024


@dataclass(frozen=True)
class Batch:
    z0: Tensor
    """(B, c, H, W) fp32"""
    noise: Tensor
    """(B, c, H, W) fp32: the noise that z0 was generated from; 0 for images."""
    paired: Tensor
    """(B,) bool: whether the sample has such a noise."""
    input_ids: Tensor
    """(B, L) int64"""
    text: Tensor | None = None
    """(B, L, D), if the shards hold text states."""
    key: Tensor | None = None
    """(B, K) fp32, if the shards hold text states."""
    teacher_ids: Tensor | None = None
    """(B, L) int64: the tokens of the prompt that the teacher drew, if it may differ from the student's."""
    teacher_text: Tensor | None = None
    """(B, L, D): its states, if the shards hold text states."""
    ids: Tensor | None = None
    """(B, k) int64 rows of the database, −1 for none."""
    lam: Tensor | None = None
    """(B, k) fp32: λ of each neighbour, as precomputed; NaN for none. None: the cosine of the keys."""
    h_retr: Tensor | None = None
    """(B, k, T, C)"""
    retr_keys: Tensor | None = None
    """(B, k, K) fp32: the neighbours' keys."""

    def __len__(self) -> int:
        return len(self.z0)

    def to(self, device: torch.device) -> Batch:
        return self._map(lambda value: value.to(device, non_blocking=True))

    def pin(self) -> Batch:
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        values = {spec.name: getattr(self, spec.name) for spec in fields(self)}
        return replace(self, **{name: function(value) for name, value in values.items() if value is not None})


class Mixture:
    """Sample number -> (source, index). Each block of 1,024 samples has the exact share of every source, in random
    order; each epoch of a source has a new order."""

    def __init__(self, lengths: Sequence[int], weights: Sequence[float], seed: int) -> None:
        shares = np.asarray(weights, float) / sum(weights) * _BLOCK
        counts = np.floor(shares).astype(int)
        # The remaining samples go to the largest remainders.
        for j in np.argsort(counts - shares, kind="stable")[: _BLOCK - counts.sum()]:
            counts[j] += 1
        if (counts == 0).any():
            raise InvalidRequest(f"weights {list(weights)}: a source has no sample in {_BLOCK}; leave it out")
        self.lengths, self.counts, self.seed = list(lengths), counts, seed
        self._template = np.repeat(np.arange(len(counts)), counts)
        self._block = functools.lru_cache(maxsize=4)(self._make_block)
        self._order = functools.lru_cache(maxsize=2 * len(counts))(self._make_order)

    def __call__(self, n: int) -> tuple[int, int]:
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
    """A mixture of folders of shards, with the database rows of each sample's neighbours."""

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
        """random_neighbors: draw random rows instead of the precomputed neighbours."""
        self.sources, self.seed = list(sources), seed
        self.mixture = Mixture([len(source) for source in sources], weights, seed)
        self.database, self.num_neighbors = database, num_neighbors if database is not None else 0
        self.tables = [self._table(source) if database and not random_neighbors else None for source in sources]
        shapes = {tuple(source.read(0, "latents").shape) for source in sources}
        if len(shapes) > 1:
            raise InvalidRequest(f"the sources' latents have different shapes: {sorted(shapes)}")
        self.text = all("text" in source.fields and "key" in source.fields for source in sources)
        self.relabelled = any("teacher_ids" in source.fields for source in sources)
        self._rows = database.ids if database is not None and random_neighbors else None

    def _table(self, source: Shards) -> NeighborTable:
        assert self.database is not None
        table = source.neighbors()
        if table is None:
            raise InvalidRequest(
                f"{source.folder} has no neighbours: run `ragturbo data neighbors {source.folder} --database "
                f"{self.database.path}` first"
            )
        made_with, here = table.made_by["database"], database_name(self.database)
        if made_with != here:
            raise DatabaseMismatch(
                f"{source.folder}/neighbors has rows of another database than {self.database.path}, or of an earlier "
                f"generation ({_brief(made_with)}, now {_brief(here)}): delete it, and run `ragturbo data neighbors "
                f"{source.folder} --database {self.database.path}`"
            )
        if table.k < self.num_neighbors:
            raise InvalidRequest(f"{source.folder} has {table.k} neighbours a sample, not {self.num_neighbors}")
        return table

    def batch(self, numbers: Sequence[int]) -> Batch:
        """The samples with these numbers, on the CPU."""
        places = [(self.sources[s], i) for s, i in map(self.mixture, numbers)]

        def stack(name: str) -> Tensor:
            return torch.stack([shards.read(i, name) for shards, i in places])

        z0, paired = stack("latents").float(), torch.tensor(["noise" in shards.fields for shards, _ in places])
        noise = torch.zeros_like(z0)
        for n, (shards, i) in enumerate(places):
            if paired[n]:
                noise[n] = shards.read(i, "noise")
        batch = Batch(z0, noise, paired, stack("input_ids").long())
        if self.text:
            batch = replace(batch, text=stack("text"), key=stack("key").float())
        if self.relabelled:

            def teachers(name: str) -> Tensor:
                """The teacher's field, or the student's for samples with one prompt."""
                own = [f"teacher_{name}" if "teacher_ids" in shards.fields else _FIELDS[name] for shards, _ in places]
                return torch.stack([shards.read(i, field) for (shards, i), field in zip(places, own, strict=True)])

            batch = replace(batch, teacher_ids=teachers("ids").long())
            if self.text:
                batch = replace(batch, teacher_text=teachers("text"))
        return self._with_neighbors(batch, numbers) if self.num_neighbors else batch

    def _with_neighbors(self, batch: Batch, numbers: Sequence[int]) -> Batch:
        assert self.database is not None
        k = self.num_neighbors
        if self._rows is not None:
            drawn = [np.random.default_rng([self.seed, 3, n]).choice(self._rows, k) for n in numbers]
            ids, lam = torch.from_numpy(np.stack(drawn)), None
        else:
            found = [self.tables[s].read(i) for s, i in map(self.mixture, numbers)]  # type: ignore[union-attr]
            ids, lam = torch.stack([f[0][:k] for f in found]), torch.stack([f[1][:k] for f in found])
        h_retr, keys = self.database.features(ids), self.database.keys(ids)
        return replace(batch, ids=ids, lam=lam, h_retr=h_retr, retr_keys=keys)


# The student's field in place of the teacher's.
_FIELDS = {"ids": "input_ids", "text": "text"}


def database_name(database: Database) -> str:
    """The database and its generation: neighbour ids are valid for one generation only."""
    from ragturbo.retrieval.manifest import read_current

    return " ".join(read_current(database.path))


def _brief(name: str) -> str:
    """A database's name with a part of its hash."""
    generation, _, sha = name.partition(" ")
    return f"{generation} {sha[:8]}"


class Prefetcher:
    """Calls `load` on every request in a background thread, up to `depth` results ahead, in order."""

    def __init__(self, load: Callable[[Any], Any], requests: Iterator[Any], depth: int) -> None:
        self._pool = ThreadPoolExecutor(1, "ragturbo-data")
        self._load, self._requests = load, requests
        self._results = deque(self._pool.submit(load, request) for request in islice(requests, depth))

    def next(self) -> Any:
        """The next result. An exception in `load` is raised here, in place of its result."""
        value = self._results.popleft().result()
        self._results.extend(self._pool.submit(self._load, request) for request in islice(self._requests, 1))
        return value

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
