"""The λ-scaled residual of Eq. 5: h + λ·Δh, one λ a sample, read from device memory."""

from __future__ import annotations

import torch
from torch import Tensor

from ragturbo.errors import InvalidRequest
from ragturbo.ops import dispatch


def scaled_residual(h: Tensor, delta: Tensor, lam: Tensor | float, impl: str = "auto", inplace: bool = False) -> Tensor:
    """Eq. 5: h + lam[b]·delta. h, delta: (B, …), contiguous or channels_last; lam: float or (B,) -> as h.

    λ = 0 returns h's bits exactly, whatever delta holds. `inplace` writes into h and returns it.
    """
    if h.shape != delta.shape or h.ndim < 2:
        raise InvalidRequest(f"scaled_residual: h is {tuple(h.shape)}, delta is {tuple(delta.shape)}")
    if h.device != delta.device:
        raise InvalidRequest(f"scaled_residual: h is on {h.device}, delta on {delta.device}")
    scale = _scale(h, lam)
    if dispatch.choose("scaled_residual", impl, h.device.type) == "triton":
        if inplace:
            torch.ops.ragturbo.scaled_residual_(h, delta, scale)
            return h
        return torch.ops.ragturbo.scaled_residual(h, delta, scale)
    out = reference(h, delta, scale)
    return h.copy_(out) if inplace else out


def _scale(h: Tensor, lam: Tensor | float) -> Tensor:
    if not isinstance(lam, Tensor):
        return torch.full((h.shape[0],), lam, dtype=dispatch.compute_dtype(h.dtype), device=h.device)
    if lam.shape != (h.shape[0],):
        raise InvalidRequest(f"lam has shape {tuple(lam.shape)}, one λ a sample is ({h.shape[0]},)")
    return lam


def reference(h: Tensor, delta: Tensor, lam: Tensor) -> Tensor:
    """Eq. 5 in plain torch, computed in fp32 (fp64 for fp64)."""
    dtype = dispatch.compute_dtype(h.dtype)
    scale = lam.to(dtype).reshape(-1, *[1] * (h.ndim - 1))
    # A sum with 0·delta would turn -0.0 into 0.0 and let a NaN in: where λ is 0, h itself.
    return torch.where(scale == 0, h, (h.to(dtype) + scale * delta.to(dtype)).to(h.dtype))
