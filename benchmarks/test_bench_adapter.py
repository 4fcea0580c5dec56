"""Eqs. 4–5, the whole adapter at SD 2.1's width: fused launches against torch's layers, eager and max-autotuned.

"with K and V" counts the retrieval branch's launch too; without, it is what the image waits for.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from ragturbo.bench import roofline
from ragturbo.bench.timing import normal, rotation
from ragturbo.model import HSpaceAdapter

TOKENS, CHANNELS, HEADS = 64, 1280, 20
GPU = pytest.mark.gpu
IMPLS = ["sdpa", pytest.param("triton", marks=GPU), pytest.param("compile", marks=[GPU, pytest.mark.compiled])]


@pytest.fixture(scope="module")
def adapters(device: str) -> dict[str, HSpaceAdapter]:
    """Both kinds with an output projection that is not zero."""
    torch.manual_seed(1)
    made = {}
    for kind in ("transformer", "attention"):
        adapter = HSpaceAdapter(CHANNELS, HEADS, kind)
        torch.nn.init.normal_(adapter.proj_out.weight, std=CHANNELS**-0.5)
        made[kind] = adapter.eval().requires_grad_(False).to(device)
    return made


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("branch", ["with K and V", "alone"])
@pytest.mark.parametrize("kind", ["transformer", "attention"])
@pytest.mark.parametrize("batch, neighbours", [pytest.param(1, 1, marks=pytest.mark.quick), (1, 4), (8, 1)])
def test_adapter(
    measure: Any, device: str, adapters: Any, batch: int, neighbours: int, kind: str, branch: str, impl: str
) -> None:
    dtype = torch.float16 if device == "cuda" else torch.float32
    adapter = adapters[kind].to(dtype)
    attention = "sdpa" if impl == "compile" else impl
    lam = torch.full((batch,), 0.7, device=device)
    valid = torch.ones(batch, neighbours, dtype=torch.bool, device=device)
    turns = rotation((1 + neighbours) * batch * TOKENS * CHANNELS * dtype.itemsize)
    targets = normal(turns, batch, TOKENS, CHANNELS, dtype=dtype, device=device)
    retrieved: Any = normal(turns, batch, neighbours, TOKENS, CHANNELS, dtype=dtype, device=device, seed=2)
    if branch == "alone":
        retrieved = [adapter.context(h_retr, attention) for h_retr in retrieved]
    inputs = list(zip(targets, retrieved, strict=True))

    def call(h_tgt: torch.Tensor, h_retr: Any) -> torch.Tensor:
        return adapter(h_tgt, h_retr, lam, valid, attention)

    if impl == "compile":
        call = torch.compile(call, mode="max-autotune-no-cudagraphs", fullgraph=True, dynamic=False)

    def verify() -> None:
        h_tgt, h_retr = inputs[0]
        exact = adapter(h_tgt, h_retr, lam, valid, "reference")
        # Of what the adapter adds: the residual would hide an error in it.
        error = (call(h_tgt, h_retr) - exact).float().norm() / (exact - h_tgt).float().norm()
        assert error < (2e-5 if dtype == torch.float32 else 1e-2), error

    counted = roofline.transformer_adapter if kind == "transformer" else roofline.attention_adapter
    cost = counted(batch, TOKENS, neighbours, TOKENS, CHANNELS, dtype.itemsize)
    if branch == "alone":
        # K and V are made: neither their products nor their weights, but both are read where one row was.
        keys, square = batch * neighbours * TOKENS, CHANNELS**2
        moved = (keys * CHANNELS - 2 * square) * dtype.itemsize
        cost = replace(cost, flops=cost.flops - 4 * square * keys, memory_bytes=cost.memory_bytes + moved)
    sizes = {"batch": batch, "neighbours": neighbours, "kind": kind, "branch": branch, "impl": impl}
    group = f"adapter {kind} b{batch} k{neighbours} {branch}"
    with torch.inference_mode():
        measure(call, inputs=inputs, verify=verify, cost=cost, dtype=dtype, sizes=sizes, group=group)
