"""Exact search over the paper's 0.63M keys: Triton, its CUDA twin, a matrix product with torch.topk, and one read.

On a CPU the database is a tenth of that.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import roofline
from ragturbo.ops import describe, topk

WIDTH, ROTATE = 1024, 8
COUNT = {"cuda": 630_000, "cpu": 63_000}
GPU = pytest.mark.gpu
IMPLS = ["reference", *(pytest.param(name, marks=GPU) for name in ("triton", "cuda", "matmul", "one read"))]


@pytest.fixture(scope="module")
def keys(device: str) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(1)
    found = torch.randn(COUNT[device], WIDTH, generator=generator, device=device)
    return torch.nn.functional.normalize(found, dim=-1).half()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("queries, k", [pytest.param(1, 1, marks=pytest.mark.quick), (1, 4), (4, 4)])
def test_topk(measure: Any, device: str, keys: torch.Tensor, queries: int, k: int, impl: str) -> None:
    if impl == "reference" and device == "cuda":
        pytest.skip("the reference reads host memory for queries on the CPU")
    descriptor = describe(keys.data_ptr(), len(keys), device)
    generator = torch.Generator(device).manual_seed(2)
    query = torch.randn(ROTATE, queries, WIDTH, generator=generator, device=device)
    inputs = [(q,) for q in torch.nn.functional.normalize(query, dim=-1)]

    def search(query: torch.Tensor) -> Any:
        return topk(descriptor, query, k, impl=impl)

    def matmul(query: torch.Tensor) -> Any:
        return (query.half() @ keys.T).topk(k)

    def read(query: torch.Tensor) -> Any:
        return keys.view(torch.int32).sum()

    call = {"matmul": matmul, "one read": read}.get(impl, search)

    def verify() -> None:
        if impl in ("matmul", "one read"):
            return
        rows, scores = call(*inputs[0])
        exact = torch.cat([part.double() @ inputs[0][0].double().T for part in keys.split(50_000)]).T
        best = exact.topk(k)
        assert torch.equal(rows, best.indices)
        torch.testing.assert_close(scores.double(), best.values, rtol=0, atol=1e-6)

    sizes = {"keys": len(keys), "width": WIDTH, "queries": queries, "k": k, "impl": impl}
    cost = roofline.topk(len(keys), WIDTH, queries)
    measure(
        call, inputs=inputs, verify=verify, cost=cost, dtype=torch.float16, sizes=sizes, group=f"topk {queries} {k}"
    )
