"""The retrieval database: pairs, keys and cached H-space features on disk; search over them; rows in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ragturbo.retrieval.database import Database
    from ragturbo.retrieval.features import FeatureCache
    from ragturbo.retrieval.format import Geometry
    from ragturbo.retrieval.pairs import Record
    from ragturbo.retrieval.retriever import Retriever
    from ragturbo.retrieval.scann import ScannConfig

_HOMES = {
    "Database": "database",
    "FeatureCache": "features",
    "Geometry": "format",
    "Record": "pairs",
    "Retriever": "retriever",
    "ScannConfig": "scann",
}
__all__ = ["Database", "FeatureCache", "Geometry", "Record", "Retriever", "ScannConfig"]


def __getattr__(name: str) -> Any:
    # Names are imported on access, so that importing the format or the writer does not import torch.
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f"ragturbo.retrieval.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'ragturbo.retrieval' has no attribute {name!r}")
