"""GroupNorm on channels_last memory, with the additions before it and SiLU after it, for UNet and VAE ResNet blocks.

In channels_last memory a group is a few bytes of every row (pixel), so each program takes several whole groups and its
threads run along the channels. There are three forms:

* one launch, for maps of which a block of groups fits in a program's registers: read once, about 32 channels a program;
* two launches, for medium maps: partial statistics, then programs that merge them and apply, about 64 channels;
* three launches, for large maps, whose partial statistics are too many to be read by every program: about 128 channels.

A single read of a large map is not possible: 128 × 512² in fp16 are 67 MB, the registers of an H100 hold 34 MB. In all
kernels add_ptr, add_bias_ptr and sum_ptr may be None.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ragturbo.kernels import group_statistics as statistics
from ragturbo.kernels import pdl, tiles
from ragturbo.kernels.launch import launch
from ragturbo.kernels.portable import cast, divide, inverse_sqrt

# The largest tile, padded to powers of two: 8 warps hold 64 numbers per thread. Twice as many warps would spill.
ONE_LAUNCH = 16384
# Maps of at most this many rows take two launches.
TWO_LAUNCHES = 16384
# Programs of the statistics launch on an H100's 132 multiprocessors, all resident at once: two each for medium maps,
# which the latency of a program decides, and about eight for large maps.
FEW, MANY = 264, 1024
# The most partial statistics of a group that every program reads.
MERGED = 32


@triton.jit
def _affine(weight_ptr, bias_ptr, c, m_c):
    w = tl.load(weight_ptr + c, mask=m_c, other=0.0).to(tl.float32)
    return w, tl.load(bias_ptr + c, mask=m_c, other=0.0).to(tl.float32)


@triton.jit
def _activate(x, mean, scale, bias, SILU: tl.constexpr):
    """scale: weight / σ."""
    y = (x - mean[None, :]) * scale[None, :] + bias[None, :]
    if SILU:
        # `/` is the fast division, off by up to 2 ulp in fp32. exp2 folds the sign into the factor.
        y = y / (1 + tl.exp2(y * -1.4426950408889634))
    return y


@triton.jit
def group_norm(
    x_ptr, add_ptr, add_bias_ptr, weight_ptr, bias_ptr, sum_ptr, out_ptr, R, C, eps,
    WIDTH: tl.constexpr, PER_BLOCK: tl.constexpr, GROUPS: tl.constexpr, SILU: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (block of whole groups, image), with all R rows in registers."""
    c, m_c = statistics.channels(tl.program_id(0), C, PER_BLOCK, BC)
    i_r = tl.arange(0, BR)
    m = (i_r < R)[:, None] & m_c[None, :]
    o = i_r[:, None] * C + c[None, :]
    pdl.prefetch_vector(weight_ptr, tl.program_id(0) * PER_BLOCK, C, BC, PDL)
    pdl.prefetch_vector(bias_ptr, tl.program_id(0) * PER_BLOCK, C, BC, PDL)
    pdl.wait(PDL)
    base = tl.program_id(1).to(tl.int64) * R * C
    add_bias = add_bias_ptr
    if add_bias_ptr is not None:
        add_bias = tl.load(add_bias_ptr + c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    x = tl.where(m, statistics.load_sum(x_ptr, add_ptr, add_bias, sum_ptr, base, o, m, True), 0.0)
    w, b = _affine(weight_ptr, bias_ptr, c, m_c)
    share = divide(1.0, R * WIDTH)
    mean = statistics.of_channels(
        statistics.group_sums(tl.sum(x, axis=0), WIDTH, BC, GROUPS) * share, WIDTH, BC, GROUPS
    )
    d = tl.where(m, x - mean[None, :], 0.0)
    var = statistics.group_sums(tl.sum(d * d, axis=0), WIDTH, BC, GROUPS) * share
    scale = statistics.of_channels(inverse_sqrt(var + eps), WIDTH, BC, GROUPS) * w
    y = _activate(x, mean, scale, b, SILU)
    tl.store(out_ptr + base + o, cast(y, out_ptr.dtype.element_ty), mask=m)


@triton.jit
def group_norm_partial(
    x_ptr, add_ptr, add_bias_ptr, sum_ptr, part_ptr, R, C, rows_per_split,
    WIDTH: tl.constexpr, PER_BLOCK: tl.constexpr, GROUPS: tl.constexpr, EVEN: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (split of the rows, block of groups, image): groups' mean and M2 -> part[2, image, group, split]."""
    pdl.wait(PDL)
    c, m_c = statistics.channels(tl.program_id(1), C, PER_BLOCK, BC)
    i_b = tl.program_id(2).to(tl.int64)
    first = tl.program_id(0) * rows_per_split
    rows = tl.minimum(first + rows_per_split, R) - first
    base = i_b * R * C + tl.cast(first, tl.int64) * C
    add_bias = add_bias_ptr
    if add_bias_ptr is not None:
        add_bias = tl.load(add_bias_ptr + c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    n, mean, m2 = statistics.channel_moments(x_ptr, add_ptr, add_bias, sum_ptr, base, rows, C, c, m_c, BR, BC, EVEN)
    of_group = statistics.group_sums(mean, WIDTH, BC, GROUPS) * (1.0 / WIDTH)
    d = tl.where(m_c, mean - statistics.of_channels(of_group, WIDTH, BC, GROUPS), 0.0)
    g, m_g = statistics.groups(tl.program_id(1), C, WIDTH, PER_BLOCK, GROUPS)
    o = (i_b * (C // WIDTH) + g) * tl.num_programs(0) + tl.program_id(0)
    plane = tl.num_programs(2) * (C // WIDTH) * tl.num_programs(0)
    tl.store(part_ptr + o, of_group, mask=m_g)
    tl.store(part_ptr + plane + o, statistics.group_sums(m2 + n * d * d, WIDTH, BC, GROUPS), mask=m_g)


@triton.jit
def group_norm_merge(part_ptr, stats_ptr, splits, R, rows_per_split, width, eps, BS: tl.constexpr, PDL: tl.constexpr):
    """Program (image and group): its splits -> stats[2, image, group], mean and 1/σ."""
    pdl.wait(PDL)
    i = tl.program_id(0) + tl.arange(0, 1)
    groups = tl.num_programs(0)
    mean, rstd = statistics.merged(part_ptr, groups * splits, i, i < groups, splits, R, rows_per_split, width, eps, BS)
    tl.store(stats_ptr + i, mean)
    tl.store(stats_ptr + groups + i, rstd)


@triton.jit
def group_norm_apply(
    x_ptr, add_ptr, add_bias_ptr, weight_ptr, bias_ptr, stats_ptr, sum_ptr, out_ptr, R, C, splits, rows_per_split, eps,
    WIDTH: tl.constexpr, PER_BLOCK: tl.constexpr, GROUPS: tl.constexpr, SILU: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (tile of rows, block of groups, image). stats: group_norm_partial's, or group_norm_merge's if BS is 0."""
    # In the reverse order of the statistics launch, because L2 still holds the rows that it read last.
    i_r = tl.num_programs(0) - 1 - tl.program_id(0)
    i_c = tl.num_programs(1) - 1 - tl.program_id(1)
    i_b = (tl.num_programs(2) - 1 - tl.program_id(2)).to(tl.int64)
    c, m_c = statistics.channels(i_c, C, PER_BLOCK, BC)
    pdl.prefetch_vector(weight_ptr, i_c * PER_BLOCK, C, BC, PDL)
    pdl.prefetch_vector(bias_ptr, i_c * PER_BLOCK, C, BC, PDL)
    pdl.wait(PDL)
    r = i_r * BR + tl.arange(0, BR)
    m = (r < R)[:, None] & m_c[None, :]
    base = i_b * R * C
    o = r[:, None].to(tl.int64) * C + c[None, :]
    # Medium maps stay in L2, where a ResNet block's residual is read again.
    KEEP: tl.constexpr = BS > 0
    # The rows are requested before the statistics, whose merging takes longer than their loads.
    if sum_ptr is not None:
        # The statistics launch stored the sum: one tensor to read instead of two.
        x = statistics.load_sum(sum_ptr, None, None, None, base, o, m, True)
    else:
        add_bias = add_bias_ptr
        if add_bias_ptr is not None:
            add_bias = tl.load(add_bias_ptr + c, mask=m_c, other=0.0).to(tl.float32)[None, :]
        x = statistics.load_sum(x_ptr, add_ptr, add_bias, None, base, o, m, KEEP)
    groups = C // WIDTH
    if BS > 0:
        g, m_g = statistics.groups(i_c, C, WIDTH, PER_BLOCK, GROUPS)
        plane = tl.num_programs(2) * groups * splits
        mean, rstd = statistics.merged(
            stats_ptr, plane, i_b * groups + g, m_g, splits, R, rows_per_split, WIDTH, eps, BS
        )
        mean = statistics.of_channels(mean, WIDTH, BC, GROUPS)
        rstd = statistics.of_channels(rstd, WIDTH, BC, GROUPS)
    else:
        p_stats = stats_ptr + i_b * groups + c // WIDTH
        mean = tl.load(p_stats, mask=m_c, other=0.0)
        rstd = tl.load(p_stats + tl.num_programs(2) * groups, mask=m_c, other=0.0)
    w, b = _affine(weight_ptr, bias_ptr, c, m_c)
    y = _activate(x, mean, rstd * w, b, SILU)
    tl.store(out_ptr + base + o, cast(y, out_ptr.dtype.element_ty), mask=m)


def _per_block(width: int, lanes: int, c: int) -> int:
    """Channels per program: whole groups, about `lanes`; if possible a multiple of 8, for wide loads."""
    unit = math.lcm(width, 8)
    unit = unit if unit <= 128 else width
    return min(c, max(1, lanes // unit) * unit)


def forward(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    silu: bool,
    add: Tensor | None,
    add_bias: Tensor | None,
    keep_sum: bool,
) -> tuple[Tensor, Tensor | None]:
    """x, add: (B, C, H, W); weight, bias, add_bias: (C,) -> the result, channels_last, and the sum if keep_sum."""
    batch, c, h, w = x.shape
    r, width = h * w, c // groups
    x = x.contiguous(memory_format=torch.channels_last)
    add = None if add is None else add.contiguous(memory_format=torch.channels_last)
    add_bias = None if add_bias is None else add_bias.contiguous()
    affine = weight.contiguous(), bias.contiguous()
    out = torch.empty_like(x, memory_format=torch.channels_last)
    total = torch.empty_like(out) if keep_sum else None

    default = {"ONE_LAUNCH": ONE_LAUNCH, "TWO_LAUNCHES": TWO_LAUNCHES, "LANES": 0, "SPLITS": 0}
    tile = dict(tiles.choose("group_norm", f"R{r} C{c} G{groups} {x.dtype}", x.device, default))
    one_launch, two = tile.pop("ONE_LAUNCH"), r <= tile.pop("TWO_LAUNCHES")
    lanes, splits, br = tile.pop("LANES"), tile.pop("SPLITS"), tile.pop("BR", 0)
    per_block = _per_block(width, lanes or 32, c)
    bc, rows = tiles.power_of_2(per_block), tiles.power_of_2(r)
    if rows * bc <= one_launch:
        block = {"WIDTH": width, "PER_BLOCK": per_block, "GROUPS": tiles.power_of_2(per_block // width), "BC": bc}
        options = {"BR": rows, "num_warps": 8 if rows * bc > 8192 else 4, **tile}
        grid = triton.cdiv(c, per_block), batch
        launch(group_norm, grid, x, add, add_bias, *affine, total, out, r, c, eps, SILU=silu, **block, **options)
        return out, total

    per_block = _per_block(width, lanes or (64 if two else 128), c)
    bc, blocks = tiles.power_of_2(per_block), triton.cdiv(c, per_block)
    br = min(br or max(4, 4096 // bc), tiles.power_of_2(r, 4))
    apply = {"WIDTH": width, "PER_BLOCK": per_block, "GROUPS": tiles.power_of_2(per_block // width), "BR": br, "BC": bc}
    apply = {**apply, "num_warps": 8 if bc > 256 else 4, **tile}
    # A split is a whole number of tiles, and there are at most `splits` of them.
    splits = splits or max(1, min(MERGED, FEW // (blocks * batch)) if two else MANY // (blocks * batch))
    rows = triton.cdiv(triton.cdiv(r, br), splits) * br
    splits = triton.cdiv(r, rows)
    stats = torch.empty(2, batch, groups, splits, dtype=torch.float32, device=x.device)
    even = bc == per_block and c % bc == 0 and r % br == 0
    launch(
        group_norm_partial, (splits, blocks, batch), x, add, add_bias, total, stats, r, c, rows, EVEN=even, **apply
    )  # fmt: skip
    merged = tiles.power_of_2(splits)
    if not two:
        parts, stats = stats, torch.empty(2, batch, groups, dtype=torch.float32, device=x.device)
        launch(group_norm_merge, (batch * groups,), parts, stats, splits, r, rows, width, eps, BS=merged, num_warps=4)
    launch(
        group_norm_apply, (triton.cdiv(r, br), blocks, batch), x, add, add_bias, *affine, stats, total, out,
        r, c, splits, rows, eps, SILU=silu, BS=merged if two else 0, **apply,
    )  # fmt: skip
    return out, total
