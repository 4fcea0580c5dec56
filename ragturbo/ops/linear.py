"""A linear layer with the normalisation before it and the bias, GEGLU and residual after it, in one op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ragturbo.errors import InvalidRequest
from ragturbo.ops import dispatch
from ragturbo.ops.scaled_residual import reference as add_scaled


class Norm(NamedTuple):
    """A normalisation's parameters. groups = 0: LayerNorm over channels; else GroupNorm over tokens and channels."""

    weight: Tensor
    bias: Tensor
    eps: float = 1e-5
    groups: int = 0


def linear(
    x: Tensor,
    weights: Sequence[Tensor],
    bias: Tensor | None = None,
    *,
    norm: Norm | None = None,
    geglu: bool = False,
    residual: Tensor | None = None,
    lam: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """x: (B, T, K); weights: one to three of (N, K), their results side by side -> (B, T, parts·N) of x's dtype.

    In order: norm(x), the products, + bias (N,), GEGLU (values times gelu of gates: N halves), residual + result, or
    residual + lam[b]·result with lam (B,), where λ = 0 gives the residual's bits. Bias and GEGLU go with one weight.
    Forward only.
    """
    _check(x, weights, bias, norm, geglu, residual, lam)
    if dispatch.choose("linear", impl, x.device.type, x.dtype, x, *weights, bias, residual, lam) == "triton":
        n = norm or Norm(None, None)  # type: ignore[arg-type]
        kind = "" if norm is None else "group" if norm.groups else "layer"
        return _triton(x, list(weights), bias, kind, n.weight, n.bias, n.eps, n.groups, geglu, residual, lam)
    return reference(x, weights, bias, norm, geglu, residual, lam)


def _check(
    x: Tensor,
    weights: Sequence[Tensor],
    bias: Tensor | None,
    norm: Norm | None,
    geglu: bool,
    residual: Tensor | None,
    lam: Tensor | None,
) -> None:
    shapes = {tuple(w.shape) for w in weights}
    if x.ndim != 3 or not 1 <= len(weights) <= 3 or len(shapes) != 1 or next(iter(shapes))[1] != x.shape[-1]:
        raise InvalidRequest(f"linear takes x (B, T, K) and 1–3 weights (N, K): got {tuple(x.shape)}, {sorted(shapes)}")
    if len(weights) > 1 and (geglu or bias is not None):
        raise InvalidRequest("linear: bias and GEGLU go with a single weight")
    if norm is not None and norm.groups and x.shape[-1] % norm.groups:
        raise InvalidRequest(f"linear: {x.shape[-1]} channels do not divide into {norm.groups} groups")
    if lam is not None and residual is None:
        raise InvalidRequest("linear: lam scales what is added to a residual, and there is none")
    if any(w.dtype != x.dtype for w in weights):
        raise InvalidRequest(f"linear: x is {x.dtype}, the weights are {weights[0].dtype}")


def normalised(x: Tensor, norm: Norm | None) -> Tensor:
    """x: (B, T, K) in the computing dtype, normalised."""
    if norm is None:
        return x
    weight, bias = norm.weight.to(x.dtype), norm.bias.to(x.dtype)
    if norm.groups:
        return F.group_norm(x.transpose(1, 2), norm.groups, weight, bias, norm.eps).transpose(1, 2)
    return F.layer_norm(x, x.shape[-1:], weight, bias, norm.eps)


def reference(
    x: Tensor,
    weights: Sequence[Tensor],
    bias: Tensor | None,
    norm: Norm | None,
    geglu: bool,
    residual: Tensor | None,
    lam: Tensor | None,
) -> Tensor:
    """The same in plain torch, computed in fp32 (fp64 for fp64)."""
    dtype = dispatch.compute_dtype(x.dtype)
    normed = normalised(x.to(dtype), norm)
    out = torch.cat([F.linear(normed, w.to(dtype)) for w in weights], dim=-1)
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
    x: Tensor,
    weights: Sequence[Tensor],
    bias: Tensor | None,
    norm: str,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    groups: int,
    geglu: bool,
    residual: Tensor | None,
    lam: Tensor | None,
) -> Tensor:
    from ragturbo.kernels import linear as kernels

    return kernels.forward(x, weights, bias, norm, norm_weight, norm_bias, eps, groups, geglu, residual, lam)


@_triton.register_fake
def _(x, weights, bias, norm, norm_weight, norm_bias, eps, groups, geglu, residual, lam) -> Tensor:
    width = weights[0].shape[0] // 2 if geglu else weights[0].shape[0] * len(weights)
    return x.new_empty(x.shape[0], x.shape[1], width)
