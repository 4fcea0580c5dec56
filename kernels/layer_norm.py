"""LayerNorm over the last dimension, with the residual addition before it. A row is read once, by one program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ragturbo.kernels import pdl, tiles
from ragturbo.kernels.launch import launch
from ragturbo.kernels.portable import cast, divide, inverse_sqrt


@triton.jit
def layer_norm(
    x_ptr, add_ptr, add_bias_ptr, weight_ptr, bias_ptr, sum_ptr, out_ptr, M, N, stride_x, stride_add, eps,
    BM: tl.constexpr, BN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (BM rows), with all N columns in registers. add and sum, and add_bias too, may be None."""
    i_m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    i_n = tl.arange(0, BN)
    m_n = i_n < N
    m = (i_m < M)[:, None] & m_n[None, :]
    pdl.prefetch_vector(weight_ptr, 0, N, BN, PDL)
    pdl.prefetch_vector(bias_ptr, 0, N, BN, PDL)
    pdl.wait(PDL)
    x = tl.load(x_ptr + i_m[:, None] * stride_x + i_n[None, :], mask=m, other=0.0)
    if add_ptr is not None:
        s = x.to(tl.float32)
        if add_bias_ptr is not None:
            s += tl.load(add_bias_ptr + i_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
        s += tl.load(add_ptr + i_m[:, None] * stride_add + i_n[None, :], mask=m, other=0.0).to(tl.float32)
        # The stored sum is what is normalised, as if the addition were a launch of its own.
        x = cast(s, x.dtype)
        tl.store(sum_ptr + i_m[:, None] * N + i_n[None, :], x, mask=m)
    x = x.to(tl.float32)
    mean = divide(tl.sum(x, axis=1), N)
    d = tl.where(m_n[None, :], x - mean[:, None], 0.0)
    # If the mean is large, its rounding error shifts every output of the row: subtract the mean of the differences too.
    d = tl.where(m_n[None, :], d - divide(tl.sum(d, axis=1), N)[:, None], 0.0)
    rstd = inverse_sqrt(divide(tl.sum(d * d, axis=1), N) + eps)
    w = tl.load(weight_ptr + i_n, mask=m_n, other=0.0).to(tl.float32)
    b = tl.load(bias_ptr + i_n, mask=m_n, other=0.0).to(tl.float32)
    y = d * rstd[:, None] * w[None, :] + b[None, :]
    tl.store(out_ptr + i_m[:, None] * N + i_n[None, :], cast(y, out_ptr.dtype.element_ty), mask=m)


def _rows(x: Tensor) -> Tensor:
    """x as (M, N) with dense rows."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, add: Tensor | None = None, add_bias: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """x, add: (…, N); weight, bias, add_bias: (N,) -> contiguous (…, N), and the sum x + add + add_bias.

    Without add, add_bias is not added and there is no sum.
    """
    n = x.shape[-1]
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    total = None if add is None else torch.empty_like(out)
    rows, added = _rows(x), None if add is None else _rows(add)
    add_bias = None if add_bias is None else add_bias.contiguous()
    bn = tiles.power_of_2(n)
    default = {"BM": max(1, 2048 // bn), "num_warps": 8 if bn > 4096 else 4}
    tile = tiles.choose("layer_norm", f"M{rows.shape[0]} N{n} {x.dtype}", x.device, default)
    grid = (triton.cdiv(rows.shape[0], tile["BM"]),)
    strides = rows.stride(0), 0 if added is None else added.stride(0)
    affine = weight.contiguous(), bias.contiguous()
    launch(layer_norm, grid, rows, added, add_bias, *affine, total, out, rows.shape[0], n, *strides, eps, BN=bn, **tile)
    return out, total
