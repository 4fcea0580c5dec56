"""softmax(scale·scores) of fp32 scores, row by row, into the model's type: for attention with wide heads."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ragturbo.kernels import pdl, tiles
from ragturbo.kernels.launch import launch
from ragturbo.kernels.portable import cast, divide

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def softmax(x_ptr, out_ptr, L, scale, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Program (row), held in registers."""
    i_row = tl.program_id(0).to(tl.int64)
    o = tl.arange(0, BLOCK)
    m = o < L
    pdl.wait(PDL)
    x = tl.load(x_ptr + i_row * L + o, mask=m, other=float("-inf"))
    p = tl.exp2((x - tl.max(x, axis=0)) * (scale * _LOG2_E))
    p *= divide(1.0, tl.sum(p, axis=0))
    tl.store(out_ptr + i_row * L + o, cast(p, out_ptr.dtype.element_ty), mask=m)


def forward(scores: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """scores: (…, L) fp32, L at most 16,384 -> contiguous (…, L) of `dtype`."""
    scores = scores.contiguous()
    length = scores.shape[-1]
    out = torch.empty(scores.shape, dtype=dtype, device=scores.device)
    block = tiles.power_of_2(length)
    tile = tiles.choose("softmax", f"L{length} {dtype}", scores.device, {"num_warps": 8 if block > 2048 else 4})
    launch(softmax, (scores.numel() // length,), scores, out, length, scale, BLOCK=block, **tile)
    return out
