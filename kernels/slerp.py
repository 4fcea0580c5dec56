"""Eq. 3 on the GPU, forward and backward.

A row shares one Ω: a token's channels, or an image's tokens and channels. A row that fits in one program is read once;
the inner products of a longer one are summed in chunks by a first launch, and a second blends.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ragturbo.kernels import pdl, tiles
from ragturbo.kernels.launch import launch
from ragturbo.kernels.portable import cast, divide

# A row of up to this many elements, of two or three tensors, fits in one program's registers without spilling.
ONE_PASS = 8192

# The smallest normal fp32.
_TINY = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def _arccos(x):
    """arccos to fp32 rounding: π/2 - arcsin x; near ±1, where this cancels, 2·arcsin √((1-|x|)/2)."""
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


# tl.sin and tl.cos reduce arguments of any size, which takes a stack frame; the angles of Eq. 3 are in [0, π].
@triton.jit
def _sin(x):
    # π to 48 bits: sin near π is the difference of the two.
    return _sin_near_0(tl.minimum(x, (3.1415927410125732 - x) - 8.742277657347586e-08))


@triton.jit
def _cos(x):
    return _sin_near_0((1.5707963705062866 - x) - 4.371138828673793e-08)


@triton.jit
def _angle(tt, rr, tr, PARALLEL: tl.constexpr, ANTIPODAL: tl.constexpr):
    """cos Ω, Ω (π/2 if the blend is linear), |t||r| and whether the blend is linear."""
    # A subnormal squared norm has lost digits, and a GPU may flush it to 0.
    zero = (tt < _TINY) | (rr < _TINY)
    norms = tl.where(zero, 1.0, tl.sqrt_rn(tt) * tl.sqrt_rn(rr))
    cos = divide(tr, norms)
    linear = zero | (cos > 1 - PARALLEL) | (cos < ANTIPODAL - 1)
    cos = tl.where(linear, 0.0, cos)
    return cos, _arccos(cos), norms, linear


@triton.jit
def _load(ptr, row, N, o, m):
    return tl.load(ptr + row * N + o, mask=m, other=0.0).to(tl.float32)


@triton.jit
def slerp_sums(t_ptr, r_ptr, g_ptr, sums_ptr, N, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Program (row, chunk): ⟨t,t⟩ ⟨r,r⟩ ⟨t,r⟩, and ⟨g,t⟩ ⟨g,r⟩ unless g is None -> sums[row, :, chunk]."""
    row, chunk, chunks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    o = chunk * BLOCK + tl.arange(0, BLOCK)
    m = o < N
    pdl.wait(PDL)
    t, r = _load(t_ptr, row, N, o, m), _load(r_ptr, row, N, o, m)
    p_sums = sums_ptr + row * 5 * chunks + chunk
    tl.store(p_sums, tl.sum(t * t))
    tl.store(p_sums + chunks, tl.sum(r * r))
    tl.store(p_sums + 2 * chunks, tl.sum(t * r))
    if g_ptr is not None:
        g = _load(g_ptr, row, N, o, m)
        tl.store(p_sums + 3 * chunks, tl.sum(g * t))
        tl.store(p_sums + 4 * chunks, tl.sum(g * r))


@triton.jit
def _product(x, y, sums_ptr, row, which: tl.constexpr, CHUNKS: tl.constexpr):
    """⟨x,y⟩ of a row: of x and y themselves if sums is None, else the total of the row's chunks."""
    if sums_ptr is None:
        product = tl.sum(x * y)
    else:
        chunks = tl.num_programs(1)
        i = tl.arange(0, CHUNKS)
        product = tl.sum(tl.load(sums_ptr + (row * 5 + which) * chunks + i, mask=i < chunks, other=0.0))
    return product


