"""The operations of the method: one file an op, with its contract, its plain-torch reference and what may run it."""

from __future__ import annotations

from ragturbo.ops.adapter import attention_adapter, retrieved_kv, transformer_adapter
from ragturbo.ops.cross_attention import cross_attention
from ragturbo.ops.dispatch import explain
from ragturbo.ops.linear import Norm, linear
from ragturbo.ops.project_attention import project_attention
from ragturbo.ops.scaled_residual import scaled_residual
from ragturbo.ops.slerp import slerp

__all__ = [
    "Norm",
    "attention_adapter",
    "cross_attention",
    "explain",
    "linear",
    "project_attention",
    "retrieved_kv",
    "scaled_residual",
    "slerp",
    "transformer_adapter",
]
