"""The gradients of Eq. 4: one launch for dQ, one for dK and dV. Probabilities are recomputed from the saved sums."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ragturbo.kernels import tiles
from ragturbo.kernels.cross_attention import LOG2E, flags, last_dense, same_layout
from ragturbo.kernels.launch import launch
from ragturbo.kernels.portable import cast, dot


@triton.jit
def cross_attention_dq(
    q_ptr, k_ptr, v_ptr, valid_ptr, out_ptr, softmax_ptr, g_ptr, dq_ptr, T, C, n, S, D, scale, scale_log2e,
    stride_qb, stride_qt, stride_kb, stride_kn, stride_ks,
    BT: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Program (query tile, head, sample). valid may be None."""
    i_h, i_b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    i_t = tl.program_id(0) * BT + tl.arange(0, BT)
    i_d = tl.arange(0, BD)
    m_t, m_d = i_t < T, i_d < D
    m = m_t[:, None] & m_d[None, :]
    o = (i_b * T + i_t)[:, None] * C + i_h * D + i_d[None, :]
    q = tl.load(q_ptr + i_b * stride_qb + i_t[:, None] * stride_qt + i_h * D + i_d[None, :], mask=m, other=0.0)
    g = tl.load(g_ptr + o, mask=m, other=0.0)
    out = tl.load(out_ptr + o, mask=m, other=0.0)
    p_softmax = softmax_ptr + (i_b * tl.num_programs(1) + i_h) * 2 * T + i_t
    top = tl.load(p_softmax, mask=m_t, other=0.0)
    # Σ p ∂p of each query.
    share = tl.sum(g.to(tl.float32) * out.to(tl.float32), axis=1)
    dq = tl.zeros([BT, BD], dtype=tl.float32)
    o_head = i_b * stride_kb + i_h * D
    for i_n in range(0, n):
        attend = True
        if valid_ptr is not None:
            attend = tl.load(valid_ptr + i_b * n + i_n) != 0
        if attend:
            for s0 in range(0, S, BS):
                i_s = s0 + tl.arange(0, BS)
                m_s = i_s < S
                o_s = o_head + i_n * stride_kn + i_s.to(tl.int64) * stride_ks
                m_sd = m_s[:, None] & m_d[None, :]
                k = tl.load(k_ptr + o_s[:, None] + i_d[None, :], mask=m_sd, other=0.0)
                v = tl.load(v_ptr + o_s[:, None] + i_d[None, :], mask=m_sd, other=0.0)
                x = dot(q, tl.trans(k), tl.zeros([BT, BS], dtype=tl.float32)) * scale_log2e
                p = tl.where(m_s[None, :], tl.exp2(x - top[:, None]), 0.0)  # [BT, BS]
                dp = dot(g, tl.trans(v), tl.zeros([BT, BS], dtype=tl.float32))
                ds = p * (dp - share[:, None]) * scale
                dq = dot(cast(ds, k.dtype), k, dq)
    # 1 / Σ p is a factor of the whole sum.
    inverse = tl.load(p_softmax + T, mask=m_t, other=0.0)
    tl.store(dq_ptr + o, cast(dq * inverse[:, None], dq_ptr.dtype.element_ty), mask=m)


