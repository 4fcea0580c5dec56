"""What retrieval does to the H-space feature: none, slerp (Eq. 3), lerp (its control) or the adapter (Eq. 5)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ragturbo.errors import InvalidRequest
from ragturbo.model.adapter import HSpaceAdapter, RetrievedKV
from ragturbo.model.unet import from_tokens, to_tokens
from ragturbo.ops import slerp


def cosine(key: Tensor, stored_keys: Tensor) -> Tensor:
    """λ of each neighbour: key (B, K), stored_keys (B, k, K), unit vectors -> (B, k) fp32, clamped to [0, 1]."""
    return torch.einsum("bd,bkd->bk", key.float(), stored_keys.float()).clamp(0, 1)


def blend_weights(
    cosine: Tensor, ids: Tensor, scores: Tensor, *, min_score: Tensor | float = -torch.inf, lam: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(λ (B,) fp32, valid (B, k) bool), without a wait for the device. cosine, scores, ids: (B, k), id -1 for none.

    A neighbour is valid if it is there and its score, the retriever's own, reaches min_score ((B,) or float). λ is the
    mean over the valid ones of the cosine clamped to [0, 1], or `lam` (B,) where it is not NaN; 0 where none is valid.
    """
    limit = _on_device(min_score, scores).reshape(-1, 1)
    # A neighbour without a score passes only where there is no limit.
    valid = (ids >= 0) & ((scores >= limit) | (limit == -torch.inf))
    count = valid.sum(-1)
    mean = _relation(cosine, valid).sum(-1) / count.clamp(min=1)
    if lam is not None:
        mean = torch.where(torch.isnan(lam), mean, lam.float())
    return torch.where(count > 0, mean, 0.0), valid


def mean_of_neighbours(h_retr: Tensor, valid: Tensor, weights: Tensor | None = None) -> Tensor:
    """The mean of the valid neighbours, weighted by their cosines clamped to [0, 1], or alike if those are all 0.

    h_retr: (B, k, S, C), where invalid rows may hold anything; valid, weights: (B, k) -> (B, S, C) in h_retr's dtype.
    """
    alike = valid.float()
    share = alike if weights is None else _relation(weights, valid)
    share = torch.where(share.sum(-1, keepdim=True) > 0, share, alike)
    share = share / share.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    # Summed in fp32 whatever the storage.
    rows = torch.where(valid[..., None, None], h_retr, 0).to(torch.promote_types(h_retr.dtype, torch.float32))
    return torch.einsum("bk,bksc->bsc", share.to(rows.dtype), rows).to(h_retr.dtype)


def check_equal_grids(
    own: tuple[int, int], theirs: tuple[int, int] | int, *, size: tuple[int, int] | None = None
) -> None:
    """Check that slerp or lerp can blend two features.

    Equal token counts are not enough: a 4x16 grid on an 8x8 grid would blend different places of the two images.

    Args:
        own: (h, w) of the generated image's feature.
        theirs: (h, w) of the retrieved feature, or its number of tokens if the grid is not known.
        size: (height, width) of the generated image in pixels, for the message.

    Raises:
        InvalidRequest: the grids differ.
    """
    if theirs in (own, own[0] * own[1]):
        return
    image = "the image" if size is None else f"an image of {size[0]}x{size[1]} pixels"
    retrieved = f"{theirs} tokens" if isinstance(theirs, int) else f"{theirs[0]}x{theirs[1]}"
    raise InvalidRequest(
        f"slerp and lerp need equal feature grids: {image} has features of {own[0]}x{own[1]}, its neighbours "
        f"{retrieved}. Generate at the size of the database's images, or use mode='adapter', which takes any grid."
    )


def inject(
    mode: str,
    h: Tensor,
    h_retr: Tensor | RetrievedKV | None = None,
    *,
    lam: Tensor | None = None,
    w: Tensor | float = 0.8,
    valid: Tensor | None = None,
    weights: Tensor | None = None,
    adapter: HSpaceAdapter | None = None,
    grid: tuple[int, int] | None = None,
    per: str = "sample",
    impl: str = "auto",
) -> Tensor:
    """h: (B, C, h, w) -> the same shape with the neighbours in it. It is viewed as tokens, never copied.

    h_retr: (B, k, S, C), of `grid` cells where that is known, or, for the adapter, its RetrievedKV; valid: (B, k) bool;
    lam: (B,), Eq. 5; w: (B,) or float, Eq. 3; weights: (B, k), the cosines by which slerp and lerp average neighbours.
    A row without a valid neighbour keeps h's bits.
    """
    if mode not in MODES:
        raise InvalidRequest(f"mode {mode!r}; known: {', '.join(MODES)}")
    if mode == "none":
        return h
    if h_retr is None:
        raise InvalidRequest(f"mode {mode!r} needs retrieved features")
    own = (h.shape[2], h.shape[3])
    tokens = to_tokens(h)
    if mode == "adapter":
        if adapter is None or lam is None:
            raise InvalidRequest('mode "adapter" needs an adapter and λ')
        return from_tokens(adapter(tokens, h_retr, lam, valid, impl), own)
    if isinstance(h_retr, RetrievedKV):
        raise InvalidRequest(f"mode {mode!r} blends the features themselves, not the adapter's K and V")
    check_equal_grids(own, h_retr.shape[2])
    if grid is not None:
        check_equal_grids(own, grid)
    if valid is None:
        valid = torch.ones(h_retr.shape[:2], dtype=torch.bool, device=h.device)
    mean = mean_of_neighbours(h_retr, valid, weights).to(tokens.dtype)
    out = _INTERPOLATIONS[mode](tokens, mean, w, per, impl)
    return from_tokens(torch.where(valid.any(-1)[:, None, None], out, tokens), own)


def _relation(cosine: Tensor, valid: Tensor) -> Tensor:
    # A zero key has no direction and its cosine is NaN: no relation.
    return torch.where(valid, cosine.float().nan_to_num(0.0).clamp(0, 1), 0.0)


def _on_device(value: Tensor | float, like: Tensor) -> Tensor:
    """A number becomes a tensor by a fill: a copy from the host would wait."""
    if isinstance(value, Tensor):
        return value
    return torch.full((1,), value, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)


def _slerp(h_tgt: Tensor, h_retr: Tensor, w: Tensor | float, per: str, impl: str) -> Tensor:
    return slerp(h_tgt, h_retr, w, per=per, impl=impl)


def _lerp(h_tgt: Tensor, h_retr: Tensor, w: Tensor | float, per: str, impl: str) -> Tensor:
    """The straight line between the two: what slerp must beat."""
    if not isinstance(w, Tensor) and not 0 <= w <= 1:
        raise InvalidRequest(f"w={w} is outside [0, 1]: it is the weight of the target feature")
    weight = _on_device(w, h_tgt).to(torch.promote_types(h_tgt.dtype, torch.float32)).reshape(-1, 1, 1)
    return (weight * h_tgt + (1 - weight) * h_retr).to(h_tgt.dtype)


_INTERPOLATIONS: dict[str, Callable[..., Tensor]] = {"slerp": _slerp, "lerp": _lerp}
MODES = ("none", "slerp", "lerp", "adapter")
