"""LayerNorm of the UNet's token grids: the kernel against torch's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from benchmarks import roofline
from benchmarks.timing import normal, rotation
from ragturbo.ops import layer_norm

GPU = pytest.mark.gpu
IMPLS = ["torch", pytest.param("triton", marks=GPU), pytest.param("compile", marks=[GPU, pytest.mark.compiled])]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("rows, channels", [pytest.param(4096, 320, marks=pytest.mark.quick), (1024, 640), (256, 1280)])
def test_layer_norm(measure: Any, device: str, rows: int, channels: int, impl: str) -> None:
    dtype = torch.float16 if device == "cuda" else torch.float32
    weight, bias = normal(2, channels, dtype=dtype, device=device)
    turns = rotation(rows * channels * dtype.itemsize)
    inputs = [(x,) for x in normal(turns, rows, channels, dtype=dtype, device=device, seed=2)]

    def eager(x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, (channels,), weight, bias)

    calls = {"torch": eager, "triton": lambda x: layer_norm(x, weight, bias, impl="triton")}
    call = calls[impl] if impl in calls else torch.compile(eager, fullgraph=True, dynamic=False)

    def exact() -> torch.Tensor:
        return F.layer_norm(inputs[0][0].double(), (channels,), weight.double(), bias.double())

    cost = roofline.layer_norm(rows, channels, dtype.itemsize)
    sizes = {"rows": rows, "channels": channels, "impl": impl}
    with torch.inference_mode():
        measure(call, inputs=inputs, exact=exact, cost=cost, dtype=dtype, sizes=sizes, group=f"layer_norm {channels}")
