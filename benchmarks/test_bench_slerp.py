"""Eq. 3: the kernel, the reference, torch.compile of it, and an addition of the same bytes as the yardstick."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import roofline
from benchmarks.timing import normal, rotation
from ragturbo.ops import slerp
from ragturbo.ops.slerp import reference

TOKENS, CHANNELS = 64, 1280
GPU = pytest.mark.gpu
IMPLS = [
    "reference",
    "addition",
    pytest.param("triton", marks=GPU),
    pytest.param("compile", marks=[GPU, pytest.mark.compiled]),
]


def blend(impl: str, per: str) -> Any:
    if impl == "addition":
        return lambda t, r, w: t + r
    if impl == "compile":
        return torch.compile(lambda t, r, w: reference(t, r, w, per), fullgraph=True, dynamic=False)
    return lambda t, r, w: slerp(t, r, w, per=per, impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("per", ["sample", "token"])
@pytest.mark.parametrize("batch", [pytest.param(1, marks=pytest.mark.quick), 8])
def test_slerp(measure: Any, device: str, batch: int, per: str, impl: str) -> None:
    dtype = torch.float16 if device == "cuda" else torch.float32
    w = torch.full((batch,), 0.8, device=device)
    turns = rotation(2 * batch * TOKENS * CHANNELS * dtype.itemsize)
    features = normal(2 * turns, batch, TOKENS, CHANNELS, dtype=dtype, device=device)
    inputs = [(t, r, w) for t, r in zip(features[:turns], features[turns:], strict=True)]
    call = blend(impl, per)

    def exact() -> torch.Tensor:
        t, r, _ = inputs[0]
        return reference(t.double(), r.double(), w.double(), per)

    cost = roofline.slerp(batch, TOKENS, CHANNELS, dtype.itemsize, per)
    sizes = {"batch": batch, "tokens": TOKENS, "channels": CHANNELS, "per": per, "impl": impl}
    measure(
        call,
        inputs=inputs,
        exact=None if impl == "addition" else exact,
        within=1,
        cost=cost,
        dtype=dtype,
        sizes=sizes,
        group=f"slerp {per} b{batch}",
    )
