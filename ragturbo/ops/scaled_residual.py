"""The λ-scaled residual of Eq. 5: h + λ·Δh, with one λ per sample, read from device memory."""

from __future__ import annotations

import torch
from torch import Tensor

from ragturbo.errors import InvalidRequest
from ragturbo.ops import dispatch


def scaled_residual(h: Tensor, delta: Tensor, lam: Tensor | float, impl: str = "auto", inplace: bool = False) -> Tensor:
    """Eq. 5: h + lam[b]·delta. h, delta: (B, …); lam: float or (B,) -> h's shape, dtype and memory order.

    λ = 0 returns h bit for bit, even if delta is NaN. `inplace` writes into h and returns it.
    """
    if h.shape != delta.shape or h.ndim < 2:
        raise InvalidRequest(f"scaled_residual: h is {tuple(h.shape)}, delta is {tuple(delta.shape)}")
    if h.device != delta.device:
        raise InvalidRequest(f"scaled_residual: h is on {h.device}, delta on {delta.device}")
    scale = per_sample("lam", lam, h)
    if dispatch.choose("scaled_residual", impl, h.device.type, h.dtype) == "triton":
        if inplace and not dispatch.wants_grad(h, delta, scale):
            _triton_inplace(h, delta, scale)
            return h
        out = _triton(h, delta, scale)
    else:
        out = reference(h, delta, scale)
    return h.copy_(out) if inplace else out


def per_sample(name: str, value: Tensor | float, h: Tensor) -> Tensor:
    """A scalar argument as one number per sample of h, (B,)."""
    if not isinstance(value, Tensor):
        return torch.full((h.shape[0],), value, dtype=dispatch.compute_dtype(h.dtype), device=h.device)
    if value.shape != (h.shape[0],):
        raise InvalidRequest(f"{name} has shape {tuple(value.shape)}, one per sample is ({h.shape[0]},)")
    return value


def reference(h: Tensor, delta: Tensor, lam: Tensor) -> Tensor:
    """Eq. 5 in plain torch, computed in fp32 (fp64 for fp64)."""
    dtype = dispatch.compute_dtype(h.dtype)
    scale = lam.to(dtype).reshape(-1, *[1] * (h.ndim - 1))
    # Adding 0·delta would turn -0.0 into 0.0 and propagate NaN.
    return torch.where(scale == 0, h, (h.to(dtype) + scale * delta.to(dtype)).to(h.dtype))


@torch.library.custom_op("ragturbo::scaled_residual", mutates_args=())
def _triton(h: Tensor, delta: Tensor, lam: Tensor) -> Tensor:
    from ragturbo.kernels import scaled_residual as kernels

    return kernels.forward(h, delta, lam)


@_triton.register_fake
def _(h: Tensor, delta: Tensor, lam: Tensor) -> Tensor:
    return torch.empty_like(h)


@torch.library.custom_op("ragturbo::scaled_residual_", mutates_args=("h",))
def _triton_inplace(h: Tensor, delta: Tensor, lam: Tensor) -> None:
    from ragturbo.kernels import scaled_residual as kernels

    kernels.forward(h, delta, lam, inplace=True)


@torch.library.custom_op("ragturbo::scaled_residual_backward", mutates_args=())
def _triton_backward(g: Tensor, delta: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
    from ragturbo.kernels import scaled_residual as kernels

    return kernels.backward(g, delta, lam)


@_triton_backward.register_fake
def _(g: Tensor, delta: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(delta), torch.empty_like(lam, dtype=torch.float32)


def _save(ctx, inputs, output) -> None:
    _, delta, lam = inputs
    ctx.save_for_backward(delta, lam)


def _backward(ctx, g: Tensor):
    delta, lam = ctx.saved_tensors
    d_delta, d_lam = _triton_backward(g, delta, lam)
    return g, d_delta, d_lam.to(lam.dtype)


_triton.register_autograd(_backward, setup_context=_save)
