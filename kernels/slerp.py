"""Eq. 3 on the GPU, forward and backward.

A row is what one Ω is taken over: a token's channels, or an image's tokens and channels. A row that fits in one program
is read once; a longer one is summed in chunks by a first launch and blended by a second.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ragturbo.kernels import tiles
from ragturbo.kernels.launch import launch
from ragturbo.kernels.portable import cast, divide

# A row of this many elements, of two or three tensors, stays in one program's registers without spilling.
ONE_PASS = 8192

# The smallest normal fp32.
_TINY = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def _arccos(x):
    """arccos to fp32 rounding: π/2 - arcsin x, and near ±1, where that loses digits, 2·arcsin √((1-|x|)/2)."""
    size = tl.abs(x)
    steep = size > 0.5
    z = tl.where(steep, (1 - size) * 0.5, x * x)
    y = tl.where(steep, tl.sqrt_rn(z), size)
    # (arcsin y / y - 1) / y² on y² in [0, 1/4], fitted to 1e-8.
    p = 0.038206472992897034
    p = p * z + 0.026494264602661133
    p = p * z + 0.045010700821876526
    p = p * z + 0.07498808950185776
    p = p * z + 0.16666673123836517
    arcsin = y + y * z * p
    near = 2 * arcsin
    return tl.where(
        steep, tl.where(x > 0, near, 3.141592653589793 - near), 1.5707963267948966 - tl.where(x > 0, arcsin, -arcsin)
    )


@triton.jit
def _sin_near_0(x):
    """sin x for |x| ≤ π/2, to fp32 rounding."""
    z = x * x
    p = -2.4080527794012596e-08
    p = p * z + 2.753648004727438e-06
    p = p * z - 0.00019841086759697646
    p = p * z + 0.00833333283662796
    p = p * z - 0.1666666716337204
    return x + x * z * p


# tl.sin and tl.cos reduce arguments of any size and keep a stack frame for it; an angle of Eq. 3 is in [0, π].
@triton.jit
def _sin(x):
    # π to 48 bits: sin near π is the difference of the two.
    return _sin_near_0(tl.minimum(x, (3.1415927410125732 - x) - 8.742277657347586e-08))


@triton.jit
def _cos(x):
    return _sin_near_0((1.5707963705062866 - x) - 4.371138828673793e-08)


@triton.jit
def _angle(tt, rr, tr, PARALLEL: tl.constexpr, ANTIPODAL: tl.constexpr):
    """cos Ω, Ω (π/2 where it is of no use), |t||r| and whether the blend is linear."""
    # A squared norm below the normal numbers has lost its digits, and a GPU may take it for 0.
    zero = (tt < _TINY) | (rr < _TINY)
    norms = tl.where(zero, 1.0, tl.sqrt_rn(tt) * tl.sqrt_rn(rr))
    cos = divide(tr, norms)
    linear = zero | (cos > 1 - PARALLEL) | (cos < ANTIPODAL - 1)
    cos = tl.where(linear, 0.0, cos)
    return cos, _arccos(cos), norms, linear


@triton.jit
def _blend(t, r, w, tt, rr, tr, PARALLEL: tl.constexpr, ANTIPODAL: tl.constexpr):
    cos, omega, norms, linear = _angle(tt, rr, tr, PARALLEL, ANTIPODAL)
    sin = _sin(omega)
    a = tl.where(linear, 1 - w, divide(_sin((1 - w) * omega), sin))
    b = tl.where(linear, w, divide(_sin(w * omega), sin))
    return a * r + b * t


@triton.jit
def _gradients(t, r, g, w, tt, rr, tr, gt, gr, PARALLEL: tl.constexpr, ANTIPODAL: tl.constexpr):
    """dL/dt, dL/dr and dL/dw of the blend, from its inner products and those with the incoming gradient g."""
    cos, omega, norms, linear = _angle(tt, rr, tr, PARALLEL, ANTIPODAL)
    sin = _sin(omega)
    sin_a, cos_a = _sin((1 - w) * omega), _cos((1 - w) * omega)
    sin_b, cos_b = _sin(w * omega), _cos(w * omega)
    a = tl.where(linear, 1 - w, divide(sin_a, sin))
    b = tl.where(linear, w, divide(sin_b, sin))
    da = divide((1 - w) * cos_a - divide(sin_a * cos, sin), sin)
    db = divide(w * cos_b - divide(sin_b * cos, sin), sin)
    # dL/dcos Ω; where the blend is linear it does not depend on Ω.
    d_cos = tl.where(linear, 0.0, -divide(gr * da + gt * db, sin))
    cross = divide(d_cos, norms)
    d_t = b * g + cross * r - tl.where(linear, 0.0, divide(d_cos * cos, tt)) * t
    d_r = a * g + cross * t - tl.where(linear, 0.0, divide(d_cos * cos, rr)) * r
    d_w = tl.where(linear, gt - gr, divide((gt * cos_b - gr * cos_a) * omega, sin))
    return d_t, d_r, d_w


@triton.jit
def _load(ptr, row, N, o, m):
    return tl.load(ptr + row * N + o, mask=m, other=0.0).to(tl.float32)


@triton.jit
def slerp_row(
    t_ptr, r_ptr, w_ptr, out_ptr, N, rows_per_w, PARALLEL: tl.constexpr, ANTIPODAL: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    o = tl.arange(0, BLOCK)
    m = o < N
    t, r = _load(t_ptr, row, N, o, m), _load(r_ptr, row, N, o, m)
    w = tl.load(w_ptr + row // rows_per_w).to(tl.float32)
    out = _blend(t, r, w, tl.sum(t * t), tl.sum(r * r), tl.sum(t * r), PARALLEL, ANTIPODAL)
    tl.store(out_ptr + row * N + o, cast(out, out_ptr.dtype.element_ty), mask=m)


@triton.jit
def slerp_row_backward(
    t_ptr, r_ptr, g_ptr, w_ptr, dt_ptr, dr_ptr, dw_ptr, N, rows_per_w,
    PARALLEL: tl.constexpr, ANTIPODAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    o = tl.arange(0, BLOCK)
    m = o < N
    t, r, g = _load(t_ptr, row, N, o, m), _load(r_ptr, row, N, o, m), _load(g_ptr, row, N, o, m)
    w = tl.load(w_ptr + row // rows_per_w).to(tl.float32)
    d_t, d_r, d_w = _gradients(
        t, r, g, w, tl.sum(t * t), tl.sum(r * r), tl.sum(t * r), tl.sum(g * t), tl.sum(g * r), PARALLEL, ANTIPODAL
    )
    tl.store(dt_ptr + row * N + o, cast(d_t, dt_ptr.dtype.element_ty), mask=m)
    tl.store(dr_ptr + row * N + o, cast(d_r, dr_ptr.dtype.element_ty), mask=m)
    tl.store(dw_ptr + row, d_w)


@triton.jit
def slerp_sums(t_ptr, r_ptr, g_ptr, sums_ptr, N, BACKWARD: tl.constexpr, BLOCK: tl.constexpr):
    """The inner products of one chunk of one row, to sums[row, :, chunk]: ⟨t,t⟩ ⟨r,r⟩ ⟨t,r⟩, and ⟨g,t⟩ ⟨g,r⟩."""
    row, chunk, chunks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    o = chunk * BLOCK + tl.arange(0, BLOCK)
    m = o < N
    t, r = _load(t_ptr, row, N, o, m), _load(r_ptr, row, N, o, m)
    p_sums = sums_ptr + row * 5 * chunks + chunk
    tl.store(p_sums, tl.sum(t * t))
    tl.store(p_sums + chunks, tl.sum(r * r))
    tl.store(p_sums + 2 * chunks, tl.sum(t * r))
    if BACKWARD:
        g = _load(g_ptr, row, N, o, m)
        tl.store(p_sums + 3 * chunks, tl.sum(g * t))
        tl.store(p_sums + 4 * chunks, tl.sum(g * r))


@triton.jit
def _total(sums_ptr, row, chunks, which: tl.constexpr, CHUNKS: tl.constexpr):
    i = tl.arange(0, CHUNKS)
    return tl.sum(tl.load(sums_ptr + (row * 5 + which) * chunks + i, mask=i < chunks, other=0.0))


@triton.jit
def slerp_blend(
    t_ptr, r_ptr, w_ptr, sums_ptr, out_ptr, N,
    PARALLEL: tl.constexpr, ANTIPODAL: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, chunk, chunks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    o = chunk * BLOCK + tl.arange(0, BLOCK)
    m = o < N
    t, r = _load(t_ptr, row, N, o, m), _load(r_ptr, row, N, o, m)
    w = tl.load(w_ptr + row).to(tl.float32)
    tt, rr = _total(sums_ptr, row, chunks, 0, CHUNKS), _total(sums_ptr, row, chunks, 1, CHUNKS)
    tr = _total(sums_ptr, row, chunks, 2, CHUNKS)
    out = _blend(t, r, w, tt, rr, tr, PARALLEL, ANTIPODAL)
    tl.store(out_ptr + row * N + o, cast(out, out_ptr.dtype.element_ty), mask=m)


@triton.jit
def slerp_blend_backward(
    t_ptr, r_ptr, g_ptr, w_ptr, sums_ptr, dt_ptr, dr_ptr, dw_ptr, N,
    PARALLEL: tl.constexpr, ANTIPODAL: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, chunk, chunks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    o = chunk * BLOCK + tl.arange(0, BLOCK)
    m = o < N
    t, r, g = _load(t_ptr, row, N, o, m), _load(r_ptr, row, N, o, m), _load(g_ptr, row, N, o, m)
    w = tl.load(w_ptr + row).to(tl.float32)
    tt, rr = _total(sums_ptr, row, chunks, 0, CHUNKS), _total(sums_ptr, row, chunks, 1, CHUNKS)
    tr, gt = _total(sums_ptr, row, chunks, 2, CHUNKS), _total(sums_ptr, row, chunks, 3, CHUNKS)
    gr = _total(sums_ptr, row, chunks, 4, CHUNKS)
    d_t, d_r, d_w = _gradients(t, r, g, w, tt, rr, tr, gt, gr, PARALLEL, ANTIPODAL)
    tl.store(dt_ptr + row * N + o, cast(d_t, dt_ptr.dtype.element_ty), mask=m)
    tl.store(dr_ptr + row * N + o, cast(d_r, dr_ptr.dtype.element_ty), mask=m)
    if chunk == 0:
        tl.store(dw_ptr + row, d_w)


def _rows(h: Tensor, token: bool) -> tuple[int, int]:
    """(rows, elements a row): a row is a token or an image."""
    n = h.shape[-1] if token else h[0].numel()
    return h.numel() // n, n


def _tile(n: int, h: Tensor) -> tiles.Tile:
    default = {"BLOCK": 2048, "ONE_PASS": ONE_PASS, "num_warps": 4}
    return dict(tiles.choose("slerp", f"N{n} {h.dtype}", h.device, default))


def forward(h_tgt: Tensor, h_retr: Tensor, w: Tensor, token: bool, parallel: float, antipodal: float) -> Tensor:
    """h_tgt, h_retr: (B, …, C); w: (B,) -> contiguous (B, …, C)."""
    t, r, w = h_tgt.contiguous(), h_retr.contiguous(), w.contiguous()
    out = torch.empty_like(t, memory_format=torch.contiguous_format)
    rows, n = _rows(t, token)
    tile = _tile(n, t)
    guards = {"PARALLEL": parallel, "ANTIPODAL": antipodal}
    if n <= tile.pop("ONE_PASS"):
        block = tiles.power_of_2(n)
        warps = 8 if block > 4096 else 4
        launch(slerp_row, (rows,), t, r, w, out, n, rows // w.shape[0], **guards, BLOCK=block, num_warps=warps)
        return out
    chunks = triton.cdiv(n, tile["BLOCK"])
    sums = torch.empty(rows, 5, chunks, dtype=torch.float32, device=t.device)
    launch(slerp_sums, (rows, chunks), t, r, t, sums, n, BACKWARD=False, **tile)
    launch(slerp_blend, (rows, chunks), t, r, w, sums, out, n, **guards, CHUNKS=tiles.power_of_2(chunks), **tile)
    return out


def backward(
    g: Tensor, h_tgt: Tensor, h_retr: Tensor, w: Tensor, token: bool, parallel: float, antipodal: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of h_tgt, h_retr (contiguous) and w (fp32) from the gradient g of the blend."""
    g, t, r, w = g.contiguous(), h_tgt.contiguous(), h_retr.contiguous(), w.contiguous()
    d_t, d_r = (torch.empty_like(t, memory_format=torch.contiguous_format) for _ in range(2))
    rows, n = _rows(t, token)
    d_w = torch.empty(rows, dtype=torch.float32, device=t.device)
    tile = _tile(n, t)
    guards = {"PARALLEL": parallel, "ANTIPODAL": antipodal}
    if n <= tile.pop("ONE_PASS"):
        block = tiles.power_of_2(n)
        per_w = rows // w.shape[0]
        launch(slerp_row_backward, (rows,), t, r, g, w, d_t, d_r, d_w, n, per_w, **guards, BLOCK=block, num_warps=8)
    else:
        chunks = triton.cdiv(n, tile["BLOCK"])
        sums = torch.empty(rows, 5, chunks, dtype=torch.float32, device=t.device)
        launch(slerp_sums, (rows, chunks), t, r, g, sums, n, BACKWARD=True, **tile)
        launch(
            slerp_blend_backward, (rows, chunks), t, r, g, w, sums, d_t, d_r, d_w, n,
            **guards, CHUNKS=tiles.power_of_2(chunks), **tile,
        )  # fmt: skip
    return d_t, d_r, d_w.view(w.shape[0], -1).sum(1)
