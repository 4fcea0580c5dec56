"""A database as an engine sees it: search, then the keys and rows of what was found."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ragturbo.config import parse_bytes
from ragturbo.engine.step import Retrieved
from ragturbo.errors import DatabaseMismatch
from ragturbo.output import Neighbor

if TYPE_CHECKING:
    from ragturbo.config import GeneratorConfig
    from ragturbo.model.bundle import Bundle
    from ragturbo.retrieval import Database, FeatureCache


class DatabaseSource:
    """One generation of a database, with the retriever that searches it."""

    def __init__(
        self,
        database: Database,
        retriever: Any = "auto",
        *,
        host_bytes: int | None = None,
        device_bytes: int | None = None,
        device: torch.device | str = "cpu",
        cache: FeatureCache | None = None,
    ) -> None:
        """database: searched and read as it is now; what is appended to or removed from it later is another source.
        host_bytes, device_bytes: budgets of its rows in memory; cache: of an earlier source of the same rows."""
        self.live = database
        self.database = database.frozen()
        self._memory: dict[str, Any] = {"host_bytes": host_bytes, "device_bytes": device_bytes, "device": device}
        self._cache = cache
        if host_bytes is not None or device_bytes is not None:
            self._cache = self.cache
        self.named = retriever
        self.chosen: Any = database.asked_retriever if _is_auto(retriever) else retriever
        """What was asked for: here, or else where the database was opened. "auto" if neither named a retriever."""
        if not (_is_auto(self.chosen) and torch.device(device).type == "cuda"):
            # What cannot be made is refused now. On a GPU "auto" may search there, and then no index is loaded.
            self._retriever  # noqa: B018

    @cached_property
    def _retriever(self) -> Any:
        return self.database.retriever() if _is_auto(self.named) else self.database.retriever(self.named)

    @property
    def by_text(self) -> bool:
        """A lexical retriever is asked with the prompts; everything else with their keys."""
        return getattr(self._retriever, "query_kind", "key") == "text"

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
        return cls(
            database,
            config.retriever,
            host_bytes=parse_bytes(config.host_cache, "host_cache"),
            device_bytes=parse_bytes(config.device_cache, "device_cache"),
            device=bundle.device,
        )

    @property
    def cache(self) -> FeatureCache:
        """Rows in memory: page-locked where there is a GPU to read them."""
        if self._cache is None:
            from ragturbo.retrieval import FeatureCache

            self._cache = FeatureCache(
                self.database, checksums=self.database.checksums, threads=self.database.threads, **self._memory
            )
        return self._cache

    def current(self) -> DatabaseSource:
        """This source, or a new one where the database has changed since: a removal takes effect with the next call."""
        if self.live.snapshot is self.database.snapshot:
            return self
        cache = self._cache
        # A removal leaves the rows as they are, and what holds them in memory is used again.
        if cache is not None and not np.array_equal(cache.database.snapshot.ids, self.live.snapshot.ids):
            cache = None
        return DatabaseSource(self.live, self.named, cache=cache, **self._memory)

    def search(self, keys: Tensor, texts: Sequence[str] | None, k: int) -> tuple[Tensor, Tensor]:
        """keys (B, K), or the texts where the retriever is lexical -> ids (B, k) int64, scores (B, k), best first."""
        ids, scores = self._retriever.search(list(texts or ()) if self.by_text else keys, k)
        return torch.as_tensor(ids).to(keys.device), torch.as_tensor(scores).to(keys.device)

    def gather(self, ids: Tensor, scores: Tensor) -> Retrieved:
        """ids, scores (B, k), id -1 where nothing was found."""
        host_ids = ids.cpu()
        keys = self.database.keys(host_ids).to(ids.device)
        read = self.database.features if self._cache is None else self._cache.rows
        return Retrieved(ids, scores.float(), keys, read(host_ids).to(ids.device))

    def holds(self, id: int) -> bool:
        """Whether a search could return it: stored, and not removed."""
        snapshot = self.database.snapshot
        row = int(snapshot.rows_of(np.array([id]))[0])
        return row >= 0 and bool(snapshot.alive[row])

    def neighbor(self, id: int, score: float = float("nan"), lam: float = float("nan"), used: bool = True) -> Neighbor:
        """The pair of an id that is in this generation, whose record is read when it is looked at."""
        database = self.database
        return Neighbor.stored(id, score, lam, used, lambda thumbnail: database.records([id], thumbnails=thumbnail)[0])

    @property
    def info(self) -> dict[str, Any]:
        return self.database.info.to_dict()

    @property
    def generation(self) -> int:
        return self.database.snapshot.manifest.generation

    def counters(self) -> dict[str, int]:
        return {} if self._cache is None else self._cache.stats.to_dict()


def _is_auto(retriever: Any) -> bool:
    return isinstance(retriever, str) and retriever == "auto"
