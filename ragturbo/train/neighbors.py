"""`ragturbo data neighbors`: for each training sample, the database rows it is trained with."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from ragturbo.errors import InvalidRequest
from ragturbo.model.bundle import Bundle
from ragturbo.model.inject import cosine
from ragturbo.retrieval import durable
from ragturbo.retrieval.hybrid import HybridRetriever
from ragturbo.train.data import database_name
from ragturbo.train.folder import NEIGHBORS, check_index, remaining, shard_path, write_or_check_index
from ragturbo.train.progress import loading, local_device, rank_and_world, track
from ragturbo.train.report import DataReport, Left
from ragturbo.train.shards import Shards
from ragturbo.train.start import check_neighbor_retriever

if TYPE_CHECKING:
    from ragturbo.retrieval.database import Database

log = logging.getLogger("ragturbo")

_INSTEAD = "or delete that folder"
# Rows searched at most for a sample whose nearest rows are all excluded.
_DEEPEST = 4096


def make_neighbors(
    data: str | Path,
    database: str | Path,
    *,
    model: str,
    k: int = 4,
    max_cosine: float | None = None,
    batch: int = 256,
    retriever: str = "auto",
    device: str | None = None,
) -> DataReport:
    """Write the missing tables of this process's share of the shards.

    A sample's own record and its duplicates are excluded, because the student would learn to copy them: rows with the
    same caption (ignoring case and spaces), image or source, or a key with a cosine of at least `max_cosine`.
    """
    from ragturbo.retrieval.database import Database

    began = time.monotonic()
    if k < 1:
        raise InvalidRequest(f"k={k} must be at least 1")
    check_neighbor_retriever(retriever)
    shards = Shards(data)
    db = Database.open(database, retriever=retriever)
    with loading(model):
        bundle = Bundle.load(model, device=device or local_device(), adapter=False)
    db.check_encoder(bundle.fingerprint(), bundle.text.key_kind)
    folder = shards.folder / NEIGHBORS
    made_by = {"k": k, "database": database_name(db), "max_cosine": max_cosine, "retriever": retriever}
    check_index(folder, made_by, _INSTEAD)
    todo = remaining(folder, len(shards.files), *rank_and_world())
    search = NeighborSearch(db, k, max_cosine)
    for shard in track(todo, len(todo), "neighbors"):
        records = shards.records(shard)
        ids, lam = [torch.zeros(0, k, dtype=torch.int64)], [torch.zeros(0, k)]
        for start in range(0, len(records), batch):
            keys = _keys(bundle, shards, shard, slice(start, start + batch), records[start : start + batch])
            found = search(keys, records[start : start + batch])
            ids.append(found[0])
            lam.append(found[1])
        write_or_check_index(folder, made_by, instead=_INSTEAD)
        durable.write_file(shard_path(folder, shard), save({"ids": torch.cat(ids), "lam": torch.cat(lam)}))
    return _report(folder, len(shards.files), len(todo), k, began)


def _report(folder: Path, shards: int, made: int, k: int, began: float) -> DataReport:
    """Count the samples with too few neighbours in all tables, whichever process wrote them."""
    paths = [path for path in (shard_path(folder, i) for i in range(shards)) if path.is_file()]
    report, left = DataReport(str(folder), made, shards, shards - len(paths)), Left()
    for path in paths:
        found = (load_file(path)["ids"] >= 0).sum(1)
        report.samples += len(found)
        none, few = int((found == 0).sum()), int(((found > 0) & (found < k)).sum())
        for kind, count in (("no_neighbors", none), ("few_neighbors", few)):
            if count:
                left.note(kind, f"of {k}, because the other rows of the database are duplicates of it", count)
    report.notes = {kind: {**entry, "examples": entry["examples"][:1]} for kind, entry in left.notes.items()}
    if not report.missing:
        for line in report.lines():
            log.warning("%s", line)
    report.seconds = time.monotonic() - began
    return report


def write_neighbors(shards: Shards, ids: Tensor, lam: Tensor, database: str) -> None:
    """Write the neighbours of all samples of a folder, if they are known without a search.

    Args:
        ids: (N, k) int64, −1 for none.
        lam: (N, k) fp32, λ of each; NaN for none. With `student.phrases`, the prompt's i-th phrase has neighbour i, and
            a phrase without one has id −1 and any λ; NaN means that there is no such phrase.
        database: `database_name` or `pairs_name` of what the ids are rows of.
    """
    if ids.shape != lam.shape or len(ids) != len(shards):
        raise InvalidRequest(
            f"{shards.folder} has {len(shards)} samples; got ids {tuple(ids.shape)} and lam {tuple(lam.shape)}"
        )
    folder = shards.folder / NEIGHBORS
    made_by = {"k": ids.shape[1], "database": database, "max_cosine": None, "retriever": "given"}
    write_or_check_index(folder, made_by, instead=_INSTEAD)
    for shard, (start, stop) in enumerate(itertools.pairwise(shards.starts)):
        part = {"ids": ids[start:stop].contiguous(), "lam": lam[start:stop].float().contiguous()}
        durable.write_file(shard_path(folder, shard), save(part))


class NeighborSearch:
    """The nearest rows that are not duplicates of the sample."""

    def __init__(self, database: Database, k: int, max_cosine: float | None = None) -> None:
        self.database, self.k, self.max_cosine = database, k, max_cosine
        tables = [pairs.text() for pairs in database.snapshot.segments.pairs]
        self._marks = {
            name: np.array([_mark(name, v) for table in tables for v in table.column(name).to_pylist()], np.int64)
            for name in ("caption", "sha256", "source")
        }

    def __call__(self, keys: Tensor, records: Sequence[dict[str, Any]]) -> tuple[Tensor, Tensor]:
        """keys: (B, K); records: B -> ids (B, k), −1 for none, and λ (B, k), NaN for none."""
        ids = torch.full((len(keys), self.k), -1, dtype=torch.int64)
        lam = torch.full((len(keys), self.k), torch.nan)
        rows, depth = list(range(len(keys))), self.k + 8
        while rows:
            depth = min(depth, len(self.database))
            wanted = keys[rows].float().cpu()
            found, lams = self._find(wanted, [str(records[row]["caption"]) for row in rows], depth)
            again = []
            for row, candidates, scores in zip(rows, found, lams, strict=True):
                good = list(self._others(candidates, scores, records[row]))[: self.k]
                ids[row, : len(good)], lam[row, : len(good)] = candidates[good], scores[good]
                if len(good) < self.k:
                    again.append(row)
            if depth >= min(_DEEPEST, len(self.database)):
                break
            rows, depth = again, 4 * depth
        return ids, lam

    def _find(self, keys: Tensor, captions: list[str], depth: int) -> tuple[Tensor, Tensor]:
        """ids and λ (B, depth) by the database's retriever."""
        retriever = self.database.retriever()
        if not isinstance(retriever, HybridRetriever):
            found, _ = self.database.search(keys, depth)
            return found, cosine(keys, self.database.keys(found))
        hits = retriever.find(keys, depth, texts=captions)
        # As in a Generator: the cosine, or what the caption's rare words say.
        return hits.ids, torch.maximum(cosine(keys, self.database.keys(hits.ids)), hits.rare_share)

    def _others(self, candidates: Tensor, cosines: Tensor, record: dict[str, Any]) -> Iterator[int]:
        """Positions of the candidates that are not duplicates of `record`."""
        places = self.database.snapshot.rows_of(candidates.numpy())
        own = {name: _mark(name, record.get(name)) for name in self._marks}
        for n, place in enumerate(places.tolist()):
            same = place < 0 or any(own[name] and self._marks[name][place] == own[name] for name in own)
            if not same and (self.max_cosine is None or cosines[n] < self.max_cosine):
                yield n


def _mark(name: str, value: Any) -> int:
    """A hash for comparing values; 0 for a missing value, which matches no other."""
    if not value:
        return 0
    text = " ".join(str(value).casefold().split()) if name == "caption" else str(value)
    return hash(text) or 1


@torch.no_grad()
def _keys(bundle: Bundle, shards: Shards, shard: int, rows: slice, records: Sequence[dict[str, Any]]) -> Tensor:
    if "key" in shards.fields:
        return shards.tensor(shard, "key")[rows].float()
    ids = bundle.text.tokenize([record["caption"] for record in records]).input_ids
    return bundle.text.encode(ids.to(bundle.device)).key.cpu()
