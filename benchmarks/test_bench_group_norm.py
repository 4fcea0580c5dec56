"""GroupNorm and SiLU at the UNet's and the VAE's shapes, with and without the residual's sum; a copy as yardstick."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from benchmarks import roofline
from benchmarks.timing import normal, rotation
from ragturbo.ops import group_norm, group_norm_and_sum
from ragturbo.ops.group_norm import reference

GPU = pytest.mark.gpu
IMPLS = ["torch", "copy", pytest.param("triton", marks=GPU), pytest.param("compile", marks=[GPU, pytest.mark.compiled])]
# Channels and side: the VAE's, whose largest are too slow for a CPU, then the UNet's.
SHAPES = [
    pytest.param(128, 512, marks=[GPU, pytest.mark.quick]),
    pytest.param(256, 512, marks=[GPU, pytest.mark.quick]),
    pytest.param(256, 256, marks=GPU),
    (512, 128),
    (512, 64),
    pytest.param(320, 64, marks=pytest.mark.quick),
    (640, 32),
    (1280, 16),
    (1280, 8),
]


def normalise(impl: str, weight: torch.Tensor, bias: torch.Tensor, add: torch.Tensor | None) -> Any:
    def composed(x: torch.Tensor) -> Any:
        total = x if add is None else x + add
        out = F.silu(F.group_norm(total, 32, weight, bias))
        return out if add is None else (out, total)

    def copy(x: torch.Tensor) -> Any:
        return x.clone() if add is None else (x.clone(), add.clone())

    def kernel(x: torch.Tensor) -> Any:
        if add is None:
            return group_norm(x, 32, weight, bias, silu=True, impl="triton")
        return group_norm_and_sum(x, 32, weight, bias, silu=True, add=add, impl="triton")

    if impl == "compile":
        return torch.compile(composed, fullgraph=True, dynamic=False)
    return {"torch": composed, "copy": copy, "triton": kernel}[impl]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("with_sum", [False, True])
@pytest.mark.parametrize("channels, size", SHAPES)
def test_group_norm(measure: Any, device: str, channels: int, size: int, with_sum: bool, impl: str) -> None:
    dtype = torch.float16 if device == "cuda" else torch.float32
    turns = rotation(channels * size * size * dtype.itemsize)
    weight, bias = normal(2, channels, dtype=dtype, device=device)
    images = normal(turns + 1, 1, channels, size, size, dtype=dtype, device=device, seed=2, channels_last=True)
    add = images[turns] if with_sum else None
    inputs = [(x,) for x in images[:turns]]
    call = normalise(impl, weight, bias, add)

    def verify() -> None:
        if impl == "copy":
            return
        wide = None if add is None else add.double()
        exact, _ = reference(inputs[0][0].double(), 32, weight.double(), bias.double(), 1e-5, True, wide, None)
        out = call(*inputs[0])
        error = ((out if add is None else out[0]).double() - exact).norm() / exact.norm()
        assert error < 8 * torch.finfo(dtype).eps, error

    cost = roofline.group_norm(1, channels, size * size, dtype.itemsize, add=with_sum)
    sizes = {"channels": channels, "size": size, "sum": with_sum, "impl": impl}
    group = f"group_norm {channels}x{size}{' + sum' if with_sum else ''}"
    with torch.inference_mode():
        measure(call, inputs=inputs, verify=verify, cost=cost, dtype=dtype, sizes=sizes, group=group)
