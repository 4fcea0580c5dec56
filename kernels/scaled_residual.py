"""Eq. 5 on the GPU, h + λ[b]·delta, forward and backward, with λ read from device memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ragturbo.kernels import pdl, tiles
from ragturbo.kernels.launch import launch
from ragturbo.kernels.portable import cast


@triton.jit
def scaled_residual(h_ptr, delta_ptr, lam_ptr, out_ptr, N, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Program (sample, block of its N elements)."""
    i_b = tl.program_id(0).to(tl.int64)
    o = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m = o < N
    pdl.wait(PDL)
    lam = tl.load(lam_ptr + i_b).to(tl.float32)
    h = tl.load(h_ptr + i_b * N + o, mask=m)
    delta = tl.load(delta_ptr + i_b * N + o, mask=m).to(tl.float32)
    # Adding 0·delta would change -0.0 and propagate NaN.
    out = tl.where(lam == 0, h, cast(h.to(tl.float32) + lam * delta, h.dtype))
    tl.store(out_ptr + i_b * N + o, out, mask=m)


@triton.jit
def scaled_residual_backward(g_ptr, delta_ptr, lam_ptr, d_delta_ptr, d_lam_ptr, N, BLOCK: tl.constexpr):
    """Program (sample, block): λ·g, and the block's share of ⟨g, delta⟩ -> d_lam[b, block]; both 0 if λ is 0."""
    i_b = tl.program_id(0).to(tl.int64)
    o = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m = o < N
    lam = tl.load(lam_ptr + i_b).to(tl.float32)
    g = tl.load(g_ptr + i_b * N + o, mask=m, other=0.0).to(tl.float32)
    delta = tl.load(delta_ptr + i_b * N + o, mask=m, other=0.0).to(tl.float32)
    d_delta = tl.where(lam == 0, 0.0, lam * g)
    tl.store(d_delta_ptr + i_b * N + o, cast(d_delta, d_delta_ptr.dtype.element_ty), mask=m)
    tl.store(d_lam_ptr + i_b * tl.num_programs(1) + tl.program_id(1), tl.where(lam == 0, 0.0, tl.sum(g * delta)))


def _dense_by_sample(h: Tensor) -> bool:
    """Whether each sample is one dense block of memory in some order of dimensions: contiguous or channels_last."""
    n = 1
    for size, stride in sorted(zip(h.shape[1:], h.stride()[1:], strict=True), key=lambda dim: dim[1]):
        if size != 1:
            if stride != n:
                return False
            n *= size
    return h.shape[0] == 1 or h.stride(0) == n


def _like(h: Tensor, x: Tensor) -> Tensor:
    """x in the memory order of h."""
    if x.stride() == h.stride():
        return x
    return torch.empty_strided(h.shape, h.stride(), dtype=x.dtype, device=x.device).copy_(x)


def _grid(h: Tensor) -> tuple[int, tuple[int, int], tiles.Tile]:
    n = h[0].numel()
    tile = tiles.choose("scaled_residual", f"N{n} {h.dtype}", h.device, {"BLOCK": 2048, "num_warps": 4})
    return n, (h.shape[0], triton.cdiv(n, tile["BLOCK"])), tile


def forward(h: Tensor, delta: Tensor, lam: Tensor, inplace: bool = False) -> Tensor:
    """h, delta: (B, …); lam: (B,) -> as h, in h's memory order."""
    out = h if inplace else torch.empty_like(h)
    if not _dense_by_sample(out):
        return out.copy_(forward(h.contiguous(), delta, lam))
    n, grid, tile = _grid(out)
    launch(scaled_residual, grid, _like(out, h), _like(out, delta), lam.contiguous(), out, n, **tile)
    return out


def backward(g: Tensor, delta: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of delta (in its dtype) and lam (fp32) from the output's gradient g."""
    d_delta = torch.empty_like(delta)
    if not _dense_by_sample(d_delta):
        dense, d_lam = backward(g, delta.contiguous(), lam)
        return d_delta.copy_(dense), d_lam
    n, grid, tile = _grid(d_delta)
    shares = torch.empty(grid, dtype=torch.float32, device=delta.device)
    args = _like(d_delta, g), _like(d_delta, delta), lam.contiguous(), d_delta, shares, n
    launch(scaled_residual_backward, grid, *args, **tile)
    return d_delta, shares.sum(1)