@triton.jit
def cross_attention_dkv(
    q_ptr, k_ptr, v_ptr, valid_ptr, out_ptr, softmax_ptr, g_ptr, dk_ptr, dv_ptr,
    T, C, n, S, D, scale, scale_log2e, heads,
    stride_qb, stride_qt, stride_kb, stride_kn, stride_ks,
    BT: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Program (tile of a neighbour's tokens, neighbour and head, sample). valid may be None."""
    i_h = tl.program_id(1) % heads
    i_n = tl.program_id(1) // heads
    i_b = tl.program_id(2).to(tl.int64)
    i_s = tl.program_id(0) * BS + tl.arange(0, BS)
    i_d = tl.arange(0, BD)
    m_s, m_d = i_s < S, i_d < D
    m = m_s[:, None] & m_d[None, :]
    dk = tl.zeros([BS, BD], dtype=tl.float32)
    dv = tl.zeros([BS, BD], dtype=tl.float32)
    attend = True
    if valid_ptr is not None:
        attend = tl.load(valid_ptr + i_b * n + i_n) != 0
    if attend:
        o_s = i_b * stride_kb + i_n * stride_kn + i_h * D + i_s.to(tl.int64) * stride_ks
        k = tl.load(k_ptr + o_s[:, None] + i_d[None, :], mask=m, other=0.0)
        v = tl.load(v_ptr + o_s[:, None] + i_d[None, :], mask=m, other=0.0)
        for t0 in range(0, T, BT):
            i_t = t0 + tl.arange(0, BT)
            m_t = i_t < T
            m_td = m_t[:, None] & m_d[None, :]
            o = (i_b * T + i_t)[:, None] * C + i_h * D + i_d[None, :]
            o_q = i_b * stride_qb + i_t[:, None] * stride_qt + i_h * D + i_d[None, :]
            q = tl.load(q_ptr + o_q, mask=m_td, other=0.0)
            g = tl.load(g_ptr + o, mask=m_td, other=0.0)
            out = tl.load(out_ptr + o, mask=m_td, other=0.0)
            p_softmax = softmax_ptr + (i_b * heads + i_h) * 2 * T + i_t
            top = tl.load(p_softmax, mask=m_t, other=0.0)
            inverse = tl.load(p_softmax + T, mask=m_t, other=0.0)
            share = tl.sum(g.to(tl.float32) * out.to(tl.float32), axis=1)
            x = dot(k, tl.trans(q), tl.zeros([BS, BT], dtype=tl.float32)) * scale_log2e
            p = tl.where(m_s[:, None], tl.exp2(x - top[None, :]) * inverse[None, :], 0.0)  # [BS, BT]
            dv = dot(cast(p, g.dtype), g, dv)
            dp = dot(v, tl.trans(g), tl.zeros([BS, BT], dtype=tl.float32))
            ds = p * (dp - share[None, :]) * scale
            dk = dot(cast(ds, q.dtype), q, dk)
    o_out = ((i_b * n + i_n) * S + i_s)[:, None] * C + i_h * D + i_d[None, :]
    tl.store(dk_ptr + o_out, cast(dk, dk_ptr.dtype.element_ty), mask=m)
    tl.store(dv_ptr + o_out, cast(dv, dv_ptr.dtype.element_ty), mask=m)


def backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, out: Tensor, softmax: Tensor, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Contiguous gradients of q, k and v from the output's gradient g. Those of invalid neighbours are zero."""
    (batch, t, c), (_, n, s, _) = q.shape, k.shape
    d = c // heads
    q, g, out = last_dense(q), g.contiguous(), out.contiguous()
    k, v = same_layout(k, v)
    dq = torch.empty(batch, t, c, dtype=q.dtype, device=q.device)
    dk = torch.empty(batch, n, s, c, dtype=k.dtype, device=k.device)
    dv = torch.empty_like(dk)
    largest = 16 if q.dtype == torch.float32 or d > 64 else 32
    default = {
        "BT": min(largest, tiles.power_of_2(t, 16)),
        "BS": min(largest, tiles.power_of_2(s, 16)),
        # Chosen not to spill on sm_80, sm_89 or sm_90.
        "num_warps": 4 if q.dtype != torch.float32 else 1 if d <= 32 else 2 if d <= 64 else 8,
        "num_stages": 1,
    }
    tile = tiles.choose("cross_attention_backward", f"T{t} S{s} D{d} {q.dtype}", q.device, default)
    inputs = q, k, v, flags(valid), out, softmax, g
    sizes = t, c, n, s, d, d**-0.5, d**-0.5 * LOG2E
    strides = q.stride(0), q.stride(1), k.stride(0), k.stride(1), k.stride(2)
    options = {"BD": tiles.power_of_2(d, 16), **tile}
    launch(cross_attention_dq, (triton.cdiv(t, tile["BT"]), heads, batch), *inputs, dq, *sizes, *strides, **options)
    grid = (triton.cdiv(s, tile["BS"]), heads * n, batch)
    launch(cross_attention_dkv, grid, *inputs, dk, dv, *sizes, heads, *strides, **options)
    return dq, dk, dv
