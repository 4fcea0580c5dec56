"""A database as an engine sees it: search, then the keys and rows of what was found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ragturbo.engine.step import Retrieved
from ragturbo.errors import DatabaseMismatch
from ragturbo.output import Neighbor

if TYPE_CHECKING:
    from ragturbo.config import GeneratorConfig
    from ragturbo.model.bundle import Bundle
    from ragturbo.retrieval import Database


class DatabaseSource:
    """One generation of a database, with the retriever that searches it."""

    def __init__(self, database: Database, retriever: Any = "auto") -> None:
        """database: searched and read as it is now; what is appended to or removed from it later is another source."""
        self.live = database
        self.database = database.frozen()
        self.named = retriever
        self._retriever = self.database.retriever() if retriever == "auto" else self.database.retriever(retriever)
        self.retriever_name: str = getattr(self._retriever, "name", type(self._retriever).__name__)
        # A lexical retriever is asked with the prompts; everything else with their keys.
        self.by_text: bool = getattr(self._retriever, "query_kind", "key") == "text"

    @classmethod
    def open(cls, database: Database, bundle: Bundle, config: GeneratorConfig) -> DatabaseSource:
        """Refuses a database that another model made."""
        database.check_encoder(bundle.fingerprint(), bundle.text.key_kind)
        geometry = database.geometry
        if (geometry.channels, geometry.key_dim) != (bundle.unet.channels, bundle.text.key_dim):
            raise DatabaseMismatch(
                f"{database.path} holds features of {geometry.channels} channels and keys of {geometry.key_dim}; the "
                f"model has {bundle.unet.channels} and {bundle.text.key_dim}"
            )
        return cls(database, config.retriever)

    def current(self) -> DatabaseSource:
        """This source, or a new one where the database has changed since: a removal takes effect with the next call."""
        if self.live.snapshot is self.database.snapshot:
            return self
        return DatabaseSource(self.live, self.named)

    def search(self, keys: Tensor, texts: Sequence[str] | None, k: int) -> tuple[Tensor, Tensor]:
        """keys (B, K), or the texts where the retriever is lexical -> ids (B, k) int64, scores (B, k), best first."""
        ids, scores = self._retriever.search(list(texts or ()) if self.by_text else keys, k)
        return torch.as_tensor(ids).to(keys.device), torch.as_tensor(scores).to(keys.device)

    def gather(self, ids: Tensor, scores: Tensor) -> Retrieved:
        """ids, scores (B, k), id -1 where nothing was found."""
        host_ids = ids.cpu()
        keys = self.database.keys(host_ids).to(ids.device)
        return Retrieved(ids, scores.float(), keys, self.database.features(host_ids).to(ids.device))

    def holds(self, id: int) -> bool:
        """Whether a search could return it: stored, and not removed."""
        snapshot = self.database.snapshot
        row = int(snapshot.rows_of(np.array([id]))[0])
        return row >= 0 and bool(snapshot.alive[row])

    def neighbors(self, ids: Sequence[int]) -> list[Neighbor | None]:
        """The records, None for a missing neighbour; scores and λ are filled in by who knows them."""
        there = [i for i in ids if i >= 0]
        records = {record.id: record for record in self.database.records(there)} if there else {}
        nan = float("nan")
        return [
            None
            if i < 0
            else Neighbor(i, nan, nan, (r := records[i]).caption, r.source, True, r.thumbnail, dict(r.extra))
            for i in ids
        ]

    @property
    def info(self) -> dict[str, Any]:
        return self.database.info.to_dict()

    def counters(self) -> dict[str, int]:
        return {}
