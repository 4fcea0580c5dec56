"""The ops: one file each, with its contract, its plain-torch reference and its implementations."""

from __future__ import annotations

from ragturbo.ops.adapter import attention_adapter, retrieved_kv, transformer_adapter
from ragturbo.ops.bias_residual import bias_residual
from ragturbo.ops.cross_attention import cross_attention
from ragturbo.ops.dispatch import explain
from ragturbo.ops.gather_rows import Rows, describe, gather_rows
from ragturbo.ops.geglu import geglu
from ragturbo.ops.group_norm import group_norm, group_norm_and_sum
from ragturbo.ops.interleave import interleave
from ragturbo.ops.layer_norm import layer_norm, layer_norm_and_sum
from ragturbo.ops.linear import linear
from ragturbo.ops.project_attention import project_attention
from ragturbo.ops.scaled_residual import scaled_residual
from ragturbo.ops.slerp import slerp
from ragturbo.ops.softmax import softmax
from ragturbo.ops.to_uint8 import to_uint8
from ragturbo.ops.topk import topk
from ragturbo.ops.upsample import upsample

__all__ = [
    "Rows",
    "attention_adapter",
    "bias_residual",
    "cross_attention",
    "describe",
    "explain",
    "gather_rows",
    "geglu",
    "group_norm",
    "group_norm_and_sum",
    "interleave",
    "layer_norm",
    "layer_norm_and_sum",
    "linear",
    "project_attention",
    "retrieved_kv",
    "scaled_residual",
    "slerp",
    "softmax",
    "to_uint8",
    "topk",
    "transformer_adapter",
    "upsample",
]
