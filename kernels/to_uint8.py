"""Decoded images to bytes: (B, C, H, W) of any strides to (B, H, W, C) uint8, bit for bit as diffusers' processor.

diffusers computes x/2 + 1/2 and the clamp in the tensor's own type, then 255·y in fp32, rounded half to even.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ragturbo.kernels import pdl, tiles
from ragturbo.kernels.launch import launch
from ragturbo.kernels.portable import cast

# Adding and subtracting 1.5·2²³ rounds an fp32 below 2²² to the nearest integer, ties to even.
_ROUND = tl.constexpr(12582912.0)


@triton.jit
def to_uint8(
    x_ptr, out_ptr, C, H, W, stride_b, stride_c, stride_h, stride_w,
    SIGNED: tl.constexpr, FLAT: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (block of H·W·C output elements, image)."""
    i_b = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = i < H * W * C
    if FLAT:
        # channels_last: the order of the output, which allows 16-byte loads.
        o = i_b * H * W * C + i
    else:
        c, pixel = i % C, i // C
        o = i_b * stride_b + c * stride_c + (pixel // W).to(tl.int64) * stride_h + (pixel % W) * stride_w
    pdl.wait(PDL)
    x = tl.load(x_ptr + o, mask=m, other=0.0)
    y = x.to(tl.float32)
    if SIGNED:
        y = cast(y * 0.5 + 0.5, x.dtype).to(tl.float32)
    # NaN becomes black; the engine's finite check reports it.
    y = tl.where(y == y, tl.minimum(tl.maximum(y, 0.0), 1.0), 0.0)
    y = (y * 255.0 + _ROUND) - _ROUND
    tl.store(out_ptr + i_b * H * W * C + i, y.to(tl.uint8), mask=m)


def forward(images: Tensor, signed: bool) -> Tensor:
    """images: (B, C, H, W) in [-1, 1] if signed, else in [0, 1] -> contiguous (B, H, W, C) uint8."""
    batch, c, h, w = images.shape
    out = torch.empty(batch, h, w, c, dtype=torch.uint8, device=images.device)
    tile = tiles.choose("to_uint8", f"H{h} W{w} {images.dtype}", images.device, {"BLOCK": 1024, "num_warps": 4})
    grid = (triton.cdiv(c * h * w, tile["BLOCK"]), batch)
    args = images, out, c, h, w, *images.stride()
    # 255·y must be rounded before the sum: contraction to an FMA would break ties differently from diffusers.
    flat = images.is_contiguous(memory_format=torch.channels_last)
    launch(to_uint8, grid, *args, SIGNED=signed, FLAT=flat, **tile, fuse_multiply_add=False)
    return out
