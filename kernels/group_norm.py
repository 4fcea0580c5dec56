"""GroupNorm on channels_last memory, with the additions before it and SiLU after it, for UNet and VAE ResNet blocks.

In channels_last memory a group is a few bytes of every row (pixel), so each program takes several whole groups and its
threads run along the channels. Up to ONE_LAUNCH rows: one launch, about 32 channels per program so that more
multiprocessors have work. More rows: three launches (partial statistics, merge, apply), about 128 channels per program.

In all kernels add_ptr, add_bias_ptr and sum_ptr may be None.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ragturbo.kernels import pdl, tiles
from ragturbo.kernels.launch import launch
from ragturbo.kernels.portable import cast, divide, inverse_sqrt

# Maps of at most this many rows are normalised in one launch.
ONE_LAUNCH = 512
# Programs of the statistics launch: about eight on each of an H100's 132 multiprocessors, all resident at once.
PROGRAMS = 1024


@triton.jit
def _channels(i_c, C, PER_BLOCK: tl.constexpr, BC: tl.constexpr):
    """The PER_BLOCK channels of block i_c, padded to BC, and their mask."""
    lane = tl.arange(0, BC)
    c = i_c * PER_BLOCK + lane
    return c, (lane < PER_BLOCK) & (c < C)


@triton.jit
def _load_sum(x_ptr, add_ptr, add_bias, sum_ptr, base, o, m):
    """x + add + add_bias[c] at base + o, rounded to the storage type, in fp32. Stores the sum if sum_ptr is given."""
    x = tl.load(x_ptr + base + o, mask=m, other=0.0)
    if add_ptr is not None or add_bias is not None:
        s = x.to(tl.float32)
        if add_bias is not None:
            s += add_bias
        if add_ptr is not None:
            s += tl.load(add_ptr + base + o, mask=m, other=0.0).to(tl.float32)
        x = cast(s, x.dtype)
        if sum_ptr is not None:
            tl.store(sum_ptr + base + o, x, mask=m)
    return x.to(tl.float32)


@triton.jit
def _load_rows(x_ptr, add_ptr, add_bias, sum_ptr, base, o, i_r, left, m_c, EVEN: tl.constexpr):
    """_load_sum of the rows i_r < left, 0 elsewhere, and the mask."""
    m = EVEN | ((i_r < left)[:, None] & m_c[None, :])
    return tl.where(m, _load_sum(x_ptr, add_ptr, add_bias, sum_ptr, base, o, m), 0.0), m


@triton.jit
def _merge(n_a, mean_a, m2_a, n_b, mean_b, m2_b):
    """Count, mean and M2 (sum of squared deviations) of two sets together, by Chan's rule: E[x²] - E[x]² cancels."""
    n = n_a + n_b
    share = divide(n_b, tl.maximum(n, 1.0))
    d = mean_b - mean_a
    return n, mean_a + d * share, m2_a + m2_b + d * d * n_a * share


