"""LayerNorm over the last dimension. A row is read once, by one program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ragturbo.kernels import tiles
from ragturbo.kernels.launch import launch
from ragturbo.kernels.portable import cast, divide, inverse_sqrt


@triton.jit
def layer_norm(x_ptr, weight_ptr, bias_ptr, out_ptr, M, N, stride, eps, BM: tl.constexpr, BN: tl.constexpr):
    """Program (BM rows), with all N columns in registers."""
    i_m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    i_n = tl.arange(0, BN)
    m_n = i_n < N
    m = (i_m < M)[:, None] & m_n[None, :]
    x = tl.load(x_ptr + i_m[:, None] * stride + i_n[None, :], mask=m, other=0.0).to(tl.float32)
    mean = divide(tl.sum(x, axis=1), N)
    d = tl.where(m_n[None, :], x - mean[:, None], 0.0)
    # If the mean is large, its rounding error shifts every output of the row: subtract the mean of the differences too.
    d = tl.where(m_n[None, :], d - divide(tl.sum(d, axis=1), N)[:, None], 0.0)
    rstd = inverse_sqrt(divide(tl.sum(d * d, axis=1), N) + eps)
    w = tl.load(weight_ptr + i_n, mask=m_n, other=0.0).to(tl.float32)
    b = tl.load(bias_ptr + i_n, mask=m_n, other=0.0).to(tl.float32)
    y = d * rstd[:, None] * w[None, :] + b[None, :]
    tl.store(out_ptr + i_m[:, None] * N + i_n[None, :], cast(y, out_ptr.dtype.element_ty), mask=m)


def forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x: (…, N) -> contiguous (…, N)."""
    n = x.shape[-1]
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    rows = x.reshape(-1, n)
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    bn = tiles.power_of_2(n)
    default = {"BM": max(1, 2048 // bn), "num_warps": 8 if bn > 4096 else 4}
    tile = tiles.choose("layer_norm", f"M{rows.shape[0]} N{n} {x.dtype}", x.device, default)
    grid = (triton.cdiv(rows.shape[0], tile["BM"]),)
    args = rows, weight.contiguous(), bias.contiguous(), out, rows.shape[0], n, rows.stride(0), eps
    launch(layer_norm, grid, *args, BN=bn, **tile)
    return out
