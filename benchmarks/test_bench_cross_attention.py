"""Eq. 4's core: the kernel against SDPA, xformers, torch.compile of the reference, and the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import roofline
from benchmarks.timing import normal, rotation
from ragturbo.ops import cross_attention
from ragturbo.ops.cross_attention import reference
from ragturbo.ops.dispatch import HAS_XFORMERS

TOKENS, CHANNELS = 64, 1280
GPU = pytest.mark.gpu
XFORMERS = pytest.mark.skipif(not HAS_XFORMERS, reason="xformers is not installed")
IMPLS = [
    "reference",
    "sdpa",
    pytest.param("triton", marks=GPU),
    pytest.param("xformers", marks=[GPU, XFORMERS]),
    pytest.param("compile", marks=[GPU, pytest.mark.compiled]),
]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("heads", [20, 10, 40])
@pytest.mark.parametrize("batch, neighbours", [pytest.param(1, 1, marks=pytest.mark.quick), (1, 16), (8, 4)])
def test_cross_attention(measure: Any, device: str, batch: int, neighbours: int, heads: int, impl: str) -> None:
    dtype = torch.float16 if device == "cuda" else torch.float32
    valid = torch.ones(batch, neighbours, dtype=torch.bool, device=device)
    turns = rotation((1 + 2 * neighbours) * batch * TOKENS * CHANNELS * dtype.itemsize)
    q = normal(turns, batch, TOKENS, CHANNELS, dtype=dtype, device=device)
    k, v = (normal(turns, batch, neighbours, TOKENS, CHANNELS, dtype=dtype, device=device, seed=s) for s in (2, 3))
    inputs = [(*qkv, valid) for qkv in zip(q, k, v, strict=True)]

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        return cross_attention(q, k, v, valid, heads=heads, impl=impl)

    def exact() -> torch.Tensor:
        q, k, v, _ = inputs[0]
        return reference(q.double(), k.double(), v.double(), valid, heads)

    cost = roofline.cross_attention(batch, TOKENS, neighbours, TOKENS, CHANNELS, dtype.itemsize)
    sizes = {"batch": batch, "tokens": TOKENS, "channels": CHANNELS, "neighbours": neighbours, "heads": heads}
    group = f"cross_attention b{batch} k{neighbours} heads {heads}"
    with torch.inference_mode():
        measure(call, inputs=inputs, exact=exact, cost=cost, dtype=dtype, sizes={**sizes, "impl": impl}, group=group)
