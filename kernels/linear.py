"""A linear layer with what surrounds it in the adapter, in one launch: the normalisation before it, several weights
side by side, and bias, GEGLU, residual or λ-scaled residual after it.

Statistics are taken by each program for its own rows: at the adapter's 64 tokens a row tile is read from L2 anyway, and
a launch saved is worth more than the arithmetic. The weights, 72 MB of them in fp16, are what the time goes into.
Where there are few columns and many channels, several programs share a tile's channels (split-K) in the same launch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ragturbo.kernels import moments, tiles
from ragturbo.kernels.launch import launch
from ragturbo.kernels.portable import cast, divide, dot, inverse_sqrt


@triton.jit
def linear(
    x_ptr, w0_ptr, w1_ptr, w2_ptr, bias_ptr, norm_w_ptr, norm_b_ptr, residual_ptr, lam_ptr, out_ptr,
    part_ptr, arrived_ptr, M, L, N, K, stride_x, rows_per_lam, width, eps,
    PARTS: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr, GEGLU: tl.constexpr,
    RESIDUAL: tl.constexpr, SCALED: tl.constexpr, GROUPS: tl.constexpr, BG: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN_K: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Rows come in samples of L, and no tile holds two. Only GroupNorm needs that: else all rows are one sample."""
    per_sample = tl.cdiv(L, BM)
    i_sample = tl.program_id(0) // per_sample
    i_l = (tl.program_id(0) % per_sample) * BM + tl.arange(0, BM)
    m_l = i_l < L
    first = (i_sample * L).to(tl.int64)
    rows = first + i_l

    per_part = tl.cdiv(N, BN)
    part = tl.program_id(1) // per_part
    i_n = (tl.program_id(1) % per_part) * BN + tl.arange(0, BN)
    m_n = i_n < N
    w_ptr = w0_ptr
    if PARTS > 1:
        if part == 1:
            w_ptr = w1_ptr
    if PARTS > 2:
        if part == 2:
            w_ptr = w2_ptr

    if NORM == "layer":
        mean, rstd = moments.of_rows(x_ptr, rows, m_l, stride_x, K, eps, BM, BK)
    if NORM == "group":
        groups = tl.arange(0, GROUPS)
        means = tl.zeros([GROUPS], dtype=tl.float32)
        m2s = tl.zeros([GROUPS], dtype=tl.float32)
        for i_g in range(0, tl.cdiv(K, width)):
            c = tl.arange(0, BG)
            g_mean, g_m2 = moments.of_group(x_ptr, first, L, stride_x, i_g * width + c, c < width, width, BM)
            means = tl.where(groups == i_g, g_mean, means)
            m2s = tl.where(groups == i_g, g_m2, m2s)
        rstds = inverse_sqrt(divide(m2s, L * width) + eps)

    acc = tl.zeros([BM, BN], dtype=tl.float32)
    gate = tl.zeros([BM, BN], dtype=tl.float32)
    first_k = 0
    last_k = K
    if SPLITS > 1:
        share = tl.cdiv(tl.cdiv(K, BK), SPLITS) * BK
        first_k = tl.program_id(2) * share
        last_k = tl.minimum(first_k + share, K)
    for k0 in range(first_k, last_k, BK):
        k = k0 + tl.arange(0, BK)
        m_k = k < K
        p_x = x_ptr + rows[:, None] * stride_x + k[None, :]
        p_w = w_ptr + i_n[None, :].to(tl.int64) * K + k[:, None]
        if EVEN_K:
            x = tl.load(p_x, mask=m_l[:, None], other=0.0)
            w = tl.load(p_w, mask=m_n[None, :], other=0.0)
        else:
            x = tl.load(p_x, mask=m_l[:, None] & m_k[None, :], other=0.0)
            w = tl.load(p_w, mask=m_n[None, :] & m_k[:, None], other=0.0)
        if NORM != "":
            scale = tl.load(norm_w_ptr + k, mask=m_k, other=0.0).to(tl.float32)
            shift = tl.load(norm_b_ptr + k, mask=m_k, other=0.0).to(tl.float32)
            if NORM == "layer":
                normed = (x.to(tl.float32) - mean[:, None]) * rstd[:, None]
            else:
                own = (k // width)[:, None] == groups[None, :]
                k_mean = tl.sum(tl.where(own, means[None, :], 0.0), axis=1)
                k_rstd = tl.sum(tl.where(own, rstds[None, :], 0.0), axis=1)
                normed = (x.to(tl.float32) - k_mean[None, :]) * k_rstd[None, :]
            x = cast(normed * scale[None, :] + shift[None, :], x.dtype)
        acc = dot(x, w, acc)
        if GEGLU:
            p_gate = p_w + tl.cast(N, tl.int64) * K
            if EVEN_K:
                w_gate = tl.load(p_gate, mask=m_n[None, :], other=0.0)
            else:
                w_gate = tl.load(p_gate, mask=m_n[None, :] & m_k[:, None], other=0.0)
            gate = dot(x, w_gate, gate)

    offset = rows[:, None] * (PARTS * N) + (part * N + i_n)[None, :]
    m = m_l[:, None] & m_n[None, :]
    if SPLITS > 1:
        # The last program of a tile to arrive adds the shares, in their order: the bits do not depend on who it was.
        p_part = part_ptr + offset
        one = tl.cast(M, tl.int64) * (PARTS * N)
        tl.store(p_part + tl.program_id(2) * one, acc, mask=m)
        # The counter may only be raised when every thread's share is written.
        tl.debug_barrier()
        before = tl.atomic_add(arrived_ptr + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), 1)
        if before < SPLITS - 1:
            return
        acc = tl.zeros([BM, BN], dtype=tl.float32)
        # Unrolled, so that a share's load need not wait for the sum of those before it.
        for i in tl.static_range(SPLITS):
            # Past the L1 cache, which knows nothing of what other multiprocessors wrote.
            acc += tl.load(p_part + i * one, mask=m, other=0.0, cache_modifier=".cg")

    if BIAS:
        acc += tl.load(bias_ptr + i_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    if GEGLU:
        if BIAS:
            gate += tl.load(bias_ptr + N + i_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
        acc = acc * (0.5 * gate * (1 + tl.erf(gate * 0.7071067811865476)))

    out = cast(acc, out_ptr.dtype.element_ty)
    if RESIDUAL:
        residual = tl.load(residual_ptr + offset, mask=m, other=0.0)
        if SCALED:
            lam = tl.load(lam_ptr + rows // rows_per_lam, mask=m_l, other=0.0).to(tl.float32)[:, None]
            out = cast(residual.to(tl.float32) + lam * acc, out.dtype)
            out = tl.where(lam == 0, residual, out)
        else:
            out = cast(residual.to(tl.float32) + acc, out.dtype)
    tl.store(out_ptr + offset, out, mask=m)


def _default(rows: int, columns: int, k: int, geglu: bool, dtype: torch.dtype) -> tiles.Tile:
    if rows > 512:
        return {"BM": 128, "BN": 64, "BK": 32 if dtype == torch.float32 else 64, "num_warps": 8, "num_stages": 3}
    tile = {"BM": min(64, tiles.power_of_2(rows, 16)), "BN": 32, "BK": 64, "num_warps": 4, "num_stages": 4}
    if dtype == torch.float32:
        tile.update(BM=min(32, tile["BM"]), BK=32, num_stages=2)
    if rows > 64:
        return tile
    # At few rows each program streams its own columns of the weights once, and waits for memory: programs for more of
    # the GPU's multiprocessors, and as many bytes in flight in each as 96 KB of shared memory hold.
    if k >= 4096 and not geglu:
        # By fewer columns a program, what all read of x would outweigh the weights.
        tile.update(BN=64, SPLITS=4)
    elif columns <= 2048 and not geglu and dtype != torch.float32:
        tile.update(BN=16)
    if dtype != torch.float32:
        tile.update(num_stages=6 if geglu or tile["BN"] == 64 else 8)
    return tile


def forward(
    x: Tensor,
    weights: Sequence[Tensor],
    bias: Tensor | None = None,
    norm: str = "",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    groups: int = 0,
    geglu: bool = False,
    residual: Tensor | None = None,
    lam: Tensor | None = None,
) -> Tensor:
    """x: (B, T, K); weights: up to three of (N, K) side by side; norm: "", "layer", "group" -> (B, T, parts·N).

    geglu: N is twice the output's width, values before gates. residual: (B, T, parts·N), plus lam[b]·result if given.
    """
    batch, tokens, k = x.shape
    x = x.contiguous()
    weights = [w.contiguous() for w in weights]
    n = weights[0].shape[0] // (2 if geglu else 1)
    parts = len(weights)
    out = torch.empty(batch, tokens, parts * n, dtype=x.dtype, device=x.device)
    samples, length = (batch, tokens) if norm == "group" else (1, batch * tokens)
    kind = f"{norm}{' geglu' if geglu else ''}"
    shape = f"M{batch * tokens} N{parts * n} K{k} {kind} {x.dtype}"
    tile = dict(
        tiles.choose("linear", shape, x.device, {"SPLITS": 1, **_default(length, parts * n, k, geglu, x.dtype)})
    )
    # GEGLU keeps two sums a tile; its columns are many, and no split of the channels is wanted.
    splits = tile["SPLITS"] = 1 if geglu else tile["SPLITS"]
    width = k // groups if norm == "group" else k
    grid = (samples * triton.cdiv(length, tile["BM"]), parts * triton.cdiv(n, tile["BN"]), splits)
    shares = arrived = out
    if splits > 1:
        shares = torch.empty(splits, *out.shape, dtype=torch.float32, device=x.device)
        # Of this call alone: a counter kept between calls would be shared by streams.
        arrived = torch.zeros(grid[0] * grid[1], dtype=torch.int32, device=x.device)
    w = [*weights, *weights[:1] * (3 - parts)]
    launch(
        linear, grid, x, *w,
        x if bias is None else bias.contiguous(),
        x if norm_weight is None else norm_weight.contiguous(),
        x if norm_bias is None else norm_bias.contiguous(),
        x if residual is None else residual.contiguous(),
        x if lam is None else lam.contiguous(),
        out, shares, arrived, batch * tokens, length, n, k, k, tokens, width, eps,
        PARTS=parts, NORM=norm, BIAS=bias is not None, GEGLU=geglu, RESIDUAL=residual is not None,
        SCALED=lam is not None, GROUPS=tiles.power_of_2(max(groups, 1)),
        BG=tiles.power_of_2(width, 16) if norm == "group" else 16,
        EVEN_K=k % tile["BK"] == 0, **tile,
    )  # fmt: skip
    return out