@triton.jit
def _channel_moments(
    x_ptr, add_ptr, add_bias, sum_ptr, base, rows, C, c, m_c, BR: tl.constexpr, BC: tl.constexpr, EVEN: tl.constexpr
):  # fmt: skip
    """Count, mean and M2 of each of BC channels over `rows` rows from offset `base` -> scalar, [BC], [BC].

    Every thread merges its own elements, four rows at a time, into its own statistics: threads exchange nothing inside
    the loop, which is bound by memory. EVEN: every tile of BR × BC is full.
    """
    STEP: tl.constexpr = BR // 4
    i_r = tl.arange(0, STEP)
    o = i_r[:, None] * C + c[None, :]
    n = tl.zeros([STEP, 1], dtype=tl.float32)
    mean = tl.zeros([STEP, BC], dtype=tl.float32)
    m2 = tl.zeros([STEP, BC], dtype=tl.float32)
    for r0 in tl.range(0, rows, BR, num_stages=3):
        left = rows - r0
        at = base + tl.cast(r0, tl.int64) * C
        x_0, m_0 = _load_rows(x_ptr, add_ptr, add_bias, sum_ptr, at, o, i_r, left, m_c, EVEN)
        at += STEP * C
        x_1, m_1 = _load_rows(x_ptr, add_ptr, add_bias, sum_ptr, at, o, i_r, left - STEP, m_c, EVEN)
        at += STEP * C
        x_2, m_2 = _load_rows(x_ptr, add_ptr, add_bias, sum_ptr, at, o, i_r, left - 2 * STEP, m_c, EVEN)
        at += STEP * C
        x_3, m_3 = _load_rows(x_ptr, add_ptr, add_bias, sum_ptr, at, o, i_r, left - 3 * STEP, m_c, EVEN)
        b_mean = (x_0 + x_1) + (x_2 + x_3)
        if EVEN:
            count = tl.full([STEP, 1], 4.0, dtype=tl.float32)
            b_mean *= 0.25
        else:
            count = tl.clamp(tl.cdiv(left - i_r, STEP).to(tl.float32), 0.0, 4.0)[:, None]
            b_mean *= divide(1.0, tl.maximum(count, 1.0))
        d_0, d_1 = tl.where(m_0, x_0 - b_mean, 0.0), tl.where(m_1, x_1 - b_mean, 0.0)
        d_2, d_3 = tl.where(m_2, x_2 - b_mean, 0.0), tl.where(m_3, x_3 - b_mean, 0.0)
        n, mean, m2 = _merge(n, mean, m2, count, b_mean, d_0 * d_0 + d_1 * d_1 + d_2 * d_2 + d_3 * d_3)
    count_all = tl.cast(rows, tl.float32)
    mean_all = tl.sum(mean * n, axis=0) * divide(1.0, count_all)
    d = mean - mean_all[None, :]
    return count_all, mean_all, tl.sum(m2 + n * d * d, axis=0)


