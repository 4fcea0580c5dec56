"""What a retriever is, so that a remote vector database can take the place of the built-in ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from ragturbo.errors import InvalidRequest

# Below this, brute force is both exact and as fast as an index.
EXACT_BELOW = 20_000


@runtime_checkable
class Retriever(Protocol):
    """Anything with this search can be passed as `retriever=`.

    keys: (B, K) floats, normalised by the caller, as a numpy array or a torch tensor. Returns ids (B, k) int64 and
    scores (B, k) float32, best first, on the keys' device; a missing neighbour is id -1 with score NaN. `exclude` is
    (m,) ids that no row may return, or (B, m) with -1 as padding. A retriever with the attribute `query_kind =
    "text"` is given the prompts themselves, a list of str, in the place of keys.
    """

    def search(self, keys: Any, k: int, *, exclude: Any = None) -> tuple[Any, Any]: ...


def to_host(keys: Any) -> np.ndarray:
    """Keys as float32 on the host, without a copy where they are there already."""
    if isinstance(keys, np.ndarray):
        return keys if keys.dtype == np.float32 else keys.astype(np.float32)
    if hasattr(keys, "detach"):
        return keys.detach().float().cpu().numpy()
    return np.asarray(keys, np.float32)


def like(keys: Any, ids: np.ndarray, scores: np.ndarray) -> tuple[Any, Any]:
    """Results where and what the keys were: numpy for numpy, tensors on the keys' device for tensors."""
    if not hasattr(keys, "detach"):
        return ids, scores
    import torch

    return torch.from_numpy(ids).to(keys.device), torch.from_numpy(scores).to(keys.device)


def check_keys(keys: np.ndarray, dim: int) -> None:
    """Refuses what has no neighbours: another width, NaN, infinity, or no direction at all."""
    if keys.ndim != 2 or keys.shape[1] != dim:
        raise InvalidRequest(f"keys must be (B, {dim}) for this database, not {tuple(keys.shape)}")
    # One pass: a NaN or an infinity anywhere makes its row's squared length not finite.
    squares = np.einsum("bk,bk->b", keys, keys)
    bad = ~(np.isfinite(squares) & (squares > 0))
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        raise InvalidRequest(f"key {row} has squared length {squares[row]}; it must be finite and not zero")


def check_k(k: int) -> None:
    if not isinstance(k, (int, np.integer)) or isinstance(k, bool) or k < 1:
        raise InvalidRequest(f"k must be a whole number of at least 1, not {k!r}")


def excluded_ids(exclude: Any, batch: int) -> list[np.ndarray] | None:
    """exclude as one array of ids a query, or None."""
    if exclude is None:
        return None
    ids = to_ids(exclude)
    if ids.ndim > 2 or (ids.ndim == 2 and len(ids) != batch):
        raise InvalidRequest(f"exclude must be (m,) ids or (B, m) with B = {batch}, not {ids.shape}")
    if ids.size == 0:
        return None
    return [ids.reshape(-1)] * batch if ids.ndim < 2 else list(ids)


def to_ids(ids: Any) -> np.ndarray:
    """Ids of any kind as int64 on the host; floats are refused rather than cut."""
    array = np.asarray(ids.detach().cpu() if hasattr(ids, "detach") else (list(ids) if isinstance(ids, set) else ids))
    if array.size == 0:
        return array.astype(np.int64)
    if array.dtype.kind not in "iu":
        raise InvalidRequest(f"ids must be whole numbers, not {array.dtype}")
    return array.astype(np.int64, copy=False)


def check_results(ids: Any, scores: Any, batch: int, k: int, who: str) -> None:
    """A retriever of the user's own must keep the contract before anything is read by its ids."""
    for name, value in (("ids", ids), ("scores", scores)):
        if tuple(getattr(value, "shape", ())) != (batch, k):
            raise InvalidRequest(f"{who} gave {name} of shape {tuple(getattr(value, 'shape', ()))}, not {(batch, k)}")


def text_queries(queries: Any, who: str) -> Sequence[str]:
    if isinstance(queries, str):
        return [queries]
    if not isinstance(queries, (list, tuple)) or not all(isinstance(query, str) for query in queries):
        raise InvalidRequest(f"{who} searches by text: give prompts (str), not {type(queries).__name__}")
    return queries
