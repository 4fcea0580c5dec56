"""LayerNorm over the channels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ragturbo.errors import InvalidRequest
from ragturbo.ops import dispatch


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, impl: str = "auto") -> Tensor:
    """x: (…, C); weight, bias: (C,) -> (…, C) of x's dtype. Forward only."""
    if x.ndim < 1 or weight.shape != x.shape[-1:] or bias.shape != x.shape[-1:]:
        raise InvalidRequest(f"layer_norm: x {tuple(x.shape)}, weight {tuple(weight.shape)}, bias {tuple(bias.shape)}")
    if dispatch.choose("layer_norm", impl, x.device.type, x.dtype, x, weight, bias) == "triton":
        return _triton(x, weight, bias, eps)
    return reference(x, weight, bias, eps)


def reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """The same in plain torch, computed in fp32 (fp64 for fp64)."""
    dtype = dispatch.compute_dtype(x.dtype)
    return F.layer_norm(x.to(dtype), x.shape[-1:], weight.to(dtype), bias.to(dtype), eps).to(x.dtype)


@torch.library.custom_op("ragturbo::layer_norm", mutates_args=())
def _triton(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    from ragturbo.kernels import layer_norm as kernels

    return kernels.forward(x, weight, bias, eps)


@_triton.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
