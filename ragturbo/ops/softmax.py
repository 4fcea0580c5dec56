"""Softmax of fp32 attention scores, with the probabilities in the model's type."""

from __future__ import annotations

import torch
from torch import Tensor

from ragturbo.errors import InvalidRequest
from ragturbo.ops import dispatch

_LONGEST = 16384


def softmax(scores: Tensor, scale: float, dtype: torch.dtype, impl: str = "auto") -> Tensor:
    """scores: (…, L) fp32; scale > 0 -> softmax(scale·scores) over L, rounded once to `dtype`. Forward only."""
    if scores.ndim < 1 or scores.numel() == 0 or scores.dtype != torch.float32 or scale <= 0:
        got = f"{scores.dtype} of {tuple(scores.shape)} and {scale}"
        raise InvalidRequest(f"softmax takes fp32 scores and a positive scale, got {got}")
    length = scores.shape[-1]
    limits = {"triton": f"rows of at most {_LONGEST}, not {length}" if length > _LONGEST else None}
    if dispatch.choose("softmax", impl, scores.device.type, dtype, scores, limits=limits) == "triton":
        return _triton(scores, scale, dtype)
    return reference(scores, scale, dtype)


def reference(scores: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """The same in plain torch."""
    return (scores * scale).softmax(dim=-1).to(dtype)


@torch.library.custom_op("ragturbo::softmax", mutates_args=())
def _triton(scores: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    from ragturbo.kernels import softmax as kernels

    return kernels.forward(scores, scale, dtype)


@_triton.register_fake
def _(scores: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    return scores.new_empty(scores.shape, dtype=dtype)
