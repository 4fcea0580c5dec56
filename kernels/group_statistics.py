"""Statistics of groups of channels over rows of channels_last memory, for group_norm's kernels.

A block is PER_BLOCK channels, padded to BC, of whole groups of WIDTH channels, padded to GROUPS.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ragturbo.kernels.portable import cast, divide, inverse_sqrt


@triton.jit
def channels(i_c, C, PER_BLOCK: tl.constexpr, BC: tl.constexpr):
    """The PER_BLOCK channels of block i_c, padded to BC, and their mask."""
    lane = tl.arange(0, BC)
    c = i_c * PER_BLOCK + lane
    return c, (lane < PER_BLOCK) & (c < C)


@triton.jit
def load_sum(x_ptr, add_ptr, add_bias, sum_ptr, base, o, m, KEEP: tl.constexpr):
    """x + add + add_bias[c] at base + o, rounded to the storage type, in fp32. Stores the sum if sum_ptr is given."""
    # Large maps exceed L2: what is read for the last time makes room.
    x = tl.load(x_ptr + base + o, mask=m, other=0.0, eviction_policy="" if KEEP else "evict_first")
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
    """load_sum of the rows i_r < left, 0 elsewhere, and the mask."""
    m = EVEN | ((i_r < left)[:, None] & m_c[None, :])
    return tl.where(m, load_sum(x_ptr, add_ptr, add_bias, sum_ptr, base, o, m, True), 0.0), m


@triton.jit
def _merge(n_a, mean_a, m2_a, n_b, mean_b, m2_b):
    """Count, mean and M2 (sum of squared deviations) of two sets together, by Chan's rule: E[x²] - E[x]² cancels."""
    n = n_a + n_b
    share = divide(n_b, tl.maximum(n, 1.0))
    d = mean_b - mean_a
    return n, mean_a + d * share, m2_a + m2_b + d * d * n_a * share


@triton.jit
def channel_moments(
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
def group_sums(v, WIDTH: tl.constexpr, BC: tl.constexpr, GROUPS: tl.constexpr):
    """The sum of each group of WIDTH channels: [BC] -> [GROUPS]."""
    if GROUPS == 1:
        sums = tl.sum(v, axis=0, keep_dims=True)
    elif BC % WIDTH == 0:
        sums = tl.sum(tl.reshape(v, [GROUPS, WIDTH]), axis=1)
    else:
        # Groups have 10, 20, 40 or 80 channels: a reshape to powers of two cannot separate them.
        own = tl.arange(0, GROUPS)[:, None] == (tl.arange(0, BC) // WIDTH)[None, :]  # [GROUPS, BC]
        sums = tl.sum(tl.where(own, v[None, :], 0.0), axis=1)
    return sums


@triton.jit
def of_channels(v, WIDTH: tl.constexpr, BC: tl.constexpr, GROUPS: tl.constexpr):
    """Each channel's group's value: [GROUPS] -> [BC]."""
    if GROUPS == 1:
        spread = tl.broadcast_to(v, [BC])
    elif BC % WIDTH == 0:
        spread = tl.reshape(tl.broadcast_to(v[:, None], [GROUPS, WIDTH]), [BC])
    else:
        own = tl.arange(0, GROUPS)[:, None] == (tl.arange(0, BC) // WIDTH)[None, :]
        spread = tl.sum(tl.where(own, v[:, None], 0.0), axis=0)
    return spread


@triton.jit
def groups(i_c, C, WIDTH: tl.constexpr, PER_BLOCK: tl.constexpr, GROUPS: tl.constexpr):
    """The groups of block i_c, padded to GROUPS, and their mask."""
    lane = tl.arange(0, GROUPS)
    g = i_c * (PER_BLOCK // WIDTH) + lane
    return g, (lane < PER_BLOCK // WIDTH) & (g < C // WIDTH)


@triton.jit
def merged(part_ptr, plane, g, m_g, splits, R, rows_per_split, width, eps, BS: tl.constexpr):
    """Mean and 1/σ of the groups g from the partial statistics of their splits: [GROUPS], [GROUPS]."""
    i_s = tl.arange(0, BS)
    m = m_g[:, None] & (i_s < splits)[None, :]
    rows = tl.where(i_s < splits, tl.minimum(R - i_s * rows_per_split, rows_per_split), 0)
    n = (rows * width).to(tl.float32)[None, :]
    p = part_ptr + g[:, None] * splits + i_s[None, :]
    mean = tl.load(p, mask=m, other=0.0)
    m2 = tl.load(p + plane, mask=m, other=0.0)
    share = divide(1.0, R * width)
    mean_all = tl.sum(mean * n, axis=1) * share
    d = tl.where(m, mean - mean_all[:, None], 0.0)
    return mean_all, inverse_sqrt(tl.sum(m2 + n * d * d, axis=1) * share + eps)
