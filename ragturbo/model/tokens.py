"""Features as tokens (B, L, C)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


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
