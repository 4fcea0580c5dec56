"""GEGLU with its projection's bias at the UNet's token grids: the kernel against torch's composition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from benchmarks import roofline
from benchmarks.timing import normal, rotation
from ragturbo.ops import geglu

GPU = pytest.mark.gpu
IMPLS = ["torch", pytest.param("triton", marks=GPU), pytest.param("compile", marks=[GPU, pytest.mark.compiled])]


def composed(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    value, gate = (x + bias).chunk(2, dim=-1)
    return value * F.gelu(gate)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("rows, width", [(4096, 1280), pytest.param(1024, 2560, marks=pytest.mark.quick), (256, 5120)])
def test_geglu(measure: Any, device: str, rows: int, width: int, impl: str) -> None:
    dtype = torch.float16 if device == "cuda" else torch.float32
    (bias,) = normal(1, 2 * width, dtype=dtype, device=device)
    turns = rotation(2 * rows * width * dtype.itemsize)
    inputs = [(x, bias) for x in normal(turns, rows, 2 * width, dtype=dtype, device=device, seed=2)]
    calls = {"torch": composed, "triton": lambda x, bias: geglu(x, bias, impl="triton")}
    call = calls[impl] if impl in calls else torch.compile(composed, fullgraph=True, dynamic=False)

    def exact() -> torch.Tensor:
        return composed(*(x.double() for x in inputs[0]))

    cost = roofline.geglu(rows, width, dtype.itemsize)
    sizes = {"rows": rows, "width": width, "impl": impl}
    with torch.inference_mode():
        measure(call, inputs=inputs, exact=exact, cost=cost, dtype=dtype, sizes=sizes, group=f"geglu {rows}x{width}")
