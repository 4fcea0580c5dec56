"""GEGLU after a projection: value · gelu(gate), with the projection's bias."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ragturbo.errors import InvalidRequest
from ragturbo.ops import dispatch


def geglu(x: Tensor, bias: Tensor | None = None, impl: str = "auto") -> Tensor:
    """x: (…, 2F), values before gates; bias: (2F,) -> (…, F) of x's dtype, with the exact gelu. Forward only."""
    if x.ndim < 1 or x.shape[-1] % 2 or (bias is not None and bias.shape != x.shape[-1:]):
        raise InvalidRequest(f"geglu: x {tuple(x.shape)}, bias {None if bias is None else tuple(bias.shape)}")
    name = dispatch.choose("geglu", impl, x.device.type, x.dtype, x, bias)
    if name == "triton":
        return _triton(x, bias)
    if name == "native":
        return _native(x, bias)
    return reference(x, bias)


def reference(x: Tensor, bias: Tensor | None) -> Tensor:
    """The same in plain torch, computed in fp32 (fp64 for fp64)."""
    dtype = dispatch.compute_dtype(x.dtype)
    projected = x.to(dtype) if bias is None else x.to(dtype) + bias.to(dtype)
    value, gate = projected.chunk(2, dim=-1)
    return (value * F.gelu(gate)).to(x.dtype)


def _native(x: Tensor, bias: Tensor | None) -> Tensor:
    x, width = x.contiguous(), x.shape[-1] // 2
    out = x.new_empty(*x.shape[:-1], width)
    shift = None if bias is None else bias.float().contiguous()
    dispatch.native().geglu(
        x=x.data_ptr(), out=out.data_ptr(), bf16=x.dtype == torch.bfloat16, rows=out.numel() // max(width, 1),
        width=width, bias=0 if shift is None else shift.data_ptr(), threads=torch.get_num_threads(),
    )  # fmt: skip
    return out


@torch.library.custom_op("ragturbo::geglu", mutates_args=())
def _triton(x: Tensor, bias: Tensor | None) -> Tensor:
    from ragturbo.kernels import geglu as kernels

    return kernels.forward(x, bias)


@_triton.register_fake
def _(x: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