@triton.jit
def _group_moments(n, mean, m2, WIDTH: tl.constexpr, BC: tl.constexpr, GROUPS: tl.constexpr):
    """Mean and M2 of each channel's group, in the channel's lane: [BC], [BC]. A group is WIDTH channels."""
    if BC % WIDTH == 0:
        COUNT: tl.constexpr = BC // WIDTH
        split = tl.reshape(mean, [COUNT, WIDTH])
        of_group = tl.sum(split, axis=1) * (1.0 / WIDTH)
        d = split - of_group[:, None]
        m2_of_group = tl.sum(tl.reshape(m2, [COUNT, WIDTH]) + n * d * d, axis=1)
        g_mean = tl.reshape(tl.broadcast_to(of_group[:, None], [COUNT, WIDTH]), [BC])
        g_m2 = tl.reshape(tl.broadcast_to(m2_of_group[:, None], [COUNT, WIDTH]), [BC])
    else:
        # Groups have 10, 20, 40 or 80 channels: a reshape to powers of two cannot separate them.
        own = tl.arange(0, GROUPS)[:, None] == (tl.arange(0, BC) // WIDTH)[None, :]  # [GROUPS, BC]
        of_group = tl.sum(tl.where(own, mean[None, :], 0.0), axis=1) * (1.0 / WIDTH)
        g_mean = tl.sum(tl.where(own, of_group[:, None], 0.0), axis=0)
        d = mean - g_mean
        m2_of_group = tl.sum(tl.where(own, (m2 + n * d * d)[None, :], 0.0), axis=1)
        g_m2 = tl.sum(tl.where(own, m2_of_group[:, None], 0.0), axis=0)
    return g_mean, g_m2


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
    WIDTH: tl.constexpr, PER_BLOCK: tl.constexpr, GROUPS: tl.constexpr, EVEN: tl.constexpr, SILU: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (block of whole groups, image): statistics of all R rows, then the application."""
    c, m_c = _channels(tl.program_id(0), C, PER_BLOCK, BC)
    pdl.prefetch_vector(weight_ptr, tl.program_id(0) * PER_BLOCK, C, BC, PDL)
    pdl.prefetch_vector(bias_ptr, tl.program_id(0) * PER_BLOCK, C, BC, PDL)
    pdl.wait(PDL)
    base = tl.program_id(1).to(tl.int64) * R * C
    add_bias = add_bias_ptr
    if add_bias_ptr is not None:
        add_bias = tl.load(add_bias_ptr + c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    n, mean, m2 = _channel_moments(x_ptr, add_ptr, add_bias, sum_ptr, base, R, C, c, m_c, BR, BC, EVEN)
    w, b = _affine(weight_ptr, bias_ptr, c, m_c)
    mean, m2 = _group_moments(n, mean, m2, WIDTH, BC, GROUPS)
    scale = inverse_sqrt(divide(m2, n * WIDTH) + eps) * w
    for r0 in range(0, R, BR):
        i_r = r0 + tl.arange(0, BR)
        m = (i_r < R)[:, None] & m_c[None, :]
        o = i_r[:, None].to(tl.int64) * C + c[None, :]
        # Computing the sum again is cheaper than waiting for its store, and gives the same bits.
        y = _activate(_load_sum(x_ptr, add_ptr, add_bias, None, base, o, m), mean, scale, b, SILU)
        tl.store(out_ptr + base + o, cast(y, out_ptr.dtype.element_ty), mask=m)


@triton.jit
def group_norm_partial(
    x_ptr, add_ptr, add_bias_ptr, sum_ptr, part_ptr, R, C, rows_per_split,
    WIDTH: tl.constexpr, PER_BLOCK: tl.constexpr, GROUPS: tl.constexpr, EVEN: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (split of the rows, block of groups, image): groups' mean and M2 -> part[image, group, split, 2]."""
    pdl.wait(PDL)
    c, m_c = _channels(tl.program_id(1), C, PER_BLOCK, BC)
    i_b = tl.program_id(2).to(tl.int64)
    first = tl.program_id(0) * rows_per_split
    rows = tl.minimum(first + rows_per_split, R) - first
    base = i_b * R * C + tl.cast(first, tl.int64) * C
    add_bias = add_bias_ptr
    if add_bias_ptr is not None:
        add_bias = tl.load(add_bias_ptr + c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    n, mean, m2 = _channel_moments(x_ptr, add_ptr, add_bias, sum_ptr, base, rows, C, c, m_c, BR, BC, EVEN)
    mean, m2 = _group_moments(n, mean, m2, WIDTH, BC, GROUPS)
    o = ((i_b * (C // WIDTH) + c // WIDTH) * tl.num_programs(0) + tl.program_id(0)) * 2
    m_first = m_c & (c % WIDTH == 0)
    tl.store(part_ptr + o, mean, mask=m_first)
    tl.store(part_ptr + o + 1, m2, mask=m_first)


@triton.jit
def group_norm_merge(part_ptr, stats_ptr, splits, R, rows_per_split, width, eps, BS: tl.constexpr, PDL: tl.constexpr):
    """Program (image and group): its splits -> stats[image, group, 2], mean and 1/σ."""
    pdl.wait(PDL)
    i = tl.program_id(0).to(tl.int64)
    i_s = tl.arange(0, BS)
    m = i_s < splits
    rows = tl.where(m, tl.minimum(R - i_s * rows_per_split, rows_per_split), 0)
    n = (rows * width).to(tl.float32)
    mean = tl.load(part_ptr + (i * splits + i_s) * 2, mask=m, other=0.0)
    m2 = tl.load(part_ptr + (i * splits + i_s) * 2 + 1, mask=m, other=0.0)
    count = tl.sum(n)
    mean_all = divide(tl.sum(mean * n), count)
    d = tl.where(m, mean - mean_all, 0.0)
    var = divide(tl.sum(m2 + n * d * d), count)
    tl.store(stats_ptr + i * 2, mean_all)
    tl.store(stats_ptr + i * 2 + 1, inverse_sqrt(var + eps))


@triton.jit
def group_norm_apply(
    x_ptr, add_ptr, add_bias_ptr, weight_ptr, bias_ptr, stats_ptr, sum_ptr, out_ptr, R, C,
    WIDTH: tl.constexpr, PER_BLOCK: tl.constexpr, SILU: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Program (tile of rows, block of groups, image)."""
    # In the reverse order of the statistics launch, because L2 still holds the rows that it read last.
    i_r = tl.num_programs(0) - 1 - tl.program_id(0)
    i_c = tl.num_programs(1) - 1 - tl.program_id(1)
    i_b = (tl.num_programs(2) - 1 - tl.program_id(2)).to(tl.int64)
    c, m_c = _channels(i_c, C, PER_BLOCK, BC)
    pdl.prefetch_vector(weight_ptr, i_c * PER_BLOCK, C, BC, PDL)
    pdl.prefetch_vector(bias_ptr, i_c * PER_BLOCK, C, BC, PDL)
    pdl.wait(PDL)
    w, b = _affine(weight_ptr, bias_ptr, c, m_c)
    p_stats = stats_ptr + (i_b * (C // WIDTH) + c // WIDTH) * 2
    mean = tl.load(p_stats, mask=m_c, other=0.0)
    scale = tl.load(p_stats + 1, mask=m_c, other=0.0) * w
    r = i_r * BR + tl.arange(0, BR)
    m = (r < R)[:, None] & m_c[None, :]
    base = i_b * R * C
    o = r[:, None].to(tl.int64) * C + c[None, :]
    if sum_ptr is not None:
        # The statistics launch stored the sum: one tensor to read instead of two.
        x = tl.load(sum_ptr + base + o, mask=m, other=0.0).to(tl.float32)
    else:
        add_bias = add_bias_ptr
        if add_bias_ptr is not None:
            add_bias = tl.load(add_bias_ptr + c, mask=m_c, other=0.0).to(tl.float32)[None, :]
        x = _load_sum(x_ptr, add_ptr, add_bias, None, base, o, m)
    y = _activate(x, mean, scale, b, SILU)
    tl.store(out_ptr + base + o, cast(y, out_ptr.dtype.element_ty), mask=m)


def _per_block(width: int, lanes: int) -> int:
    """Channels per program: whole groups, about `lanes`; if possible a multiple of 8, for wide loads."""
    unit = math.lcm(width, 8)
    unit = unit if unit <= 128 else width
    return max(1, lanes // unit) * unit


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

    default = {"LANES": 32 if r <= ONE_LAUNCH else 128, "ONE_LAUNCH": ONE_LAUNCH, "SPLITS": 0}
    tile = dict(tiles.choose("group_norm", f"R{r} C{c} G{groups} {x.dtype}", x.device, default))
    splits, one_launch, per_block = tile.pop("SPLITS"), tile.pop("ONE_LAUNCH"), _per_block(width, tile.pop("LANES"))
    bc = tiles.power_of_2(min(per_block, tiles.power_of_2(c)))
    br = min(tile.pop("BR", max(4, 4096 // bc)), tiles.power_of_2(r, 4))
    apply = {"WIDTH": width, "PER_BLOCK": per_block, "BR": br, "BC": bc, "num_warps": 8 if bc > 256 else 4, **tile}
    statistics = {**apply, "GROUPS": tiles.power_of_2(per_block // width)}
    statistics["EVEN"] = bc == per_block and c % bc == 0 and r % br == 0
    blocks = triton.cdiv(c, per_block)
    if r <= one_launch:
        launch(group_norm, (blocks, batch), x, add, add_bias, *affine, total, out, r, c, eps, SILU=silu, **statistics)
        return out, total
    # A split is a whole number of tiles, and there are at most SPLITS of them.
    splits = splits or max(1, PROGRAMS // (blocks * batch))
    rows = triton.cdiv(triton.cdiv(r, br), splits) * br
    splits = triton.cdiv(r, rows)
    parts = torch.empty(batch, groups, splits, 2, dtype=torch.float32, device=x.device)
    stats = torch.empty(batch, groups, 2, dtype=torch.float32, device=x.device)
    launch(group_norm_partial, (splits, blocks, batch), x, add, add_bias, total, parts, r, c, rows, **statistics)
    merge = {"BS": tiles.power_of_2(splits), "num_warps": 4}
    launch(group_norm_merge, (batch * groups,), parts, stats, splits, r, rows, width, eps, **merge)
    grid = (triton.cdiv(r, br), blocks, batch)
    launch(group_norm_apply, grid, x, add, add_bias, *affine, stats, total, out, r, c, SILU=silu, **apply)
    return out, total
