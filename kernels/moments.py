"""Mean and variance without cancellation: chunks are merged by Welford's and Chan's rule, never as E[x²] - E[x]²."""

from __future__ import annotations

import triton
import triton.language as tl

from ragturbo.kernels.portable import divide, inverse_sqrt


@triton.jit
def merge(n_a, mean_a, m2_a, n_b, mean_b, m2_b):
    """Count, mean and summed squared deviation of two sets together. An empty second set changes nothing."""
    n = n_a + n_b
    share = divide(n_b, tl.maximum(n, 1.0))
    d = mean_b - mean_a
    return n, mean_a + d * share, m2_a + m2_b + d * d * n_a * share


@triton.jit
def of_rows(x_ptr, rows, row_mask, stride, K, eps, BM: tl.constexpr, BK: tl.constexpr):
    """LayerNorm's statistics: mean and 1/σ of each of BM rows over K columns -> two of [BM]."""
    n = 0.0
    mean = tl.zeros([BM], dtype=tl.float32)
    m2 = tl.zeros([BM], dtype=tl.float32)
    for k0 in tl.range(0, K, BK, num_stages=3):
        k = k0 + tl.arange(0, BK)
        m = row_mask[:, None] & (k[None, :] < K)
        x = tl.load(x_ptr + rows[:, None] * stride + k[None, :], mask=m, other=0.0).to(tl.float32)
        count = tl.minimum(K - k0, BK).to(tl.float32)
        b_mean = tl.sum(x, axis=1) * divide(1.0, count)
        d = tl.where(k[None, :] < K, x - b_mean[:, None], 0.0)
        n, mean, m2 = merge(n, mean, m2, count, b_mean, tl.sum(d * d, axis=1))
    return mean, inverse_sqrt(divide(m2, K) + eps)


@triton.jit
def of_group(x_ptr, first, L, stride, columns, column_mask, WIDTH, BM: tl.constexpr):
    """GroupNorm's statistics: mean and M2 of WIDTH columns over rows first … first + L - 1 -> two scalars."""
    n = 0.0
    mean = 0.0
    m2 = 0.0
    for l0 in tl.range(0, L, BM, num_stages=3):
        i = l0 + tl.arange(0, BM)
        m = (i[:, None] < L) & column_mask[None, :]
        x = tl.load(x_ptr + (first + i)[:, None] * stride + columns[None, :], mask=m, other=0.0).to(tl.float32)
        count = (tl.minimum(L - l0, BM) * WIDTH).to(tl.float32)
        b_mean = tl.sum(x) * divide(1.0, count)
        d = tl.where(m, x - b_mean, 0.0)
        n, mean, m2 = merge(n, mean, m2, count, b_mean, tl.sum(d * d))
    return mean, m2