@triton.jit
def slerp_blend(
    t_ptr, r_ptr, w_ptr, sums_ptr, out_ptr, N, rows_per_w,
    PARALLEL: tl.constexpr, ANTIPODAL: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (row, chunk). sums is None if a row is one chunk."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o = chunk * BLOCK + tl.arange(0, BLOCK)
    m = o < N
    pdl.wait(PDL)
    t, r = _load(t_ptr, row, N, o, m), _load(r_ptr, row, N, o, m)
    w = tl.load(w_ptr + row // rows_per_w).to(tl.float32)
    tt, rr = _product(t, t, sums_ptr, row, 0, CHUNKS), _product(r, r, sums_ptr, row, 1, CHUNKS)
    tr = _product(t, r, sums_ptr, row, 2, CHUNKS)
    cos, omega, norms, linear = _angle(tt, rr, tr, PARALLEL, ANTIPODAL)
    sin = _sin(omega)
    a = tl.where(linear, 1 - w, divide(_sin((1 - w) * omega), sin))
    b = tl.where(linear, w, divide(_sin(w * omega), sin))
    tl.store(out_ptr + row * N + o, cast(a * r + b * t, out_ptr.dtype.element_ty), mask=m)


@triton.jit
def slerp_blend_backward(
    t_ptr, r_ptr, g_ptr, w_ptr, sums_ptr, dt_ptr, dr_ptr, dw_ptr, N, rows_per_w,
    PARALLEL: tl.constexpr, ANTIPODAL: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (row, chunk): dL/dt, dL/dr and, of each row, dL/dw from the incoming gradient g."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o = chunk * BLOCK + tl.arange(0, BLOCK)
    m = o < N
    t, r, g = _load(t_ptr, row, N, o, m), _load(r_ptr, row, N, o, m), _load(g_ptr, row, N, o, m)
    w = tl.load(w_ptr + row // rows_per_w).to(tl.float32)
    tt, rr = _product(t, t, sums_ptr, row, 0, CHUNKS), _product(r, r, sums_ptr, row, 1, CHUNKS)
    tr, gt = _product(t, r, sums_ptr, row, 2, CHUNKS), _product(g, t, sums_ptr, row, 3, CHUNKS)
    gr = _product(g, r, sums_ptr, row, 4, CHUNKS)
    cos, omega, norms, linear = _angle(tt, rr, tr, PARALLEL, ANTIPODAL)
    sin = _sin(omega)
    sin_a, cos_a = _sin((1 - w) * omega), _cos((1 - w) * omega)
    sin_b, cos_b = _sin(w * omega), _cos(w * omega)
    a = tl.where(linear, 1 - w, divide(sin_a, sin))
    b = tl.where(linear, w, divide(sin_b, sin))
    da = divide((1 - w) * cos_a - divide(sin_a * cos, sin), sin)
    db = divide(w * cos_b - divide(sin_b * cos, sin), sin)
    # dL/dcos Ω; a linear blend does not depend on Ω.
    d_cos = tl.where(linear, 0.0, -divide(gr * da + gt * db, sin))
    cross = divide(d_cos, norms)
    d_t = b * g + cross * r - tl.where(linear, 0.0, divide(d_cos * cos, tt)) * t
    d_r = a * g + cross * t - tl.where(linear, 0.0, divide(d_cos * cos, rr)) * r
    tl.store(dt_ptr + row * N + o, cast(d_t, dt_ptr.dtype.element_ty), mask=m)
    tl.store(dr_ptr + row * N + o, cast(d_r, dr_ptr.dtype.element_ty), mask=m)
    if chunk == 0:
        tl.store(dw_ptr + row, tl.where(linear, gt - gr, divide((gt * cos_b - gr * cos_a) * omega, sin)))


def _sums(t: Tensor, r: Tensor, g: Tensor | None, token: bool) -> tuple[int, int, int, Tensor | None, tiles.Tile]:
    """(rows, elements per row, chunks per row, the chunks' inner products or None if a row is one chunk, tile)."""
    n = t.shape[-1] if token else t[0].numel()
    rows = t.numel() // n
    default = {"BLOCK": 2048, "ONE_PASS": ONE_PASS, "num_warps": 4}
    tile = dict(tiles.choose("slerp", f"N{n} {t.dtype}", t.device, default))
    if n <= tile.pop("ONE_PASS"):
        block = tiles.power_of_2(n)
        return rows, n, 1, None, {"BLOCK": block, "num_warps": 8 if g is not None or block > 4096 else 4}
    chunks = triton.cdiv(n, tile["BLOCK"])
    sums = torch.empty(rows, 5, chunks, dtype=torch.float32, device=t.device)
    launch(slerp_sums, (rows, chunks), t, r, g, sums, n, **tile)
    return rows, n, chunks, sums, tile


def forward(h_tgt: Tensor, h_retr: Tensor, w: Tensor, token: bool, parallel: float, antipodal: float) -> Tensor:
    """h_tgt, h_retr: (B, …, C); w: (B,) -> contiguous (B, …, C)."""
    t, r, w = h_tgt.contiguous(), h_retr.contiguous(), w.contiguous()
    out = torch.empty_like(t, memory_format=torch.contiguous_format)
    rows, n, chunks, sums, tile = _sums(t, r, None, token)
    launch(
        slerp_blend, (rows, chunks), t, r, w, sums, out, n, rows // w.shape[0],
        PARALLEL=parallel, ANTIPODAL=antipodal, CHUNKS=tiles.power_of_2(chunks), **tile,
    )  # fmt: skip
    return out


def backward(
    g: Tensor, h_tgt: Tensor, h_retr: Tensor, w: Tensor, token: bool, parallel: float, antipodal: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of h_tgt, h_retr (contiguous) and w (fp32) from the output's gradient g."""
    g, t, r, w = g.contiguous(), h_tgt.contiguous(), h_retr.contiguous(), w.contiguous()
    d_t, d_r = (torch.empty_like(t, memory_format=torch.contiguous_format) for _ in range(2))
    rows, n, chunks, sums, tile = _sums(t, r, g, token)
    d_w = torch.empty(rows, dtype=torch.float32, device=t.device)
    launch(
        slerp_blend_backward, (rows, chunks), t, r, g, w, sums, d_t, d_r, d_w, n, rows // w.shape[0],
        PARALLEL=parallel, ANTIPODAL=antipodal, CHUNKS=tiles.power_of_2(chunks), **tile,
    )  # fmt: skip
    return d_t, d_r, d_w.view(w.shape[0], -1).sum(1)
