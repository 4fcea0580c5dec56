"""x + bias[c] + residual over channels_last images, in one pass after a convolution."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ragturbo.kernels import pdl, tiles
from ragturbo.kernels.launch import launch
from ragturbo.kernels.portable import cast


@triton.jit
def bias_residual(x_ptr, bias_ptr, residual_ptr, out_ptr, N, C: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """bias may be None. C is constexpr, so that the compiler uses wide loads of the bias if C is a multiple of 8."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < N
    pdl.wait(PDL)
    s = tl.load(x_ptr + o, mask=m, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        s += tl.load(bias_ptr + o % C, mask=m, other=0.0).to(tl.float32)
    s += tl.load(residual_ptr + o, mask=m, other=0.0).to(tl.float32)
    tl.store(out_ptr + o, cast(s, out_ptr.dtype.element_ty), mask=m)


def forward(x: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    """x, residual: (B, C, H, W); bias: (C,) -> channels_last (B, C, H, W)."""
    x, residual = (t.contiguous(memory_format=torch.channels_last) for t in (x, residual))
    bias = None if bias is None else bias.contiguous()
    out = torch.empty_like(x, memory_format=torch.channels_last)
    n, c = x.numel(), x.shape[1]
    tile = tiles.choose("bias_residual", f"N{n} C{c} {x.dtype}", x.device, {"BLOCK": 1024, "num_warps": 4})
    launch(bias_residual, (triton.cdiv(n, tile["BLOCK"]),), x, bias, residual, out, n, C=c, **tile)
    return out
