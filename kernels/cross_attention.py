"""Eq. 4 on the GPU: attention over the tokens of the valid neighbours, one program per head and tile of queries.

`project` also computes the queries, in the same launch. Softmax in base 2 and fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ragturbo.kernels import pdl, tiles
from ragturbo.kernels.launch import launch
from ragturbo.kernels.portable import cast, divide, dot

LOG2E = 1.4426950408889634


@triton.jit
def _attend(
    q, k_ptr, v_ptr, valid_ptr, n, S, stride_n, stride_s, D, scale_log2e,
    BT: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """q: [BT, BD] against n neighbours of S tokens -> Σ pv [BT, BD], Σ p [BT], maximum score [BT]; Σ pv unnormalised.

    valid_ptr: n flags, or None. Invalid neighbours are not read: their memory may be uninitialised.
    """
    i_d = tl.arange(0, BD)
    m_d = i_d < D
    top = tl.full([BT], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BT], dtype=tl.float32)
    acc = tl.zeros([BT, BD], dtype=tl.float32)
    for i_n in range(0, n):
        attend = True
        if valid_ptr is not None:
            attend = tl.load(valid_ptr + i_n) != 0
        if attend:
            for s0 in range(0, S, BS):
                i_s = s0 + tl.arange(0, BS)
                m_s = i_s < S
                o = i_n * stride_n + i_s.to(tl.int64) * stride_s
                k = tl.load(k_ptr + o[None, :] + i_d[:, None], mask=m_s[None, :] & m_d[:, None], other=0.0)
                x = dot(q, k, tl.zeros([BT, BS], dtype=tl.float32)) * scale_log2e
                x = tl.where(m_s[None, :], x, float("-inf"))
                new_top = tl.maximum(top, tl.max(x, axis=1))
                p = tl.exp2(x - new_top[:, None])  # [BT, BS]
                shrink = tl.exp2(top - new_top)
                total = total * shrink + tl.sum(p, axis=1)
                v = tl.load(v_ptr + o[:, None] + i_d[None, :], mask=m_s[:, None] & m_d[None, :], other=0.0)
                acc = dot(cast(p, v.dtype), v, acc * shrink[:, None])
                top = new_top
    return acc, total, top


@triton.jit
def _inverse(total):
    """1 / Σ p, or 0 if no neighbour is valid: the output is then zero, and so are the gradients."""
    return tl.where(total == 0, 0.0, divide(1.0, tl.where(total == 0, 1.0, total)))


@triton.jit
def cross_attention(
    q_ptr, k_ptr, v_ptr, valid_ptr, out_ptr, softmax_ptr, T, C, n, S, D, scale_log2e,
    stride_qb, stride_qt, stride_kb, stride_kn, stride_ks,
    BT: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (query tile, head, sample)."""
    pdl.wait(PDL)
    i_h, i_b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    i_t = tl.program_id(0) * BT + tl.arange(0, BT)
    i_d = tl.arange(0, BD)
    m_t = i_t < T
    m = m_t[:, None] & (i_d < D)[None, :]
    q = tl.load(q_ptr + i_b * stride_qb + i_t[:, None] * stride_qt + i_h * D + i_d[None, :], mask=m, other=0.0)
    o_k = i_b * stride_kb + i_h * D
    if valid_ptr is not None:
        valid_ptr += i_b * n
    acc, total, top = _attend(
        q, k_ptr + o_k, v_ptr + o_k, valid_ptr, n, S, stride_kn, stride_ks, D, scale_log2e, BT, BS, BD
    )
    inverse = _inverse(total)
    # Backward recomputes the probabilities from these two. A single log-sum-exp would be rounded at the magnitude of
    # the maximum, and this error would scale every probability of the row.
    p_softmax = softmax_ptr + (i_b * tl.num_programs(1) + i_h) * 2 * T + i_t
    tl.store(p_softmax, top, mask=m_t)
    tl.store(p_softmax + T, inverse, mask=m_t)
    o_out = (i_b * T + i_t)[:, None] * C + i_h * D + i_d[None, :]
    tl.store(out_ptr + o_out, cast(acc * inverse[:, None], out_ptr.dtype.element_ty), mask=m)


