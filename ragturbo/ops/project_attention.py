"""The queries of Eq. 4 and their attention together: Q = LN(h_tgt) W_Qᵀ, softmax(Q Kᵀ / √d) V."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ragturbo.errors import InvalidRequest
from ragturbo.ops import dispatch
from ragturbo.ops.cross_attention import check
from ragturbo.ops.cross_attention import reference as attend
from ragturbo.ops.linear import Norm, normalised


def project_attention(
    x: Tensor,
    to_q: Tensor,
    k: Tensor,
    v: Tensor,
    valid: Tensor | None = None,
    *,
    heads: int,
    norm: Norm | None = None,
    impl: str = "auto",
) -> Tensor:
    """x: (B, T, K); to_q: (C, K); k, v: (B, n, S, C); valid: (B, n) bool -> (B, T, C). norm: a LayerNorm of x.

    As `cross_attention` of the projected queries, in one launch. Forward only.
    """
    if x.ndim != 3 or to_q.ndim != 2 or to_q.shape[1] != x.shape[2] or (norm is not None and norm.groups):
        raise InvalidRequest(
            f"project_attention takes x (B, T, K), to_q (C, K) and a LayerNorm: got {tuple(x.shape)}, "
            f"{tuple(to_q.shape)}, groups={norm.groups if norm else 0}"
        )
    check(x.new_empty(x.shape[0], x.shape[1], to_q.shape[0]), k, v, valid, heads)
    if dispatch.choose("project_attention", impl, x.device.type, x.dtype, x, to_q, k, v) == "triton":
        weight, bias, eps, _ = norm or (None, None, 0.0, 0)
        return _triton(x, to_q, weight, bias, eps, k, v, valid, heads)
    return reference(x, to_q, k, v, valid, heads, norm)


def reference(
    x: Tensor, to_q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, heads: int, norm: Norm | None
) -> Tensor:
    """The same in plain torch, computed in fp32 (fp64 for fp64)."""
    dtype = dispatch.compute_dtype(x.dtype)
    q = F.linear(normalised(x.to(dtype), norm), to_q.to(dtype))
    return attend(q, k, v, valid, heads).to(x.dtype)


@torch.library.custom_op("ragturbo::project_attention", mutates_args=())
def _triton(
    x: Tensor,
    to_q: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    k: Tensor,
    v: Tensor,
    valid: Tensor | None,
    heads: int,
) -> Tensor:
    from ragturbo.kernels import cross_attention as kernels

    return kernels.project(x, to_q, norm_weight, norm_bias, eps, k, v, valid, heads)


@_triton.register_fake
def _(x, to_q, norm_weight, norm_bias, eps, k, v, valid, heads) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], to_q.shape[0])
