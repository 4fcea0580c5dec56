"""fp32 scores into 16-bit probabilities, the VAE's middle attention: one pass against torch's two."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import roofline
from benchmarks.timing import normal, rotation
from ragturbo.ops import softmax

GPU = pytest.mark.gpu
IMPLS = ["torch", pytest.param("triton", marks=GPU)]
SCALE = 512**-0.5


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("length", [pytest.param(4096, marks=[GPU, pytest.mark.quick]), 1024])
def test_softmax(measure: Any, device: str, length: int, impl: str) -> None:
    dtype = torch.float16 if device == "cuda" else torch.float32
    inputs = [(x,) for x in normal(rotation(6 * length**2), length, length, dtype=torch.float32, device=device)]
    calls = {
        "torch": lambda x: (x * SCALE).softmax(-1).to(dtype),
        "triton": lambda x: softmax(x, SCALE, dtype, impl="triton"),
    }
    call = calls[impl]

    def exact() -> torch.Tensor:
        return (inputs[0][0].double() * SCALE).softmax(-1)

    cost = roofline.softmax(length, length, dtype.itemsize)
    sizes = {"length": length, "impl": impl}
    with torch.inference_mode():
        measure(
            call, inputs=inputs, exact=exact, cost=cost, dtype=dtype, sizes=sizes, group=f"softmax {length}x{length}"
        )
