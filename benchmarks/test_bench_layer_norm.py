"""LayerNorm of the UNet's token grids, with and without the residual's sum: the kernel against torch's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from benchmarks import roofline
from benchmarks.timing import normal, rotation
from ragturbo.ops import layer_norm, layer_norm_and_sum

GPU = pytest.mark.gpu
IMPLS = ["torch", pytest.param("triton", marks=GPU), pytest.param("compile", marks=[GPU, pytest.mark.compiled])]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("with_sum", [False, True])
@pytest.mark.parametrize("rows, channels", [pytest.param(4096, 320, marks=pytest.mark.quick), (1024, 640), (256, 1280)])
def test_layer_norm(measure: Any, device: str, rows: int, channels: int, with_sum: bool, impl: str) -> None:
    dtype = torch.float16 if device == "cuda" else torch.float32
    weight, bias = normal(2, channels, dtype=dtype, device=device)
    turns = rotation(rows * channels * dtype.itemsize)
    grids = normal(turns + 1, rows, channels, dtype=dtype, device=device, seed=2)
    add = grids[turns] if with_sum else None
    inputs = [(x,) for x in grids[:turns]]

    def eager(x: torch.Tensor) -> Any:
        total = x if add is None else x + add
        out = F.layer_norm(total, (channels,), weight, bias)
        return out if add is None else (out, total)

    def kernel(x: torch.Tensor) -> Any:
        if add is None:
            return layer_norm(x, weight, bias, impl="triton")
        return layer_norm_and_sum(x, weight, bias, add=add, impl="triton")

    calls = {"torch": eager, "triton": kernel}
    call = calls[impl] if impl in calls else torch.compile(eager, fullgraph=True, dynamic=False)

    def verify() -> None:
        total = inputs[0][0].double() + (0 if add is None else add.double())
        exact = F.layer_norm(total, (channels,), weight.double(), bias.double())
        out = call(*inputs[0])
        error = ((out if add is None else out[0]).double() - exact).norm() / exact.norm()
        assert error < 8 * torch.finfo(dtype).eps, error

    cost = roofline.layer_norm(rows, channels, dtype.itemsize, add=with_sum)
    sizes = {"rows": rows, "channels": channels, "sum": with_sum, "impl": impl}
    group = f"layer_norm {channels}{' + sum' if with_sum else ''}"
    with torch.inference_mode():
        measure(call, inputs=inputs, verify=verify, cost=cost, dtype=dtype, sizes=sizes, group=group)
