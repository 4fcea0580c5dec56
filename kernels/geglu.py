"""GEGLU: value · gelu(gate) of a projection's two halves, the projection's bias included."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ragturbo.kernels import tiles
from ragturbo.kernels.launch import launch
from ragturbo.kernels.portable import cast


@triton.jit
def geglu(x_ptr, bias_ptr, out_ptr, F, stride, BIAS: tl.constexpr, BLOCK: tl.constexpr):
    i_m = tl.program_id(1).to(tl.int64)
    i_f = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = i_f < F
    value = tl.load(x_ptr + i_m * stride + i_f, mask=m, other=0.0).to(tl.float32)
    gate = tl.load(x_ptr + i_m * stride + F + i_f, mask=m, other=0.0).to(tl.float32)
    if BIAS:
        value += tl.load(bias_ptr + i_f, mask=m, other=0.0).to(tl.float32)
        gate += tl.load(bias_ptr + F + i_f, mask=m, other=0.0).to(tl.float32)
    y = value * (0.5 * gate * (1 + tl.erf(gate * 0.7071067811865476)))
    tl.store(out_ptr + i_m * F + i_f, cast(y, out_ptr.dtype.element_ty), mask=m)


def forward(x: Tensor, bias: Tensor | None) -> Tensor:
    """x: (…, 2F), values before gates; bias: (2F,) -> contiguous (…, F)."""
    f = x.shape[-1] // 2
    rows = x.reshape(-1, 2 * f)
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    out = torch.empty(*x.shape[:-1], f, dtype=x.dtype, device=x.device)
    default = {"BLOCK": min(1024, tiles.power_of_2(f)), "num_warps": 4}
    tile = tiles.choose("geglu", f"M{rows.shape[0]} F{f} {x.dtype}", x.device, default)
    # The second axis of a grid ends at 65,535.
    for i in range(0, rows.shape[0], 65535):
        part, o_part = rows[i : i + 65535], out.view(-1, f)[i : i + 65535]
        grid = (triton.cdiv(f, tile["BLOCK"]), part.shape[0])
        launch(geglu, grid, part, x if bias is None else bias.contiguous(), o_part, f, part.stride(0),
               BIAS=bias is not None, **tile)  # fmt: skip
    return out
