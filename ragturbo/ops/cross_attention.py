"""The attention of Eq. 4: softmax(Q Kᵀ / √d) V over the concatenated tokens of the valid neighbours."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ragturbo.errors import InvalidRequest
from ragturbo.ops import dispatch


def cross_attention(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None = None, *, heads: int, impl: str = "auto"
) -> Tensor:
    """Eq. 4. q: (B, T, C); k, v: (B, n, S, C), n neighbours of S tokens; valid: (B, n) bool -> (B, T, C) of q's dtype.

    Invalid neighbours are ignored, and their memory may be uninitialised. A sample without valid ones gets zeros.
    """
    check(q, k, v, valid, heads)
    name = dispatch.choose("cross_attention", impl, q.device.type, q.dtype)
    if name == "triton":
        return _triton(q, k, v, valid, heads)[0]
    run = _compiled() if name == "compile" else {"reference": reference, "sdpa": sdpa, "xformers": xformers}[name]
    return run(q, k, v, valid, heads)


def check(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, heads: int) -> None:
    """Raise InvalidRequest unless the shapes are those of `cross_attention`."""
    batch, _, channels = q.shape if q.ndim == 3 else (-1, -1, -1)
    if q.ndim != 3 or k.ndim != 4 or k.shape != v.shape or k.shape[0] != batch or k.shape[3] != channels:
        raise InvalidRequest(
            "cross_attention takes q (B, T, C) and k, v (B, n, S, C): "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if channels % heads:
        raise InvalidRequest(f"cross_attention: {channels} channels do not divide into {heads} heads")
    if valid is not None and (valid.shape != k.shape[:2] or valid.dtype != torch.bool):
        raise InvalidRequest(
            f"valid must be bool of shape {tuple(k.shape[:2])}, got {valid.dtype} of {tuple(valid.shape)}"
        )


def _split(x: Tensor, heads: int) -> Tensor:
    """(B, L, C) -> (B, heads, L, d)"""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _concatenated(k: Tensor, v: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """(B, n, S, C) -> (B, n·S, C), with invalid neighbours zeroed, and the mask (B, 1, 1, n·S)."""
    if valid is None:
        return k.flatten(1, 2), v.flatten(1, 2), None
    keep = valid[:, :, None, None]
    mask = valid[:, None, None, :, None].expand(-1, 1, 1, -1, k.shape[2]).flatten(3)
    return k.masked_fill(~keep, 0).flatten(1, 2), v.masked_fill(~keep, 0).flatten(1, 2), mask


def reference(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, heads: int) -> Tensor:
    """Eq. 4 in plain torch, computed in fp32 (fp64 for fp64)."""
    dtype = dispatch.compute_dtype(q.dtype)
    k, v, mask = _concatenated(k.to(dtype), v.to(dtype), valid)
    query, key, value = (_split(x, heads) for x in (q.to(dtype), k, v))
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    if mask is not None:
        # Not -inf: softmax of a fully masked row would be NaN, and so would its gradient.
        scores = scores.masked_fill(~mask, torch.finfo(dtype).min)
    weights = torch.softmax(scores, dim=-1)
    if mask is not None:
        weights = weights * mask
    return (weights @ value).transpose(1, 2).flatten(2).to(q.dtype)


def sdpa(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, heads: int) -> Tensor:
    """Eq. 4 by torch's scaled_dot_product_attention, in the storage dtype."""
    k, v, mask = _concatenated(k, v, valid)
    # Without a valid neighbour, attend to all of them: their values were zeroed above.
    if mask is not None:
        mask = mask | ~mask.any(-1, keepdim=True)
    out = F.scaled_dot_product_attention(_split(q, heads), _split(k, heads), _split(v, heads), attn_mask=mask)
    return out.transpose(1, 2).flatten(2)


def xformers(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, heads: int) -> Tensor:
    """Eq. 4 by xformers' memory-efficient attention, in the storage dtype."""
    from xformers.ops import memory_efficient_attention

    k, v, mask = _concatenated(k, v, valid)
    bias = None
    if mask is not None:
        allowed = (mask | ~mask.any(-1, keepdim=True)).expand(-1, heads, q.shape[1], -1)
        bias = torch.zeros(allowed.shape, dtype=q.dtype, device=q.device).masked_fill(~allowed, float("-inf"))
    try:
        out = memory_efficient_attention(*(x.unflatten(-1, (heads, -1)) for x in (q, k, v)), attn_bias=bias)
    except NotImplementedError as error:
        # xformers can be imported with a torch that its kernels were not built for.
        raise InvalidRequest(f"cross_attention(impl='xformers'): xformers has no kernel here: {error}") from error
    return out.flatten(2)


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    # On first use: torch.compile imports its compiler, which takes seconds.
    return torch.compile(reference)


@torch.library.custom_op("ragturbo::cross_attention", mutates_args=())
def _triton(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, heads: int) -> tuple[Tensor, Tensor]:
    """The output, and for backward each query's maximum score and 1 / Σ p, (B, heads, 2, T)."""
    from ragturbo.kernels import cross_attention as kernels

    return kernels.forward(q, k, v, valid, heads)


@_triton.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, heads: int) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, q.new_empty(q.shape[0], heads, 2, q.shape[1], dtype=torch.float32)


@torch.library.custom_op("ragturbo::cross_attention_backward", mutates_args=())
def _triton_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, out: Tensor, softmax: Tensor, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    from ragturbo.kernels import cross_attention_backward as kernels

    return kernels.backward(g, q, k, v, valid, out, softmax, heads)


@_triton_backward.register_fake
def _(g, q, k, v, valid, out, softmax, heads) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return dq, dk, dv


def _save(ctx, inputs, output) -> None:
    q, k, v, valid, ctx.heads = inputs
    ctx.save_for_backward(q, k, v, valid, *output)


def _backward(ctx, g: Tensor, _softmax: Tensor | None):
    q, k, v, valid, out, softmax = ctx.saved_tensors
    return *_triton_backward(g, q, k, v, valid, out, softmax, ctx.heads), None, None


_triton.register_autograd(_backward, setup_context=_save)
