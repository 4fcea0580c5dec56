"""LayerNorm over the channels, with the residual addition before it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ragturbo.errors import InvalidRequest
from ragturbo.ops import dispatch


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, impl: str = "auto") -> Tensor:
    """x: (…, C); weight, bias: (C,) -> (…, C) of x's dtype. Forward only."""
    _check(x, weight, bias)
    if dispatch.choose("layer_norm", impl, x.device.type, x.dtype, x, weight, bias) == "triton":
        return _triton(x, weight, bias, eps)
    return reference(x, weight, bias, eps)


def layer_norm_and_sum(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    *,
    add: Tensor,
    add_bias: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`layer_norm` of the sum x + add + add_bias, and the sum: a transformer's residual, added in the same launch.

    x, add: (…, C); weight, bias, add_bias: (C,) -> two of (…, C) in x's dtype. The sum is rounded once, and what is
    normalised is the rounded sum. Forward only.
    """
    _check(x, weight, bias)
    if add.shape != x.shape or add.dtype != x.dtype:
        raise InvalidRequest(
            f"layer_norm_and_sum: x is {x.dtype} of {tuple(x.shape)}, add is {add.dtype} of {tuple(add.shape)}"
        )
    if add_bias is not None and add_bias.shape != x.shape[-1:]:
        raise InvalidRequest(f"layer_norm_and_sum: x is {tuple(x.shape)}, add_bias is {tuple(add_bias.shape)}")
    inputs = x, weight, bias, add, add_bias
    if dispatch.choose("layer_norm", impl, x.device.type, x.dtype, *inputs) == "triton":
        return _triton_and_sum(x, weight, bias, eps, add, add_bias)
    return reference_and_sum(x, weight, bias, eps, add, add_bias)


def _check(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    if x.ndim < 1 or weight.shape != x.shape[-1:] or bias.shape != x.shape[-1:]:
        raise InvalidRequest(f"layer_norm: x {tuple(x.shape)}, weight {tuple(weight.shape)}, bias {tuple(bias.shape)}")


def reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """The same in plain torch, computed in fp32 (fp64 for fp64)."""
    dtype = dispatch.compute_dtype(x.dtype)
    return F.layer_norm(x.to(dtype), x.shape[-1:], weight.to(dtype), bias.to(dtype), eps).to(x.dtype)


def reference_and_sum(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, add: Tensor, add_bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The same in plain torch, computed in fp32 (fp64 for fp64); the sum is rounded to the storage type."""
    dtype = dispatch.compute_dtype(x.dtype)
    total = x.to(dtype)
    if add_bias is not None:
        total = total + add_bias.to(dtype)
    total = (total + add.to(dtype)).to(x.dtype)
    return reference(total, weight, bias, eps), total


@torch.library.custom_op("ragturbo::layer_norm", mutates_args=())
def _triton(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    from ragturbo.kernels import layer_norm as kernels

    return kernels.forward(x, weight, bias, eps)[0]


@_triton.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("ragturbo::layer_norm_and_sum", mutates_args=())
def _triton_and_sum(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, add: Tensor, add_bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    from ragturbo.kernels import layer_norm as kernels

    out, total = kernels.forward(x, weight, bias, eps, add, add_bias)
    assert total is not None
    return out, total


@_triton_and_sum.register_fake
def _(x, weight, bias, eps, add, add_bias) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    return out, torch.empty_like(out)
