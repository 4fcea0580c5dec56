"""GroupNorm with the ResNet block's additions before it and SiLU after it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ragturbo.errors import InvalidRequest
from ragturbo.ops import dispatch


def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    *,
    silu: bool = False,
    add: Tensor | None = None,
    add_bias: Tensor | None = None,
    overwrite: bool = False,
    impl: str = "auto",
) -> Tensor:
    """x, add: (B, C, H, W); weight, bias, add_bias: (C,) -> SiLU(GroupNorm(x + add + add_bias[c])), x's dtype.

    The kernel reads and writes channels_last. Forward only. overwrite: the result may take x's memory.
    """
    return _run(x, groups, weight, bias, eps, silu, add, add_bias, False, impl, overwrite)[0]


def group_norm_and_sum(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    *,
    add: Tensor,
    silu: bool = False,
    add_bias: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`group_norm`, and the sum x + add + add_bias[c]: a ResNet block's output, which is the next one's input."""
    return _run(x, groups, weight, bias, eps, silu, add, add_bias, True, impl)


def _run(x, groups, weight, bias, eps, silu, add, add_bias, keep_sum, impl, overwrite=False) -> tuple[Tensor, Tensor]:
    if x.ndim != 4 or x.shape[1] % groups or weight.shape != x.shape[1:2] or bias.shape != x.shape[1:2]:
        raise InvalidRequest(
            f"group_norm: x {tuple(x.shape)}, {groups} groups, weight {tuple(weight.shape)}, bias {tuple(bias.shape)}"
        )
    if add_bias is not None and add_bias.shape != x.shape[1:2]:
        raise InvalidRequest(f"group_norm: x is {tuple(x.shape)}, add_bias is {tuple(add_bias.shape)}")
    if add is not None and add.shape != x.shape:
        raise InvalidRequest(f"group_norm: x is {tuple(x.shape)}, add is {tuple(add.shape)}")
    limits = None if add is None else {"native": "norms without a residual: on a CPU, convolutions add it"}
    inputs = x, weight, bias, add, add_bias
    name = dispatch.choose("group_norm", impl, x.device.type, x.dtype, *inputs, limits=limits)
    if name == "triton":
        return _triton(x, groups, weight, bias, eps, silu, add, add_bias, keep_sum)
    if name == "native":
        return _native(x, groups, weight, bias, eps, silu, add_bias, overwrite), x
    return reference(x, groups, weight, bias, eps, silu, add, add_bias)


def reference(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float,
    silu: bool, add: Tensor | None, add_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same in plain torch, computed in fp32 (fp64 for fp64); the sum is rounded to the storage type."""
    dtype = dispatch.compute_dtype(x.dtype)
    total = x.to(dtype)
    if add_bias is not None:
        total = total + add_bias.to(dtype)[:, None, None]
    if add is not None:
        total = total + add.to(dtype)
    total = total.to(x.dtype)
    out = F.group_norm(total.to(dtype), groups, weight.to(dtype), bias.to(dtype), eps)
    return (F.silu(out) if silu else out).to(x.dtype), total


def _native(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool, add_bias: Tensor | None,
    overwrite: bool,
) -> Tensor:  # fmt: skip
    """On a CPU, in channels_last. Called directly: a custom op would take longer than the norm of a small map."""
    x = x.contiguous(memory_format=torch.channels_last)
    out = x if overwrite else torch.empty_like(x)
    weight, bias = weight.float().contiguous(), bias.float().contiguous()
    added = None if add_bias is None else add_bias.float().contiguous()
    batch, channels, height, width = x.shape
    dispatch.native().group_norm(
        x=x.data_ptr(), out=out.data_ptr(), bf16=x.dtype == torch.bfloat16, batch=batch, pixels=height * width,
        channels=channels, groups=groups, weight=weight.data_ptr(), bias=bias.data_ptr(),
        add_bias=0 if added is None else added.data_ptr(), eps=eps, silu=silu, threads=torch.get_num_threads(),
    )  # fmt: skip
    return out


@torch.library.custom_op("ragturbo::group_norm", mutates_args=())
def _triton(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float,
    silu: bool, add: Tensor | None, add_bias: Tensor | None, keep_sum: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from ragturbo.kernels import group_norm as kernels

    out, total = kernels.forward(x, groups, weight, bias, eps, silu, add, add_bias, keep_sum)
    return out, x.new_empty(0) if total is None else total


@_triton.register_fake
def _(x, groups, weight, bias, eps, silu, add, add_bias, keep_sum) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(x, memory_format=torch.channels_last)
    return out, torch.empty_like(out) if keep_sum else x.new_empty(0)