@triton.jit
def project_cross_attention(
    x_ptr, w_ptr, k_ptr, v_ptr, valid_ptr, out_ptr, T, C, K, n, S, D, scale_log2e, stride_kb, stride_kn, stride_ks,
    BT: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (query tile, head, sample): Q = x W_Qᵀ of one head and its attention, with Q kept in registers."""
    i_h, i_b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    i_t = tl.program_id(0) * BT + tl.arange(0, BT)
    i_d = tl.arange(0, BD)
    m_t, m_d = i_t < T, i_d < D
    i_m = i_b * T + i_t
    pdl.prefetch_rows(w_ptr, i_h * D + i_d, m_d, K, 0, K, PDL)
    pdl.wait(PDL)
    acc_q = tl.zeros([BT, BD], dtype=tl.float32)
    for k0 in range(0, K, BK):
        i_k = k0 + tl.arange(0, BK)
        m_k = i_k < K
        x = tl.load(x_ptr + i_m[:, None] * K + i_k[None, :], mask=m_t[:, None] & m_k[None, :], other=0.0)
        w = tl.load(w_ptr + (i_h * D + i_d)[None, :] * K + i_k[:, None], mask=m_d[None, :] & m_k[:, None], other=0.0)
        acc_q = dot(x, w, acc_q)
    o_k = i_b * stride_kb + i_h * D
    if valid_ptr is not None:
        valid_ptr += i_b * n
    acc, total, _ = _attend(
        cast(acc_q, x_ptr.dtype.element_ty), k_ptr + o_k, v_ptr + o_k, valid_ptr, n, S, stride_kn, stride_ks,
        D, scale_log2e, BT, BS, BD,
    )  # fmt: skip
    o_out = i_m[:, None] * C + i_h * D + i_d[None, :]
    out = cast(acc * _inverse(total)[:, None], out_ptr.dtype.element_ty)
    tl.store(out_ptr + o_out, out, mask=m_t[:, None] & m_d[None, :])


def last_dense(x: Tensor) -> Tensor:
    """x, copied if its last dimension is strided."""
    return x if x.stride(-1) == 1 else x.contiguous()


def same_layout(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """k and v with dense channels and equal strides. Two views of one projection are not copied."""
    k, v = last_dense(k), last_dense(v)
    return (k, v) if k.stride() == v.stride() else (k.contiguous(), v.contiguous())


def flags(valid: Tensor | None) -> Tensor | None:
    """valid (B, n) bool as bytes, which Triton can load."""
    return None if valid is None else valid.contiguous().view(torch.uint8)


# Half of an H100's multiprocessors: fewer programs would leave most of the GPU idle.
PROGRAMS = 66


def _queries(largest: int, least: int, t: int, heads: int) -> int:
    """Queries per program: `largest`, halved down to `least` while there are fewer than PROGRAMS programs."""
    rows = min(largest, tiles.power_of_2(t, 16))
    while rows > least and heads * triton.cdiv(t, rows) < PROGRAMS:
        rows //= 2
    return rows


def forward(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, heads: int) -> tuple[Tensor, Tensor]:
    """q: (B, T, C); k, v: (B, n, S, C); valid: (B, n) bool -> (B, T, C).

    Also returns what backward needs, (B, heads, 2, T) fp32: each query's maximum score and 1 / Σ p.
    """
    (batch, t, c), (_, n, s, _) = q.shape, k.shape
    d = c // heads
    q = last_dense(q)
    k, v = same_layout(k, v)
    out = torch.empty(batch, t, c, dtype=q.dtype, device=q.device)
    softmax = torch.empty(batch, heads, 2, t, dtype=torch.float32, device=q.device)
    # The largest tiles that do not spill on sm_80, sm_89 or sm_90.
    if q.dtype == torch.float32:
        default = {"BT": 32 if d <= 32 else 16, "BS": 32 if d <= 64 else 16, "num_warps": 4 if d <= 64 else 8}
        default["num_stages"] = 1
    else:
        default = {"BT": 64, "BS": 64 if d <= 64 else 32, "num_warps": 4, "num_stages": 3 if d <= 32 else 2}
    default["BT"] = _queries(default["BT"], 16 if d <= 64 else 32, t, batch * heads)
    default["BS"] = min(default["BS"], tiles.power_of_2(s, 16))
    tile = tiles.choose("cross_attention", f"T{t} n{n} S{s} D{d} {q.dtype}", q.device, default)
    launch(
        cross_attention, (triton.cdiv(t, tile["BT"]), heads, batch), q, k, v, flags(valid), out, softmax,
        t, c, n, s, d, d**-0.5 * LOG2E, q.stride(0), q.stride(1), k.stride(0), k.stride(1), k.stride(2),
        BD=tiles.power_of_2(d, 16), **tile,
    )  # fmt: skip
    return out, softmax


def project(x: Tensor, weight: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, heads: int) -> Tensor:
    """x: (B, T, K); weight: W_Q (C, K); k, v: (B, n, S, C); valid: (B, n) bool -> (B, T, C)."""
    (batch, t, width), (_, n, s, c) = x.shape, k.shape
    d = c // heads
    k, v = same_layout(k, v)
    out = torch.empty(batch, t, c, dtype=x.dtype, device=x.device)
    half = x.dtype != torch.float32
    default = {
        "BT": _queries(32 if half else 16, 32 if d > 64 else 16, t, batch * heads),
        "BS": min(32 if not half or d > 128 else 64, tiles.power_of_2(s, 16)),
        "BK": 128 if half else 32,
        "num_warps": 4,
        "num_stages": 1,
    }
    if half:
        # As many stages as fit in 96 KB of shared memory.
        stage = (default["BT"] + tiles.power_of_2(d, 16)) * default["BK"] * x.element_size()
        default["num_stages"] = min(5, 96 * 1024 // stage + 1)
    tile = tiles.choose("project_cross_attention", f"T{t} S{s} D{d} K{width} {x.dtype}", x.device, default)
    launch(
        project_cross_attention, (triton.cdiv(t, tile["BT"]), heads, batch),
        x.contiguous(), weight.contiguous(), k, v, flags(valid), out,
        t, c, width, n, s, d, d**-0.5 * LOG2E, k.stride(0), k.stride(1), k.stride(2),
        BD=tiles.power_of_2(d, 16), **tile,
    )  # fmt: skip
    return out
