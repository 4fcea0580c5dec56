"""Eq. 5's residual: the kernel, also in place, the reference, torch.compile, and an addition of the same bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import roofline
from benchmarks.timing import normal, rotation
from ragturbo.ops import scaled_residual
from ragturbo.ops.scaled_residual import reference

TOKENS, CHANNELS = 64, 1280
GPU = pytest.mark.gpu
IMPLS = [
    "reference",
    "addition",
    pytest.param("triton", marks=GPU),
    pytest.param("triton in place", marks=GPU),
    pytest.param("compile", marks=[GPU, pytest.mark.compiled]),
]


def residual(impl: str) -> Any:
    if impl == "addition":
        return lambda h, delta, lam: h + delta
    if impl == "compile":
        return torch.compile(reference, fullgraph=True, dynamic=False)
    name, inplace = impl.split(" ")[0], impl.endswith("in place")
    return lambda h, delta, lam: scaled_residual(h, delta, lam, impl=name, inplace=inplace)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("batch", [pytest.param(1, marks=pytest.mark.quick), 8])
def test_scaled_residual(measure: Any, device: str, batch: int, impl: str) -> None:
    dtype = torch.float16 if device == "cuda" else torch.float32
    # Calls in place add up: a small λ keeps the sum finite.
    lam = torch.full((batch,), 1e-4, device=device)
    turns = rotation(2 * batch * TOKENS * CHANNELS * dtype.itemsize)
    features = normal(2 * turns, batch, TOKENS, CHANNELS, dtype=dtype, device=device)
    inputs = [(h, delta, lam) for h, delta in zip(features[:turns], features[turns:], strict=True)]
    call = residual(impl)

    def verify() -> None:
        if impl == "addition":
            return
        h, delta, _ = inputs[0]
        exact = reference(h.double(), delta.double(), lam.double())
        error = (call(h.clone(), delta, lam).double() - exact).norm() / exact.norm()
        assert error < torch.finfo(dtype).eps, error

    cost = roofline.scaled_residual(batch, TOKENS, CHANNELS, dtype.itemsize)
    sizes = {"batch": batch, "tokens": TOKENS, "channels": CHANNELS, "impl": impl}
    measure(call, inputs=inputs, verify=verify, cost=cost, dtype=dtype, sizes=sizes, group=f"scaled_residual b{batch}")
