"""GroupNorm, SiLU and the additions around them on channels_last memory, for the UNet's and the VAE's ResNet blocks.

In channels_last memory a group is a few bytes of every row, so a program takes whole groups side by side and lets its
threads run along the channels. Small maps: one program a set of groups, one launch; about 32 channels each, so that
there are programs for more multiprocessors. Large ones: partial statistics, their merge, and the application, in three;
about 128 channels each.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ragturbo.kernels import tiles
from ragturbo.kernels.launch import launch
from ragturbo.kernels.moments import merge
from ragturbo.kernels.portable import cast, divide, inverse_sqrt

# A map of this many rows or fewer is normalised in one launch.
ONE_LAUNCH = 512
# Programs that take statistics together: about eight for each of an H100's 132 multiprocessors, all at once.
PROGRAMS = 1024


@triton.jit
def _tile(x_ptr, add_ptr, add_bias, sum_ptr, o, m, ADD: tl.constexpr, ADD_BIAS: tl.constexpr, KEEP_SUM: tl.constexpr):
    """x + add + add_bias[c] in fp32, rounded to the storage type as the stored sum is."""
    x = tl.load(x_ptr + o, mask=m, other=0.0)
    if ADD or ADD_BIAS:
        s = x.to(tl.float32)
        if ADD_BIAS:
            s += add_bias
        if ADD:
            s += tl.load(add_ptr + o, mask=m, other=0.0).to(tl.float32)
        x = cast(s, x.dtype)
        if KEEP_SUM:
            tl.store(sum_ptr + o, x, mask=m)
    return x.to(tl.float32)


@triton.jit
def _rows(
    x_ptr, add_ptr, add_bias, sum_ptr, at, o, i_r, left, m_c,
    ADD: tl.constexpr, ADD_BIAS: tl.constexpr, KEEP_SUM: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """_tile at the offset `at`, and its mask: of `left` rows and the channels m_c, or all where EVEN."""
    m = EVEN | ((i_r < left)[:, None] & m_c[None, :])
    x = _tile(x_ptr + at, add_ptr + at, add_bias, sum_ptr + at, o, m, ADD, ADD_BIAS, KEEP_SUM)
    return tl.where(m, x, 0.0), m


@triton.jit
def _channel_moments(
    x_ptr, add_ptr, add_bias_ptr, sum_ptr, first, first_row, last_row, C, c, m_c,
    ADD: tl.constexpr, ADD_BIAS: tl.constexpr, KEEP_SUM: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """Count, mean and M2 of each of BC channels over rows first_row … last_row - 1 -> scalar, [BC], [BC].

    Every thread merges what it loads itself, four rows at a time, into statistics of its own: in the loop threads
    exchange nothing, and it waits for memory alone. EVEN: every tile of BR × BC is full.
    """
    STEP: tl.constexpr = BR // 4
    add_bias = c[None, :].to(tl.float32)
    if ADD_BIAS:
        add_bias = tl.load(add_bias_ptr + c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    i_r = tl.arange(0, STEP)
    o = i_r[:, None] * C + c[None, :]
    first += tl.cast(first_row, tl.int64) * C
    rows = tl.cast(last_row - first_row, tl.int32)
    n = tl.zeros([STEP, 1], dtype=tl.float32)
    mean = tl.zeros([STEP, BC], dtype=tl.float32)
    m2 = tl.zeros([STEP, BC], dtype=tl.float32)
    # Two tiles are on their way while a third is added up.
    for r0 in tl.range(0, rows, BR, num_stages=3):
        left = rows - r0
        at = first + tl.cast(r0, tl.int64) * C
        x_0, m_0 = _rows(x_ptr, add_ptr, add_bias, sum_ptr, at, o, i_r, left, m_c, ADD, ADD_BIAS, KEEP_SUM, EVEN)
        at += STEP * C
        x_1, m_1 = _rows(x_ptr, add_ptr, add_bias, sum_ptr, at, o, i_r, left - STEP, m_c, ADD, ADD_BIAS, KEEP_SUM, EVEN)
        at += STEP * C
        x_2, m_2 = _rows(
            x_ptr, add_ptr, add_bias, sum_ptr, at, o, i_r, left - 2 * STEP, m_c, ADD, ADD_BIAS, KEEP_SUM, EVEN
        )
        at += STEP * C
        x_3, m_3 = _rows(
            x_ptr, add_ptr, add_bias, sum_ptr, at, o, i_r, left - 3 * STEP, m_c, ADD, ADD_BIAS, KEEP_SUM, EVEN
        )
        b_mean = (x_0 + x_1) + (x_2 + x_3)
        if EVEN:
            count = tl.full([STEP, 1], 4.0, dtype=tl.float32)
            b_mean *= 0.25
        else:
            count = tl.clamp(tl.cdiv(left - i_r, STEP).to(tl.float32), 0.0, 4.0)[:, None]
            b_mean *= divide(1.0, tl.maximum(count, 1.0))
        d_0, d_1 = tl.where(m_0, x_0 - b_mean, 0.0), tl.where(m_1, x_1 - b_mean, 0.0)
        d_2, d_3 = tl.where(m_2, x_2 - b_mean, 0.0), tl.where(m_3, x_3 - b_mean, 0.0)
        n, mean, m2 = merge(n, mean, m2, count, b_mean, d_0 * d_0 + d_1 * d_1 + d_2 * d_2 + d_3 * d_3)
    of_all = tl.cast(rows, tl.float32)
    whole = tl.sum(mean * n, axis=0) * divide(1.0, of_all)
    d = mean - whole[None, :]
    return of_all, whole, tl.sum(m2 + n * d * d, axis=0)


@triton.jit
def _group_moments(n, mean, m2, WIDTH: tl.constexpr, BC: tl.constexpr, GROUPS: tl.constexpr):
    """From channels to their groups: each channel's lane gets its group's mean and M2. Groups are WIDTH channels."""
    if BC % WIDTH == 0:
        COUNT: tl.constexpr = BC // WIDTH
        split = tl.reshape(mean, [COUNT, WIDTH])
        of_group = tl.sum(split, axis=1) * (1.0 / WIDTH)
        d = split - of_group[:, None]
        m2_of_group = tl.sum(tl.reshape(m2, [COUNT, WIDTH]) + n * d * d, axis=1)
        g_mean = tl.reshape(tl.broadcast_to(of_group[:, None], [COUNT, WIDTH]), [BC])
        g_m2 = tl.reshape(tl.broadcast_to(m2_of_group[:, None], [COUNT, WIDTH]), [BC])
    else:
        # 10, 20, 40 or 80 channels a group: no shape of powers of two holds them.
        own = tl.arange(0, GROUPS)[:, None] == (tl.arange(0, BC) // WIDTH)[None, :]
        of_group = tl.sum(tl.where(own, mean[None, :], 0.0), axis=1) * (1.0 / WIDTH)
        g_mean = tl.sum(tl.where(own, of_group[:, None], 0.0), axis=0)
        d = mean - g_mean
        m2_of_group = tl.sum(tl.where(own, (m2 + n * d * d)[None, :], 0.0), axis=1)
        g_m2 = tl.sum(tl.where(own, m2_of_group[:, None], 0.0), axis=0)
    return g_mean, g_m2


@triton.jit
def _affine(weight_ptr, bias_ptr, c, m_c):
    """weight and bias of the channels c, to be asked for before what else is waited for."""
    w = tl.load(weight_ptr + c, mask=m_c, other=0.0).to(tl.float32)
    return w, tl.load(bias_ptr + c, mask=m_c, other=0.0).to(tl.float32)


@triton.jit
def _activate(x, mean, scale, bias, SILU: tl.constexpr):
    """scale: the weight over σ."""
    y = (x - mean[None, :]) * scale[None, :] + bias[None, :]
    if SILU:
        # The fast division: 2 ulp of an fp32, in a pass over every element. Base 2 folds the sign into the factor.
        y = y / (1 + tl.exp2(y * -1.4426950408889634))
    return y


@triton.jit
def group_norm(
    x_ptr, add_ptr, add_bias_ptr, weight_ptr, bias_ptr, sum_ptr, out_ptr, R, C, eps,
    WIDTH: tl.constexpr, PER_BLOCK: tl.constexpr,
    ADD: tl.constexpr, ADD_BIAS: tl.constexpr, KEEP_SUM: tl.constexpr, SILU: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr, GROUPS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """One program: PER_BLOCK channels, whole groups, of one image of R rows."""
    lane = tl.arange(0, BC)
    c = tl.program_id(0) * PER_BLOCK + lane
    m_c = (lane < PER_BLOCK) & (c < C)
    first = tl.program_id(1).to(tl.int64) * R * C
    n, mean, m2 = _channel_moments(
        x_ptr, add_ptr, add_bias_ptr, sum_ptr, first, 0, R, C, c, m_c,
        ADD, ADD_BIAS, KEEP_SUM, BR, BC, EVEN,
    )  # fmt: skip
    w, b = _affine(weight_ptr, bias_ptr, c, m_c)
    mean, m2 = _group_moments(n, mean, m2, WIDTH, BC, GROUPS)
    scale = inverse_sqrt(divide(m2, n * WIDTH) + eps) * w
    add_bias = c[None, :].to(tl.float32)
    if ADD_BIAS:
        add_bias = tl.load(add_bias_ptr + c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    for r0 in range(0, R, BR):
        r = r0 + tl.arange(0, BR)
        m = (r < R)[:, None] & m_c[None, :]
        o = first + r[:, None].to(tl.int64) * C + c[None, :]
        # The sum was rounded once and is made again: cheaper than waiting for its store, and the same bits.
        x = _tile(x_ptr, add_ptr, add_bias, sum_ptr, o, m, ADD, ADD_BIAS, False)
        y = _activate(x, mean, scale, b, SILU)
        tl.store(out_ptr + o, cast(y, out_ptr.dtype.element_ty), mask=m)


@triton.jit
def group_norm_partial(
    x_ptr, add_ptr, add_bias_ptr, sum_ptr, part_ptr, R, C, rows_per_split, WIDTH: tl.constexpr, PER_BLOCK: tl.constexpr,
    ADD: tl.constexpr, ADD_BIAS: tl.constexpr, KEEP_SUM: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
    GROUPS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Mean and M2 of each group over one split of the rows -> part[b, group, split, 2]."""
    lane = tl.arange(0, BC)
    c = tl.program_id(1) * PER_BLOCK + lane
    m_c = (lane < PER_BLOCK) & (c < C)
    i_b = tl.program_id(2).to(tl.int64)
    first_row = tl.program_id(0) * rows_per_split
    last_row = tl.minimum(first_row + rows_per_split, R)
    n, mean, m2 = _channel_moments(
        x_ptr, add_ptr, add_bias_ptr, sum_ptr, i_b * R * C, first_row, last_row, C, c, m_c,
        ADD, ADD_BIAS, KEEP_SUM, BR, BC, EVEN,
    )  # fmt: skip
    mean, m2 = _group_moments(n, mean, m2, WIDTH, BC, GROUPS)
    o = ((i_b * (C // WIDTH) + c // WIDTH) * tl.num_programs(0) + tl.program_id(0)) * 2
    one_a_group = m_c & (c % WIDTH == 0)
    tl.store(part_ptr + o, mean, mask=one_a_group)
    tl.store(part_ptr + o + 1, m2, mask=one_a_group)


@triton.jit
def group_norm_merge(part_ptr, stats_ptr, splits, R, rows_per_split, width, eps, BS: tl.constexpr):
    """The splits of one group together -> stats[b, group, 2], mean and 1/σ."""
    i = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, BS)
    m = s < splits
    rows = tl.where(m, tl.minimum(R - s * rows_per_split, rows_per_split), 0)
    n = (rows * width).to(tl.float32)
    mean = tl.load(part_ptr + (i * splits + s) * 2, mask=m, other=0.0)
    m2 = tl.load(part_ptr + (i * splits + s) * 2 + 1, mask=m, other=0.0)
    count = tl.sum(n)
    whole = divide(tl.sum(mean * n), count)
    d = tl.where(m, mean - whole, 0.0)
    var = divide(tl.sum(m2 + n * d * d), count)
    tl.store(stats_ptr + i * 2, whole)
    tl.store(stats_ptr + i * 2 + 1, inverse_sqrt(var + eps))


@triton.jit
def group_norm_apply(
    x_ptr, add_ptr, add_bias_ptr, weight_ptr, bias_ptr, stats_ptr, sum_ptr, out_ptr, R, C,
    WIDTH: tl.constexpr, PER_BLOCK: tl.constexpr,
    ADD: tl.constexpr, ADD_BIAS: tl.constexpr, KEEP_SUM: tl.constexpr, SILU: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    # In the reverse of the statistics' order: what they read last is what L2 still holds.
    i_r = tl.num_programs(0) - 1 - tl.program_id(0)
    i_c = tl.num_programs(1) - 1 - tl.program_id(1)
    i_b = (tl.num_programs(2) - 1 - tl.program_id(2)).to(tl.int64)
    lane = tl.arange(0, BC)
    c = i_c * PER_BLOCK + lane
    m_c = (lane < PER_BLOCK) & (c < C)
    w, b = _affine(weight_ptr, bias_ptr, c, m_c)
    p_stats = stats_ptr + (i_b * (C // WIDTH) + c // WIDTH) * 2
    mean = tl.load(p_stats, mask=m_c, other=0.0)
    scale = tl.load(p_stats + 1, mask=m_c, other=0.0) * w
    r = i_r * BR + tl.arange(0, BR)
    m = (r < R)[:, None] & m_c[None, :]
    o = i_b * R * C + r[:, None].to(tl.int64) * C + c[None, :]
    if KEEP_SUM:
        # The first launch stored it: one tensor to read in place of two.
        x = tl.load(sum_ptr + o, mask=m, other=0.0).to(tl.float32)
    else:
        add_bias = c[None, :].to(tl.float32)
        if ADD_BIAS:
            add_bias = tl.load(add_bias_ptr + c, mask=m_c, other=0.0).to(tl.float32)[None, :]
        x = _tile(x_ptr, add_ptr, add_bias, sum_ptr, o, m, ADD, ADD_BIAS, False)
    y = _activate(x, mean, scale, b, SILU)
    tl.store(out_ptr + o, cast(y, out_ptr.dtype.element_ty), mask=m)


def _per_block(width: int, lanes: int) -> int:
    """Channels of one program: whole groups, about `lanes`, and where it can be a multiple of 8 for wide loads."""
    unit = math.lcm(width, 8)
    unit = unit if unit <= 128 else width
    return max(1, lanes // unit) * unit


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


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
) -> tuple[Tensor, Tensor]:
    """x, add: (B, C, H, W); weight, bias, add_bias: (C,) -> channels_last result, and x + add + add_bias if kept."""
    batch, c, h, w = x.shape
    r, width = h * w, c // groups
    x = _channels_last(x)
    add = None if add is None else _channels_last(add)
    out = torch.empty_like(x, memory_format=torch.channels_last)
    total = torch.empty_like(out) if keep_sum else out
    default = {"LANES": 32 if r <= ONE_LAUNCH else 128, "ONE_LAUNCH": ONE_LAUNCH}
    tile = dict(tiles.choose("group_norm", f"R{r} C{c} G{groups} {x.dtype}", x.device, default))
    splits, one_launch = tile.pop("SPLITS", 0), tile.pop("ONE_LAUNCH")
    per_block = _per_block(width, tile.pop("LANES"))
    bc = tiles.power_of_2(min(per_block, tiles.power_of_2(c)))
    tile = {"BR": max(4, 4096 // bc), "num_warps": 8 if bc > 256 else 4, **tile}
    optional = [x if t is None else t.contiguous() for t in (add_bias, weight, bias)]
    inputs = x, x if add is None else add, optional[0]
    channels = {"WIDTH": width, "PER_BLOCK": per_block}
    counted = {**channels, "GROUPS": tiles.power_of_2(per_block // width)}
    adds = {"ADD": add is not None, "ADD_BIAS": add_bias is not None, "KEEP_SUM": keep_sum}
    tile["BR"] = min(tile["BR"], tiles.power_of_2(r, 4))
    tile["BC"] = bc
    blocks = triton.cdiv(c, per_block)
    counted["EVEN"] = bc == per_block and c % bc == 0 and r % tile["BR"] == 0
    if r <= one_launch:
        launch(
            group_norm, (blocks, batch), *inputs, *optional[1:], total, out, r, c, eps,
            **counted, **adds, SILU=silu, **tile,
        )  # fmt: skip
        return out, total
    # A split is a whole number of tiles, and there are never more than SPLITS of them.
    splits = splits or max(1, PROGRAMS // (blocks * batch))
    rows = triton.cdiv(triton.cdiv(r, tile["BR"]), splits) * tile["BR"]
    splits = triton.cdiv(r, rows)
    parts = torch.empty(batch, groups, splits, 2, dtype=torch.float32, device=x.device)
    stats = torch.empty(batch, groups, 2, dtype=torch.float32, device=x.device)
    launch(group_norm_partial, (splits, blocks, batch), *inputs, total, parts, r, c, rows, **counted, **adds, **tile)
    merge_options = {"BS": tiles.power_of_2(splits), "num_warps": 4}
    launch(group_norm_merge, (batch * groups,), parts, stats, splits, r, rows, width, eps, **merge_options)
    launch(
        group_norm_apply, (triton.cdiv(r, tile["BR"]), blocks, batch), *inputs, *optional[1:], stats, total, out,
        r, c, **channels, **adds, SILU=silu, **tile,
    )  # fmt: skip
    return out, total
