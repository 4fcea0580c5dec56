"""Eqs. 4–5, the whole adapter at SD 2.1's width: fused launches against torch's layers, eager and max-autotuned.

"with K and V" includes the launch of the retrieval branch. The calls rotate over copies of the weights, because an
image's other layers evict them from the L2 between two calls.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import cycle
from typing import Any

import pytest
import torch

from benchmarks import roofline
from benchmarks.timing import normal, rotation
from ragturbo.model.adapter import HSpaceAdapter

TOKENS, CHANNELS, HEADS = 64, 1280, 20
GPU = pytest.mark.gpu
IMPLS = ["sdpa", pytest.param("triton", marks=GPU), pytest.param("compile", marks=[GPU, pytest.mark.compiled])]


@pytest.fixture(scope="module")
def adapters(device: str) -> dict[str, list[HSpaceAdapter]]:
    """Both kinds with a nonzero output projection, in as many copies as exceed the L2."""
    torch.manual_seed(1)
    dtype = torch.float16 if device == "cuda" else torch.float32
    made = {}
    for kind in ("transformer", "attention"):
        adapter = HSpaceAdapter(CHANNELS, HEADS, kind)
        torch.nn.init.normal_(adapter.proj_out.weight, std=CHANNELS**-0.5)
        adapter = adapter.eval().requires_grad_(False).to(device, dtype)
        copies = rotation(sum(p.nbytes for p in adapter.parameters()), least=1)
        made[kind] = [adapter, *(copy.deepcopy(adapter) for _ in range(copies - 1))]
    return made


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("branch", ["with K and V", "alone"])
@pytest.mark.parametrize("kind", ["transformer", "attention"])
@pytest.mark.parametrize("batch, neighbours", [pytest.param(1, 1, marks=pytest.mark.quick), (1, 4), (8, 1)])
def test_adapter(
    measure: Any, device: str, adapters: Any, batch: int, neighbours: int, kind: str, branch: str, impl: str
) -> None:
    dtype = torch.float16 if device == "cuda" else torch.float32
    copies = adapters[kind]
    attention = "sdpa" if impl == "compile" else impl
    lam = torch.full((batch,), 0.7, device=device)
    valid = torch.ones(batch, neighbours, dtype=torch.bool, device=device)
    turns = rotation((1 + neighbours) * batch * TOKENS * CHANNELS * dtype.itemsize)
    targets = normal(turns, batch, TOKENS, CHANNELS, dtype=dtype, device=device)
    retrieved: Any = normal(turns, batch, neighbours, TOKENS, CHANNELS, dtype=dtype, device=device, seed=2)
    if branch == "alone":
        retrieved = [copies[0].retrieved_kv(h_retr, attention) for h_retr in retrieved]
    inputs = list(zip(cycle(copies), targets, retrieved))  # noqa: B905

    def call(adapter: HSpaceAdapter, h_tgt: torch.Tensor, h_retr: Any) -> torch.Tensor:
        return adapter(h_tgt, h_retr, lam, valid, attention)

    if impl == "compile":
        call = torch.compile(call, mode="max-autotune-no-cudagraphs", fullgraph=True, dynamic=False)

    def verify() -> None:
        adapter, h_tgt, h_retr = inputs[0]
        exact = adapter(h_tgt, h_retr, lam, valid, "reference")
        # Relative to what the adapter adds, because the residual would hide an error.
        error = (call(*inputs[0]) - exact).float().norm() / (exact - h_tgt).float().norm()
        assert error < (2e-5 if dtype == torch.float32 else 1e-2), error

    counted = roofline.transformer_adapter if kind == "transformer" else roofline.attention_adapter
    cost = counted(batch, TOKENS, neighbours, TOKENS, CHANNELS, dtype.itemsize)
    if branch == "alone":
        # K and V are inputs: their products and weights do not count, and two tensors are read instead of one.
        keys, square = batch * neighbours * TOKENS, CHANNELS**2
        moved = (keys * CHANNELS - 2 * square) * dtype.itemsize
        cost = replace(cost, flops=cost.flops - 4 * square * keys, memory_bytes=cost.memory_bytes + moved)
    sizes = {"batch": batch, "neighbours": neighbours, "kind": kind, "branch": branch, "impl": impl}
    sizes["copies of the weights"] = len(copies)
    group = f"adapter {kind} b{batch} k{neighbours} {branch}"
    with torch.inference_mode():
        measure(call, inputs=inputs, verify=verify, cost=cost, dtype=dtype, sizes=sizes, group=group)
