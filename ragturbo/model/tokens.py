"""Features as tokens (B, L, C)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# Queries whose scores are computed at once by `products`: few enough to stay in a CPU's cache.
_QUERIES = 128


def to_tokens(h: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h·w, C): a view, contiguous if h is channels_last."""
    return h.permute(0, 2, 3, 1).flatten(1, 2)


def from_tokens(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, h·w, C) -> (B, C, h, w): a view, channels_last if the tokens are contiguous."""
    return tokens.unflatten(1, grid).permute(0, 3, 1, 2)


def sdpa(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """softmax(QKᵀ/√d)V by torch. q: (B, T, C); k, v: (B, L, C); mask: broadcastable to (B, heads, T, L)."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal).transpose(1, 2).flatten(2)


def products(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """`sdpa` as two products and a softmax, a block of queries at a time, for bf16 on a CPU: torch's own kernel there
    multiplies in fp32. Scores are rounded to the storage type, as in attention without a fused kernel."""
    batch, tokens, channels = q.shape
    # Scaled first: a smaller rounding error, and one pass over fewer elements.
    q = q * (channels // heads) ** -0.5
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    keys = k.mT.contiguous()
    v = v.contiguous()
    out = torch.empty((batch, tokens, channels), dtype=q.dtype, device=q.device)
    views = out.unflatten(-1, (heads, -1)).transpose(1, 2)
    for first in range(0, tokens, _QUERIES):
        part = slice(first, first + _QUERIES)
        scores = torch.bmm(q[:, part], keys)
        views[:, :, part] = torch.bmm(scores.softmax(-1), v).unflatten(0, (batch, heads))
    return out
