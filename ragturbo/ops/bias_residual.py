"""The bias of a ResNet block's last convolution and the block's residual, in one pass.

On a GPU torch adds a convolution's bias in a separate launch, and the only fused addition of cuDNN that torch exposes
ends in a ReLU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ragturbo.errors import InvalidRequest
from ragturbo.ops import dispatch


def bias_residual(x: Tensor, bias: Tensor | None, residual: Tensor, impl: str = "auto") -> Tensor:
    """x, residual: (B, C, H, W); bias: (C,) -> x + bias[c] + residual, x's dtype, rounded once.

    The kernel reads and writes channels_last. Forward only.
    """
    if x.ndim != 4 or residual.shape != x.shape or (bias is not None and bias.shape != x.shape[1:2]):
        raise InvalidRequest(
            f"bias_residual: x {tuple(x.shape)}, bias {None if bias is None else tuple(bias.shape)}, "
            f"residual {tuple(residual.shape)}"
        )
    if dispatch.choose("bias_residual", impl, x.device.type, x.dtype, x, bias, residual) == "triton":
        return _triton(x, bias, residual)
    return reference(x, bias, residual)


def reference(x: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    """The same in plain torch, computed in fp32 (fp64 for fp64)."""
    dtype = dispatch.compute_dtype(x.dtype)
    total = x.to(dtype) + residual.to(dtype)
    if bias is not None:
        total = total + bias.to(dtype)[:, None, None]
    return total.to(x.dtype)


@torch.library.custom_op("ragturbo::bias_residual", mutates_args=())
def _triton(x: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    from ragturbo.kernels import bias_residual as kernels

    return kernels.forward(x, bias, residual)


@_triton.register_fake
def _(x: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)
