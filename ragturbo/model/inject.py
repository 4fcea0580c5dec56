"""How retrieval changes the H-space feature: not at all, by slerp (Eq. 3), lerp (its control) or adapter (Eq. 5)."""

from __future__ import annotations

import torch
from torch import Tensor

from ragturbo.errors import InvalidRequest
from ragturbo.model.adapter import HSpaceAdapter, RetrievedKV
from ragturbo.model.tokens import from_tokens, to_tokens
from ragturbo.ops import slerp

MODES = ("none", "slerp", "lerp", "adapter")


def cosine(key: Tensor, stored_keys: Tensor) -> Tensor:
    """Cosines of unit vectors, clamped to [0, 1], fp32.

    key: (B, K), or (B, P, K) if each of a prompt's P phrases found its own neighbours; stored_keys: (B, n, K), the
    neighbours of the first phrase first -> (B, n).
    """
    if key.ndim == 2:
        return torch.einsum("bd,bkd->bk", key.float(), stored_keys.float()).clamp(0, 1)
    each = stored_keys.float().unflatten(1, (key.shape[1], -1))
    return torch.einsum("bpd,bpkd->bpk", key.float(), each).flatten(1).clamp(0, 1)


def blend_weights(
    weights: Tensor, ids: Tensor, scores: Tensor, *, min_score: Tensor | None = None, lam: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute λ of each neighbour (B, k) fp32 and valid (B, k) bool, without synchronizing with the device.

    λ is the neighbour's weight clamped to [0, 1], and 0 if it is not valid.

    Args:
        weights: (B, k), the cosine of the keys, or more for a caption that names a rare word of the prompt.
        ids, scores: (B, k); id -1 for a missing neighbour, scores as the retriever gives them.
        min_score: (B,), the lowest score of a valid neighbour.
        lam: (B,), replaces every λ of its row unless it is NaN.
    """
    valid = ids >= 0
    if min_score is not None:
        limit = min_score.reshape(-1, 1)
        # A score of NaN is valid only if there is no limit.
        valid = valid & ((scores >= limit) | (limit == -torch.inf))
    each = _clamped(weights, valid)
    if lam is not None:
        given = lam.float()[:, None]
        each = torch.where(valid & ~torch.isnan(given), given, each)
    return each, valid


def mean_of_neighbours(h_retr: Tensor, valid: Tensor, weights: Tensor | None = None) -> Tensor:
    """The mean of the valid neighbours, weighted by their λ clamped to [0, 1], or equally if those are all 0.

    h_retr: (B, k, S, C), arbitrary in invalid rows; valid, weights: (B, k) -> (B, S, C) in h_retr's dtype.
    """
    equal = valid.float()
    share = equal if weights is None else _clamped(weights, valid)
    share = torch.where(share.sum(-1, keepdim=True) > 0, share, equal)
    share = share / share.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    # Summed in fp32 for all storage dtypes.
    rows = torch.where(valid[..., None, None], h_retr, 0).to(torch.promote_types(h_retr.dtype, torch.float32))
    return torch.einsum("bk,bksc->bsc", share.to(rows.dtype), rows).to(h_retr.dtype)


def check_equal_grids(
    own: tuple[int, int], theirs: tuple[int, int] | int, *, size: tuple[int, int] | None = None
) -> None:
    """Raise InvalidRequest if slerp and lerp cannot blend two features because their grids differ.

    Equal token counts are not enough: a 4x16 grid on an 8x8 grid would blend different places of the two images.

    Args:
        own: (h, w) of the generated image's feature.
        theirs: (h, w) of the retrieved feature, or its number of tokens if the grid is not known.
        size: (height, width) of the generated image in pixels, for the message.
    """
    if theirs in (own, own[0] * own[1]):
        return
    image = "the image" if size is None else f"an image of {size[0]}x{size[1]} pixels"
    retrieved = f"{theirs} tokens" if isinstance(theirs, int) else f"{theirs[0]}x{theirs[1]}"
    raise InvalidRequest(
        f"slerp and lerp need equal feature grids: {image} has features of {own[0]}x{own[1]}, its neighbours "
        f"{retrieved}. Generate at the size of the database's images, or use mode='none', or an adapter, which "
        "takes any grid.",
        option="height",
    )


def inject(
    mode: str,
    h: Tensor,
    h_retr: Tensor | RetrievedKV | None = None,
    *,
    lam: Tensor | None = None,
    w: Tensor | float = 0.8,
    valid: Tensor | None = None,
    adapter: HSpaceAdapter | None = None,
    grid: tuple[int, int] | None = None,
    per: str = "sample",
    impl: str = "auto",
    phrases: Tensor | None = None,
) -> Tensor:
    """Combine h with the neighbours' features. A sample without a valid neighbour keeps its h bit for bit.

    Args:
        mode: one of MODES.
        h: (B, C, h, w), which is viewed as tokens.
        h_retr: (B, k, S, C), or for the adapter its RetrievedKV.
        lam: λ of Eq. 5, (B,) or of each neighbour, (B, k). Slerp and lerp weigh the neighbours by it, None for equally.
        w: (B,) or float, the weight of h in Eq. 3 and in lerp.
        valid: (B, k) bool, None for all.
        grid: (h, w) of the retrieved features, if known.
        per: "sample" or "token", the angles of slerp.
        phrases: (B, P) bool, for an adapter that tells apart the neighbours of a prompt's phrases.
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
        return from_tokens(adapter(tokens, h_retr, lam, valid, impl, phrases), own)
    if isinstance(h_retr, RetrievedKV):
        raise InvalidRequest(f"mode {mode!r} needs the features, not the adapter's K and V")
    check_equal_grids(own, h_retr.shape[2])
    if grid is not None:
        check_equal_grids(own, grid)
    if valid is None:
        valid = torch.ones(h_retr.shape[:2], dtype=torch.bool, device=h.device)
    weights = lam if lam is None or lam.ndim == 2 else lam[:, None].expand(valid.shape)
    mean = mean_of_neighbours(h_retr, valid, weights).to(tokens.dtype)
    out = slerp(tokens, mean, w, per=per, impl=impl) if mode == "slerp" else _lerp(tokens, mean, w)
    return from_tokens(torch.where(valid.any(-1)[:, None, None], out, tokens), own)


def _clamped(weights: Tensor, valid: Tensor) -> Tensor:
    # The cosine of a zero key is NaN.
    return torch.where(valid, weights.float().nan_to_num(0.0).clamp(0, 1), 0.0)


def _lerp(h_tgt: Tensor, h_retr: Tensor, w: Tensor | float) -> Tensor:
    """Linear interpolation, the baseline of slerp."""
    dtype = torch.promote_types(h_tgt.dtype, torch.float32)
    if isinstance(w, Tensor):
        w = w.to(dtype).reshape(-1, 1, 1)
    elif not 0 <= w <= 1:
        raise InvalidRequest(f"w={w} is outside [0, 1]; it is the weight of the target feature")
    return (w * h_tgt.to(dtype) + (1 - w) * h_retr.to(dtype)).to(h_tgt.dtype)
