"""A linear layer with bias, GEGLU and residual in one op."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ragturbo.errors import InvalidRequest
from ragturbo.ops import dispatch
from ragturbo.ops.scaled_residual import reference as add_scaled


def linear(
    x: Tensor,
    weights: Sequence[Tensor],
    bias: Tensor | None = None,
    *,
    geglu: bool = False,
    residual: Tensor | None = None,
    lam: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """The products, + bias, then GEGLU, then residual + result or residual + lam[b]·result. Forward only.

    Args:
        x: (B, T, K).
        weights: one to three of (N, K); their results are concatenated.
        bias: (N,), with a single weight only.
        geglu: multiply the values (first N/2) by gelu of the gates; with a single weight only.
        residual: (B, T, width of the result).
        lam: (B,); 0 gives the residual bit for bit.

    Returns:
        (B, T, parts·N), or (B, T, N/2) with GEGLU, in x's dtype.
    """
    shapes = {tuple(w.shape) for w in weights}
    if x.ndim != 3 or not 1 <= len(weights) <= 3 or len(shapes) != 1 or next(iter(shapes))[1] != x.shape[-1]:
        raise InvalidRequest(f"linear takes x (B, T, K) and 1–3 weights (N, K): got {tuple(x.shape)}, {sorted(shapes)}")
    if len(weights) > 1 and (geglu or bias is not None):
        raise InvalidRequest("linear: bias and GEGLU require a single weight")
    if lam is not None and residual is None:
        raise InvalidRequest("linear: lam requires a residual")
    if any(w.dtype != x.dtype for w in weights):
        raise InvalidRequest(f"linear: x is {x.dtype}, the weights are {weights[0].dtype}")
    if dispatch.choose("linear", impl, x.device.type, x.dtype, x, *weights, bias, residual, lam) == "triton":
        return _triton(x, list(weights), bias, geglu, residual, lam)
    return reference(x, weights, bias, geglu, residual, lam)


def reference(
    x: Tensor, weights: Sequence[Tensor], bias: Tensor | None, geglu: bool, residual: Tensor | None, lam: Tensor | None
) -> Tensor:
    """The same in plain torch, computed in fp32 (fp64 for fp64)."""
    dtype = dispatch.compute_dtype(x.dtype)
    out = torch.cat([F.linear(x.to(dtype), w.to(dtype)) for w in weights], dim=-1)
    if bias is not None:
        out = out + bias.to(dtype)
    if geglu:
        value, gate = out.chunk(2, dim=-1)
        out = value * F.gelu(gate)
    if residual is None:
        return out.to(x.dtype)
    if lam is None:
        return (residual.to(dtype) + out).to(x.dtype)
    return add_scaled(residual, out, lam)


@torch.library.custom_op("ragturbo::linear", mutates_args=())
def _triton(
    x: Tensor, weights: Sequence[Tensor], bias: Tensor | None, geglu: bool, residual: Tensor | None, lam: Tensor | None
) -> Tensor:
    from ragturbo.kernels import linear as kernels

    return kernels.forward(x, weights, bias, geglu, residual, lam)


@_triton.register_fake
def _(x, weights, bias, geglu, residual, lam) -> Tensor:
    width = weights[0].shape[0] // 2 if geglu else weights[0].shape[0] * len(weights)
    return x.new_empty(x.shape[0], x.shape[1], width)
