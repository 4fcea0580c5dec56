"""Spherical interpolation of H-space features, Eq. 3.

    out = sin((1-w)Ω)/sin Ω · h_retr  +  sin(wΩ)/sin Ω · h_tgt,      Ω = arccos ⟨h_retr/|h_retr|, h_tgt/|h_tgt|⟩

Ω is the angle of the unit vectors. The raw features are blended, so that w = 1 gives h_tgt and w = 0 gives h_retr,
norms included.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ragturbo.errors import InvalidRequest
from ragturbo.ops import dispatch
from ragturbo.ops.scaled_residual import per_sample

# Below this 1 - cos Ω, slerp and lerp agree to fp32 rounding, and lerp has no 0/0.
PARALLEL = 1e-6
# Below this 1 + cos Ω, the great circle is nearly undefined and 1/sin Ω amplifies rounding: also lerp.
ANTIPODAL = 1e-3


def slerp(h_tgt: Tensor, h_retr: Tensor, w: Tensor | float, per: str = "sample", impl: str = "auto") -> Tensor:
    """Eq. 3. h_tgt, h_retr: (B, …, C); w: float or (B,) in [0, 1], the weight of the target -> (B, …, C).

    per "sample": one Ω over all tokens and channels of an image; "token": one Ω per token. For (nearly) parallel,
    opposite or zero vectors the blend is linear. NaN propagates within its sample or token.
    """
    if h_tgt.shape != h_retr.shape or h_tgt.ndim < 2:
        raise InvalidRequest(f"slerp: h_tgt is {tuple(h_tgt.shape)}, h_retr is {tuple(h_retr.shape)}")
    if h_tgt.dtype != h_retr.dtype or h_tgt.device != h_retr.device:
        raise InvalidRequest(
            f"slerp: h_tgt is {h_tgt.dtype} on {h_tgt.device}, h_retr is {h_retr.dtype} on {h_retr.device}"
        )
    if per not in ("sample", "token"):
        raise InvalidRequest(f"slerp: per={per!r}; known: 'sample', 'token'")
    if not isinstance(w, Tensor) and not 0.0 <= w <= 1.0:
        raise InvalidRequest(f"slerp: w={w} is outside [0, 1]")
    weight = per_sample("w", w, h_tgt)
    if dispatch.choose("slerp", impl, h_tgt.device.type, h_tgt.dtype) == "triton":
        return _triton(h_tgt, h_retr, weight, per == "token")
    return reference(h_tgt, h_retr, weight, per)


def reference(h_tgt: Tensor, h_retr: Tensor, w: Tensor, per: str = "sample") -> Tensor:
    """Eq. 3 in plain torch, computed in fp32 (fp64 for fp64)."""
    dtype = dispatch.compute_dtype(h_tgt.dtype)
    dims = tuple(range(1, h_tgt.ndim)) if per == "sample" else (h_tgt.ndim - 1,)
    t, r = h_tgt.to(dtype), h_retr.to(dtype)
    a, b = coefficients(
        (t * t).sum(dims, keepdim=True),
        (r * r).sum(dims, keepdim=True),
        (t * r).sum(dims, keepdim=True),
        w.to(dtype).reshape(-1, *[1] * (t.ndim - 1)),
    )
    return (a * r + b * t).to(h_tgt.dtype)


def coefficients(tt: Tensor, rr: Tensor, tr: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """The weights (of h_retr, of h_tgt) of Eq. 3 from the inner products ⟨t,t⟩, ⟨r,r⟩, ⟨t,r⟩."""
    # A subnormal squared norm has lost digits, and a GPU may flush it to 0.
    tiny = torch.finfo(tt.dtype).tiny
    zero = (tt < tiny) | (rr < tiny)
    one = torch.ones_like(tt)
    # √tt·√rr, because tt·rr can overflow fp32; and √1 instead of √0, whose gradient is infinite.
    cos = tr / (torch.where(zero, one, tt).sqrt() * torch.where(zero, one, rr).sqrt())
    linear = zero | (cos > 1 - PARALLEL) | (cos < ANTIPODAL - 1)
    # With Ω = π/2 in place of the linear cases, the branch not taken has no infinite gradient.
    safe = torch.where(linear, torch.zeros_like(cos), cos)
    omega = torch.acos(safe)
    sin = torch.sin(omega)
    a = torch.where(linear, 1 - w, torch.sin((1 - w) * omega) / sin)
    b = torch.where(linear, w, torch.sin(w * omega) / sin)
    return a, b


@torch.library.custom_op("ragturbo::slerp", mutates_args=())
def _triton(h_tgt: Tensor, h_retr: Tensor, w: Tensor, token: bool) -> Tensor:
    from ragturbo.kernels import slerp as kernels

    return kernels.forward(h_tgt, h_retr, w, token, PARALLEL, ANTIPODAL)


@_triton.register_fake
def _(h_tgt: Tensor, h_retr: Tensor, w: Tensor, token: bool) -> Tensor:
    return torch.empty_like(h_tgt, memory_format=torch.contiguous_format)


@torch.library.custom_op("ragturbo::slerp_backward", mutates_args=())
def _triton_backward(g: Tensor, h_tgt: Tensor, h_retr: Tensor, w: Tensor, token: bool) -> tuple[Tensor, Tensor, Tensor]:
    from ragturbo.kernels import slerp as kernels

    return kernels.backward(g, h_tgt, h_retr, w, token, PARALLEL, ANTIPODAL)


@_triton_backward.register_fake
def _(g: Tensor, h_tgt: Tensor, h_retr: Tensor, w: Tensor, token: bool) -> tuple[Tensor, Tensor, Tensor]:
    d_t, d_r = (torch.empty_like(h_tgt, memory_format=torch.contiguous_format) for _ in range(2))
    return d_t, d_r, torch.empty_like(w, dtype=torch.float32)


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.token = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, g: Tensor):
    h_tgt, h_retr, w = ctx.saved_tensors
    d_t, d_r, d_w = _triton_backward(g, h_tgt, h_retr, w, ctx.token)
    return d_t, d_r, d_w.to(w.dtype), None


_triton.register_autograd(_backward, setup_context=_save)
