"""GEGLU: value · gelu(gate) of a projection's two halves, with the projection's bias."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ragturbo.kernels import pdl, tiles
from ragturbo.kernels.launch import launch
from ragturbo.kernels.portable import cast


@triton.jit
def gelu(x):
    """The exact gelu, by erf."""
    return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))


@triton.jit
def geglu(x_ptr, bias_ptr, out_ptr, F, stride, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Program (block of columns, row). bias may be None."""
    i_m = tl.program_id(1).to(tl.int64)
    i_f = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = i_f < F
    pdl.prefetch_vector(bias_ptr, tl.program_id(0) * BLOCK, F, BLOCK, PDL)
    pdl.wait(PDL)
    value = tl.load(x_ptr + i_m * stride + i_f, mask=m, other=0.0).to(tl.float32)
    gate = tl.load(x_ptr + i_m * stride + F + i_f, mask=m, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        value += tl.load(bias_ptr + i_f, mask=m, other=0.0).to(tl.float32)
        gate += tl.load(bias_ptr + F + i_f, mask=m, other=0.0).to(tl.float32)
    tl.store(out_ptr + i_m * F + i_f, cast(value * gelu(gate), out_ptr.dtype.element_ty), mask=m)


def forward(x: Tensor, bias: Tensor | None) -> Tensor:
    """x: (…, 2F), values before gates; bias: (2F,) -> contiguous (…, F)."""
    f = x.shape[-1] // 2
    rows = x.reshape(-1, 2 * f)
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    bias = None if bias is None else bias.contiguous()
    out = torch.empty(*x.shape[:-1], f, dtype=x.dtype, device=x.device)
    default = {"BLOCK": min(1024, tiles.power_of_2(f)), "num_warps": 4}
    tile = tiles.choose("geglu", f"M{rows.shape[0]} F{f} {x.dtype}", x.device, default)
    # The second axis of a grid is limited to 65,535.
    for i in range(0, rows.shape[0], 65535):
        part, o_part = rows[i : i + 65535], out.view(-1, f)[i : i + 65535]
        launch(geglu, (triton.cdiv(f, tile["BLOCK"]), len(part)), part, bias, o_part, f, part.stride(0), **tile)
    return out
