"""The query projection of Eq. 4 and its attention in one launch: Q = h_tgt W_Qᵀ, softmax(Q Kᵀ / √d) V."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ragturbo.errors import InvalidRequest
from ragturbo.ops import dispatch
from ragturbo.ops.cross_attention import check
from ragturbo.ops.cross_attention import reference as attend


def project_attention(
    x: Tensor, to_q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None = None, *, heads: int, impl: str = "auto"
) -> Tensor:
    """`cross_attention` of the projected queries. Forward only.

    x: (B, T, K); to_q: (C, K); k, v: (B, n, S, C); valid: (B, n) bool -> (B, T, C).
    """
    if x.ndim != 3 or to_q.ndim != 2 or to_q.shape[1] != x.shape[2]:
        raise InvalidRequest(
            f"project_attention takes x (B, T, K) and to_q (C, K): got {tuple(x.shape)}, {tuple(to_q.shape)}"
        )
    check(x.new_empty(x.shape[0], x.shape[1], to_q.shape[0]), k, v, valid, heads)
    if dispatch.choose("project_attention", impl, x.device.type, x.dtype, x, to_q, k, v) == "triton":
        return _triton(x, to_q, k, v, valid, heads)
    return reference(x, to_q, k, v, valid, heads)


def reference(x: Tensor, to_q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, heads: int) -> Tensor:
    """The same in plain torch, computed in fp32 (fp64 for fp64)."""
    dtype = dispatch.compute_dtype(x.dtype)
    return attend(F.linear(x.to(dtype), to_q.to(dtype)), k, v, valid, heads).to(x.dtype)


@torch.library.custom_op("ragturbo::project_attention", mutates_args=())
def _triton(x: Tensor, to_q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, heads: int) -> Tensor:
    from ragturbo.kernels import cross_attention as kernels

    return kernels.project(x, to_q, k, v, valid, heads)


@_triton.register_fake
def _(x, to_q, k, v, valid, heads) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], to_q.shape[0])
