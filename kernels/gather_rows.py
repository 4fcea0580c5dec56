"""Gather rows of features by ids in device memory, from device memory or from page-locked host memory over PCIe.

The base address and row count are read from a descriptor in device memory, so a captured graph follows a database swap
after a copy of 16 bytes. An id outside the table, such as -1 for a missing neighbour, gives zeros.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ragturbo.kernels import pdl, tiles
from ragturbo.kernels.launch import launch
from ragturbo.kernels.portable import cast


@triton.jit
def gather_rows(
    descriptor_ptr, ids_ptr, out_ptr, N, row_bytes, C,
    INT8: tl.constexpr, VECTOR: tl.constexpr, SHARED: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (chunk of a row). Records are row_bytes apart: N = T·C values, and for int8 then T fp32 scales."""
    pdl.wait(PDL)
    chunks = tl.cdiv(N, BLOCK)
    i_row = (tl.program_id(0) // chunks).to(tl.int64)
    i = tl.load(ids_ptr + i_row)
    i_n = (tl.program_id(0) % chunks) * BLOCK + tl.arange(0, BLOCK)
    count = tl.load(descriptor_ptr + 1)
    # Read nothing for an id outside the table.
    inside = tl.where((i >= 0) & (i < count), N, 0)
    address = tl.load(descriptor_ptr) + i * row_bytes
    # The compiler cannot know the alignment of a loaded address. Records are aligned to at least 128 bytes.
    if INT8:
        # A token's scale is read once for every SHARED of its numbers, and not for each: over the host link a read of
        # 4 bytes costs as much as one of 32.
        p_row = tl.multiple_of(address.to(tl.pointer_type(tl.int8), bitcast=True), VECTOR)
        p_scale = tl.multiple_of((address + N).to(tl.pointer_type(tl.float32), bitcast=True), 4)
        i_first = (tl.program_id(0) % chunks) * BLOCK + tl.arange(0, BLOCK // SHARED) * SHARED
        scale = tl.load(p_scale + i_first // C, mask=i_first < inside, other=0.0)
        scale = tl.reshape(tl.broadcast_to(scale[:, None], [BLOCK // SHARED, SHARED]), [BLOCK])
        x = tl.load(p_row + i_n, mask=i_n < inside, other=0, eviction_policy="evict_first").to(tl.float32) * scale
    else:
        p_row = tl.multiple_of(address.to(tl.pointer_type(out_ptr.dtype.element_ty), bitcast=True), VECTOR)
        x = tl.load(p_row + i_n, mask=i_n < inside, other=0.0, eviction_policy="evict_first")
    tl.store(out_ptr + i_row * N + i_n, cast(x, out_ptr.dtype.element_ty), mask=i_n < N)


def forward(descriptor: Tensor, ids: Tensor, row_bytes: int, tokens: int, channels: int, int8: bool) -> Tensor:
    """descriptor: int64 [address, rows]; ids: (…,) int64 -> (…, tokens, channels) fp16."""
    out = torch.empty(*ids.shape, tokens, channels, dtype=torch.float16, device=ids.device)
    n = tokens * channels
    tile = tiles.choose("gather_rows", f"N{n} int8={int8}", ids.device, {"BLOCK": 4096, "num_warps": 4})
    tile = {**tile, "BLOCK": min(tile["BLOCK"], tiles.power_of_2(n))}
    grid = (triton.cdiv(n, tile["BLOCK"]) * ids.numel(),)
    vector = 16 if row_bytes % 16 == 0 else 2
    args = descriptor, ids.contiguous(), out, n, row_bytes, channels
    # The largest power of two up to 16 that divides the channels.
    shared = min(16, channels & -channels, tile["BLOCK"])
    launch(gather_rows, grid, *args, INT8=int8, VECTOR=vector, SHARED=shared, **tile)
    return out
