"""One generation of a database as an engine uses it: search, then the keys and features of what was found."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ragturbo.engine.result import Retrieved
from ragturbo.errors import DatabaseMismatch
from ragturbo.neighbor import Neighbor
from ragturbo.retrieval.retriever import Hits, to_host, to_numpy

if TYPE_CHECKING:
    from ragturbo.config import GeneratorConfig
    from ragturbo.model.bundle import Bundle
    from ragturbo.retrieval import Database, FeatureCache


class DatabaseGeneration:
    """A database at one point in time, with its retriever and row cache. It never changes under a running batch."""

    def __init__(
        self,
        database: Database,
        retriever: Any = "auto",
        *,
        host_bytes: int | str | None = None,
        device_bytes: int | str | None = None,
        device: torch.device | str = "cpu",
        cache: FeatureCache | None = None,
    ) -> None:
        """Args:
        database: used as it is now; later changes become visible through `current`.
        retriever: a name, or an object with `search`; "auto" uses the one the database was opened with.
        host_bytes, device_bytes: budgets for caching features in memory.
        cache: of an earlier generation with the same features.
        """
        self.live = database
        self.database = database.frozen()
        self._memory: dict[str, Any] = {"host_bytes": host_bytes, "device_bytes": device_bytes, "device": device}
        self._cache = cache
        if host_bytes is not None or device_bytes is not None:
            self._cache = self.cache
        self._named = retriever
        self.asked_retriever: Any = database.asked_retriever if _is_auto(retriever) else retriever
        """The argument `retriever`, else the one the database was opened with, else "auto"."""
        if not (_is_auto(self.asked_retriever) and torch.device(device).type == "cuda"):
            # Fail now if the index cannot be made. On a GPU, "auto" may search there and needs no index.
            self._retriever  # noqa: B018

    @cached_property
    def _retriever(self) -> Any:
        return self.database.retriever() if _is_auto(self._named) else self.database.retriever(self._named)

    @property
    def retriever_name(self) -> str:
        """The retriever in use; "auto" on a GPU, where it is decided by the room on the device."""
        asked = self.asked_retriever
        return asked if isinstance(asked, str) else getattr(asked, "name", type(asked).__name__)

    @property
    def scores_are_cosines(self) -> bool:
        return self.retriever_name in ("auto", "exact", "scann")

    @classmethod
    def open(cls, database: Database, bundle: Bundle, config: GeneratorConfig) -> DatabaseGeneration:
        """Take the current generation, with a Generator's options.

        Raises:
            DatabaseMismatch: another model encoded the database.
        """
        database.check_encoder(bundle.fingerprint(), bundle.text.key_kind)
        geometry = database.geometry
        if (geometry.channels, geometry.key_dim) != (bundle.unet.channels, bundle.text.key_dim):
            raise DatabaseMismatch(
                f"{database.path} holds features of {geometry.channels} channels and keys of {geometry.key_dim}; the "
                f"model has {bundle.unet.channels} and {bundle.text.key_dim}"
            )
        asked = config.retriever
        if _is_auto(asked) and _is_auto(database.asked_retriever) and bundle.info.retriever is not None:
            asked = bundle.info.retriever
        return cls(
            database,
            asked,
            host_bytes=config.host_cache,
            device_bytes=config.device_cache,
            device=bundle.device,
        )

    @property
    def cache(self) -> FeatureCache:
        """Features in memory, page-locked if there is a GPU."""
        if self._cache is None:
            from ragturbo.retrieval import FeatureCache

            self._cache = FeatureCache(
                self.database, checksums=self.database.checksums, threads=self.database.threads, **self._memory
            )
        return self._cache

    def current(self) -> DatabaseGeneration:
        """Return self, or the newest generation if the database has changed: a removal affects the next request."""
        if self.live.snapshot is self.database.snapshot:
            return self
        cache = self._cache
        # A removal leaves the stored features unchanged, so their cache is kept.
        if cache is not None and not np.array_equal(cache.database.snapshot.ids, self.live.snapshot.ids):
            cache = None
        return DatabaseGeneration(self.live, self._named, cache=cache, **self._memory)

    def search(self, keys: Tensor, texts: Sequence[Sequence[str]], k: int, searched: Tensor | None = None) -> Hits:
        """Find k neighbours of every query of every image.

        Args:
            keys: (B, K), or (B, P, K) for P phrases per image.
            texts: the words of each query, for retrievers that search by them; empty if there are none.
            searched: (B, P) bool, False for queries that only pad an image's phrases; None for all.

        Returns:
            (B, P·k), those of the first phrase first. If a phrase has a rare word that captions hold, only they are
            neighbours of the prompt: an adapter could mistake other pictures for the named thing.
        """
        queries = keys.flatten(0, -2)
        flat = [text for row in texts for text in row] or [""] * len(queries)
        retriever, kind = self._retriever, getattr(self._retriever, "query_kind", "key")
        # Imported here, because without a database an engine needs no pyarrow.
        from ragturbo.retrieval.hybrid import HybridRetriever

        if isinstance(retriever, HybridRetriever):
            found = retriever.find(to_numpy(queries), k, texts=flat)
        else:
            only = flat if kind == "text" else queries
            ids, scores = retriever.search(only, k, **({"texts": flat} if kind == "both" else {}))
            ids, scores = to_numpy(ids), to_host(scores)
            found = Hits(ids, scores, np.full(ids.shape, np.nan, np.float32), np.zeros(ids.shape, np.float32))
        ids, scores, bm25, rare_share = (part.reshape(len(keys), -1) for part in found)
        if searched is not None:
            named = rare_share > 0
            left_out = ~to_numpy(searched).repeat(k, 1) | (named.any(1, keepdims=True) & ~named)
            if left_out.any():
                ids, scores, bm25 = (
                    np.where(left_out, part.dtype.type(nothing), part)
                    for part, nothing in ((ids, -1), (scores, np.nan), (bm25, np.nan))
                )
        return Hits(*(torch.as_tensor(part).to(keys.device) for part in (ids, scores, bm25, rare_share)))

    def gather(self, ids: Tensor, scores: Tensor, rare_share: Tensor | None = None) -> Retrieved:
        """ids, scores, rare_share: (B, k); id -1 for a missing neighbour."""
        host_ids = ids.cpu()
        keys = self.database.keys(host_ids).to(ids.device)
        read = self.database.features if self._cache is None else self._cache.rows
        return Retrieved(ids, scores.float(), keys, read(host_ids).to(ids.device), rare_share)

    def holds(self, id: int) -> bool:
        """Whether the id is stored and not removed."""
        snapshot = self.database.snapshot
        row = int(snapshot.rows_of(np.array([id]))[0])
        return row >= 0 and bool(snapshot.alive[row])

    def neighbor(self, id: int, **scores: Any) -> Neighbor:
        """The pair with an id of this generation, and fields of Neighbor. Its record is read on first access."""
        database = self.database
        return Neighbor.stored(id, lambda thumbnail: database.records([id], thumbnails=thumbnail)[0], **scores)

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of the stored features."""
        geometry = self.database.geometry
        return geometry.height, geometry.width

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
