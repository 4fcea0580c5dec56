"""A linear layer in one launch: up to three weights side by side, then bias, GEGLU and residual or λ-scaled residual.

At the adapter's 64 rows the time goes into streaming the weights (72 MB in fp16). With few columns and many channels,
several programs share the channels of one output tile (split-K), in the same launch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ragturbo.kernels import counters, pdl, tiles
from ragturbo.kernels.geglu import gelu
from ragturbo.kernels.launch import launch
from ragturbo.kernels.portable import cast, dot


@triton.jit
def linear(
    x_ptr, w0_ptr, w1_ptr, w2_ptr, bias_ptr, residual_ptr, lam_ptr, out_ptr, part_ptr, arrived_ptr,
    M, N, K, rows_per_lam,
    PARTS: tl.constexpr, GEGLU: tl.constexpr, EVEN_K: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (row tile, column tile of one weight, share of K). bias, residual and lam may be None."""
    i_m = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    m_m = i_m < M
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

    first_k = 0
    last_k = K
    if SPLITS > 1:
        share = tl.cdiv(tl.cdiv(K, BK), SPLITS) * BK
        first_k = tl.program_id(2) * share
        last_k = tl.minimum(first_k + share, K)
    pdl.prefetch_rows(w_ptr, i_n, m_n, K, first_k, last_k, PDL)
    if GEGLU:
        pdl.prefetch_rows(w_ptr + tl.cast(N, tl.int64) * K, i_n, m_n, K, first_k, last_k, PDL)
    pdl.wait(PDL)
    acc = tl.zeros([BM, BN], dtype=tl.float32)
    gate = tl.zeros([BM, BN], dtype=tl.float32)
    for k0 in range(first_k, last_k, BK):
        i_k = k0 + tl.arange(0, BK)
        m_k = EVEN_K | (i_k < K)
        x = tl.load(x_ptr + i_m[:, None] * K + i_k[None, :], mask=m_m[:, None] & m_k[None, :], other=0.0)  # [BM, BK]
        p_w = w_ptr + i_n[None, :].to(tl.int64) * K + i_k[:, None]
        m_w = m_n[None, :] & m_k[:, None]
        acc = dot(x, tl.load(p_w, mask=m_w, other=0.0), acc)
        if GEGLU:
            # The gates' rows follow the N rows of the values.
            gate = dot(x, tl.load(p_w + tl.cast(N, tl.int64) * K, mask=m_w, other=0.0), gate)

    o = i_m[:, None] * (PARTS * N) + (part * N + i_n)[None, :]
    m = m_m[:, None] & m_n[None, :]
    if SPLITS > 1:
        # The last program of a tile to finish adds the shares in order of K, so the bits do not depend on which it is.
        p_part = part_ptr + o
        share_size = tl.cast(M, tl.int64) * (PARTS * N)
        tl.store(p_part + tl.program_id(2) * share_size, acc, mask=m)
        # All threads must have stored their part before the counter is raised.
        tl.debug_barrier()
        p_arrived = arrived_ptr + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        if tl.atomic_add(p_arrived, 1) < SPLITS - 1:
            return
        # For the next run of a graph: see counters.py.
        tl.store(p_arrived, 0)
        acc = tl.zeros([BM, BN], dtype=tl.float32)
        # Unrolled, so that the loads overlap.
        for i in tl.static_range(SPLITS):
            # L1 is not coherent with stores from other multiprocessors: .cg reads from L2.
            acc += tl.load(p_part + i * share_size, mask=m, other=0.0, cache_modifier=".cg")

    if bias_ptr is not None:
        acc += tl.load(bias_ptr + i_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
        if GEGLU:
            gate += tl.load(bias_ptr + N + i_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    if GEGLU:
        acc = acc * gelu(gate)
    out = cast(acc, out_ptr.dtype.element_ty)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + o, mask=m, other=0.0)
        if lam_ptr is not None:
            lam = tl.load(lam_ptr + i_m // rows_per_lam, mask=m_m, other=0.0).to(tl.float32)[:, None]
            out = cast(residual.to(tl.float32) + lam * acc, out.dtype)
            out = tl.where(lam == 0, residual, out)
        else:
            out = cast(residual.to(tl.float32) + acc, out.dtype)
    tl.store(out_ptr + o, out, mask=m)


def _default(rows: int, columns: int, k: int, geglu: bool, dtype: torch.dtype) -> tiles.Tile:
    if rows > 512:
        return {"BM": 128, "BN": 64, "BK": 32 if dtype == torch.float32 else 64, "num_warps": 8, "num_stages": 3}
    tile = {"BM": min(64, tiles.power_of_2(rows, 16)), "BN": 32, "BK": 64, "num_warps": 4, "num_stages": 4}
    if dtype == torch.float32:
        tile.update(BM=min(32, tile["BM"]), BK=32, num_stages=2)
    if rows > 64:
        return tile
    # With few rows the kernel is bound by reading the weights once: use enough programs to occupy the multiprocessors,
    # and as many stages as fit in 96 KB of shared memory.
    if k >= 4096 and not geglu:
        # Narrower tiles would read x more often than the weights.
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
    geglu: bool = False,
    residual: Tensor | None = None,
    lam: Tensor | None = None,
) -> Tensor:
    """x: (B, T, K); weights: up to three of (N, K) -> (B, T, parts·N), plus residual or scaled by lam (B,) as given.

    geglu: N is twice the output's width, values before gates.
    """
    batch, tokens, k = x.shape
    rows, parts = batch * tokens, len(weights)
    n = weights[0].shape[0] // (2 if geglu else 1)
    out = torch.empty(batch, tokens, parts * n, dtype=x.dtype, device=x.device)
    shape = f"M{rows} N{parts * n} K{k} {' geglu' if geglu else ''} {x.dtype}"
    default = {"SPLITS": 1, **_default(rows, parts * n, k, geglu, x.dtype)}
    tile = dict(tiles.choose("linear", shape, x.device, default))
    if geglu:
        # Two accumulators per tile, and enough columns to occupy the GPU without a split.
        tile["SPLITS"] = 1
    splits = tile["SPLITS"]
    grid = (triton.cdiv(rows, tile["BM"]), parts * triton.cdiv(n, tile["BN"]), splits)
    shares = arrived = None
    if splits > 1:
        shares = torch.empty(splits, *out.shape, dtype=torch.float32, device=x.device)
        arrived = counters.zeros(grid[0] * grid[1], x.device)
    w = [*(w.contiguous() for w in weights), None, None][:3]
    optional = [None if t is None else t.contiguous() for t in (bias, residual, lam)]
    launch(
        linear, grid, x.contiguous(), *w, *optional, out, shares, arrived, rows, n, k, tokens,
        PARTS=parts, GEGLU=geglu, EVEN_K=k % tile["BK"] == 0, **tile,
    )  # fmt: skip
    return out
