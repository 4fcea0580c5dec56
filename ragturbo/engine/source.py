"""A database as an engine sees it: search, then the rows and λ of what was found."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ragturbo.engine.step import Retrieved

if TYPE_CHECKING:
    from ragturbo.retrieval import Database


class DatabaseSource:
    """One generation of a database. `retriever` overrides the database's own; `rows(ids)` is a FeatureCache's or the
    database's."""

    def __init__(self, database: Database, retriever: Any, rows: Any) -> None:
        self.database = database
        self._retriever = retriever
        self._rows = rows

    def search(self, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
        ids, scores = self._retriever.search(keys, k)
        return ids, scores

    def gather(self, ids: Tensor, scores: Tensor) -> Retrieved:
        """ids, scores (B, k), id -1 where nothing was found."""
        host_ids = ids.cpu()
        keys = self.database.keys(host_ids).to(ids.device, torch.float32)
        return Retrieved(ids, scores.float(), keys, self._rows(host_ids).to(ids.device))
