"""The interface of a retriever, and the checks that the built-in ones share."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from ragturbo.errors import InvalidRequest
from ragturbo.messages import short

# Below this number of pairs, exact search is as fast as an index.
EXACT_BELOW = 20_000
# Results are (B, k) also where there are fewer pairs.
MAX_K = 65_536


@runtime_checkable
class Retriever(Protocol):
    """Any object with this method can be passed as `retriever=`, for example a client of a vector database.

    With the attribute `query_kind = "text"`, it gets the prompts, a list of str, instead of keys; with "both", it gets
    keys and `texts=`, the prompts.
    """

    def search(self, keys: Any, k: int, *, exclude: Any = None) -> tuple[Any, Any]:
        """Find the k nearest pairs of each key.

        Args:
            keys: (B, K) floats, normalised, a numpy array or a tensor.
            exclude: ids that are not returned, (m,) for all keys or (B, m) padded with -1.

        Returns:
            ids (B, k) int64 and scores (B, k) float32 on the device of the keys, best first; a missing neighbour is
            id -1 with score NaN.
        """
        ...


class Hits(NamedTuple):
    """What a search found, each (B, k): numpy arrays, or tensors if the keys are."""

    ids: Any
    scores: Any
    bm25: Any
    """NaN where the words were not searched."""
    rare_share: Any
    """fp32 in [0, 1]: the share of the query's rare words that the caption holds, weighted by idf."""


def to_host(keys: Any) -> np.ndarray:
    """Return keys as float32 on the host, without a copy if they are that already."""
    try:
        found = to_numpy(keys.float() if hasattr(keys, "detach") else keys).astype(np.float32, copy=False)
        if not found.ndim:
            raise ValueError("a single value")
        return found
    except (TypeError, ValueError):
        raise InvalidRequest(f"keys must be (B, K) numbers, not {short(keys)}", option="keys") from None


def like(keys: Any, ids: Any, scores: Any) -> tuple[Any, Any]:
    """Return ids and scores in the form of the keys: numpy arrays, or tensors on the device of the keys."""
    if not hasattr(keys, "detach"):
        return to_numpy(ids), to_numpy(scores)
    import torch

    return torch.as_tensor(ids).to(keys.device), torch.as_tensor(scores).to(keys.device)


def at_most_one(cosines: Any) -> Any:
    """Return cosines without what rounding adds to 1: stored keys are float16."""
    return cosines.clamp(max=1.0) if hasattr(cosines, "clamp") else np.minimum(cosines, np.float32(1))


def to_numpy(values: Any) -> np.ndarray:
    return values.detach().cpu().numpy() if hasattr(values, "detach") else np.asarray(values)


def check_keys(keys: np.ndarray, dim: int) -> None:
    """Raise InvalidRequest for keys of another width, or that are NaN, infinite or zero."""
    if keys.ndim != 2 or keys.shape[1] != dim:
        one = ", which is one key: give keys[None]" if keys.shape == (dim,) else ""
        raise InvalidRequest(f"keys must be (B, {dim}) for this database, not {tuple(keys.shape)}{one}")
    # A NaN or infinity makes the squared length of its row not finite.
    squares = np.einsum("bk,bk->b", keys, keys)
    bad = ~(np.isfinite(squares) & (squares > 0))
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        raise InvalidRequest(f"key {row} has squared length {squares[row]}; it must be finite and not zero")


def check_k(k: int) -> None:
    if not isinstance(k, (int, np.integer)) or isinstance(k, bool) or not 1 <= k <= MAX_K:
        raise InvalidRequest(f"k must be a whole number from 1 to {MAX_K}, not {short(k)}", option="k")


def flag(name: str, value: Any) -> bool:
    """Return True or False, of Python or NumPy, as a bool."""
    if not isinstance(value, (bool, np.bool_)):
        raise InvalidRequest(f"{name}={short(value)} must be True or False", option=name)
    return bool(value)


def excluded_ids(exclude: Any, batch: int) -> list[np.ndarray] | None:
    """Return `exclude` as one array of ids per query, or None."""
    if exclude is None:
        return None
    ids = to_ids(exclude)
    if ids.ndim > 2 or (ids.ndim == 2 and len(ids) != batch):
        raise InvalidRequest(f"exclude must be (m,) ids or (B, m) with B = {batch}, not {ids.shape}")
    if ids.size == 0:
        return None
    return [ids.reshape(-1)] * batch if ids.ndim < 2 else list(ids)


def to_ids(ids: Any) -> np.ndarray:
    """Return ids of any kind as int64 on the host. Raises InvalidRequest for floats."""
    array = to_numpy(list(ids) if isinstance(ids, set) else ids)
    if array.size == 0:
        return array.astype(np.int64)
    if array.dtype.kind not in "iu":
        found = {"f": "fractions", "U": "texts", "b": "true or false"}.get(array.dtype.kind, short(ids))
        raise InvalidRequest(f"ids must be whole numbers, not {found}", option="ids")
    return array.astype(np.int64, copy=False)


def check_results(ids: Any, scores: Any, batch: int, k: int, who: str) -> None:
    """Check the shapes that a user's own retriever returned."""
    for name, value in (("ids", ids), ("scores", scores)):
        if tuple(getattr(value, "shape", ())) != (batch, k):
            raise InvalidRequest(f"{who} gave {name} of shape {tuple(getattr(value, 'shape', ()))}, not {(batch, k)}")
