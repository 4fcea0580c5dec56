"""The operations of the method: one file an op, with its contract, its plain-torch reference and what may run it."""

from __future__ import annotations

from ragturbo.ops.cross_attention import cross_attention
from ragturbo.ops.dispatch import explain
from ragturbo.ops.scaled_residual import scaled_residual
from ragturbo.ops.slerp import slerp

__all__ = ["cross_attention", "explain", "scaled_residual", "slerp"]
