"""A convolution's bias and the block's residual: one pass against torch's two, eager and compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import roofline
from benchmarks.timing import normal, rotation
from ragturbo.ops import bias_residual

GPU = pytest.mark.gpu
IMPLS = ["torch", pytest.param("triton", marks=GPU), pytest.param("compile", marks=[GPU, pytest.mark.compiled])]
# (channels, side): the VAE's largest on a GPU, and the UNet's first blocks.
SHAPES = [
    pytest.param(128, 512, marks=[GPU, pytest.mark.quick]),
    pytest.param(320, 64, marks=pytest.mark.quick),
    (1280, 8),
]


def composed(x: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    return residual + (x + bias[:, None, None])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("channels, side", SHAPES)
def test_bias_residual(measure: Any, device: str, channels: int, side: int, impl: str) -> None:
    dtype = torch.float16 if device == "cuda" else torch.float32
    (bias,) = normal(1, channels, dtype=dtype, device=device)
    turns = rotation(2 * channels * side * side * dtype.itemsize)
    images = normal(2 * turns, 1, channels, side, side, dtype=dtype, device=device, seed=2, channels_last=True)
    inputs = [(x, bias, residual) for x, residual in zip(images[:turns], images[turns:], strict=True)]
    calls = {"torch": composed, "triton": lambda *args: bias_residual(*args, impl="triton")}
    call = calls[impl] if impl in calls else torch.compile(composed, fullgraph=True, dynamic=False)

    def exact() -> torch.Tensor:
        return composed(*(x.double() for x in inputs[0]))

    cost = roofline.bias_residual(1, channels, side * side, dtype.itemsize)
    sizes = {"channels": channels, "side": side, "impl": impl}
    group = f"bias_residual {channels}x{side}x{side}"
    with torch.inference_mode():
        measure(call, inputs=inputs, exact=exact, cost=cost, dtype=dtype, sizes=sizes, group=group)
