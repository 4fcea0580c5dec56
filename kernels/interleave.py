"""Four phases, side by side in the channels of a channels_last image, to one image of twice the size."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ragturbo.kernels import pdl, tiles
from ragturbo.kernels.launch import launch


@triton.jit
def interleave(x_ptr, out_ptr, H, W, C: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Program (row of the output, block of its 2W·C elements). C is constexpr: a multiple of 8 allows 16-byte loads."""
    i_row = tl.program_id(0)
    i_b, y = i_row // (2 * H), i_row % (2 * H)
    o = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m = o < 2 * W * C
    i_x = o // C
    pdl.wait(PDL)
    p_row = x_ptr + (i_b * (H + 1) + (y + 1) // 2).to(tl.int64) * (W + 1) * (4 * C) + (y % 2) * (2 * C)
    v = tl.load(p_row + ((i_x + 1) // 2) * (4 * C) + (i_x % 2) * C + o % C, mask=m)
    tl.store(out_ptr + i_row.to(tl.int64) * (2 * W * C) + o, v, mask=m)


def forward(phases: Tensor) -> Tensor:
    """phases: (B, 4C, H + 1, W + 1) -> channels_last (B, C, 2H, 2W)."""
    batch, c, h, w = phases.shape[0], phases.shape[1] // 4, phases.shape[2] - 1, phases.shape[3] - 1
    phases = phases.contiguous(memory_format=torch.channels_last)
    shape = batch, c, 2 * h, 2 * w
    out = torch.empty(shape, dtype=phases.dtype, device=phases.device, memory_format=torch.channels_last)
    default = {"BLOCK": 4096, "num_warps": 4}
    tile = tiles.choose("interleave", f"R{2 * batch * h} S{2 * w * c} C{c} {phases.dtype}", phases.device, default)
    # Rows are the first axis of the grid: the others are limited to 65,535.
    launch(interleave, (2 * batch * h, triton.cdiv(2 * w * c, tile["BLOCK"])), phases, out, h, w, C=c, **tile)
    return out
