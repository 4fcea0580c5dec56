"""Nearest upsampling by two: one read and four wide stores against torch's kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from benchmarks import roofline
from benchmarks.timing import normal, rotation
from ragturbo.ops import upsample

GPU = pytest.mark.gpu
IMPLS = ["torch", pytest.param("triton", marks=GPU)]
# (channels, side) of the input: the VAE's largest on a GPU, and the UNet's last and first.
SHAPES = [
    pytest.param(256, 256, marks=[GPU, pytest.mark.quick]),
    pytest.param(640, 32, marks=pytest.mark.quick),
    (1280, 8),
]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("channels, side", SHAPES)
def test_upsample(measure: Any, device: str, channels: int, side: int, impl: str) -> None:
    dtype = torch.float16 if device == "cuda" else torch.float32
    turns = rotation(5 * channels * side * side * dtype.itemsize)
    images = normal(turns, 1, channels, side, side, dtype=dtype, device=device, channels_last=True)
    inputs = [(x,) for x in images]
    calls = {
        "torch": lambda x: F.interpolate(x, scale_factor=2.0, mode="nearest"),
        "triton": lambda x: upsample(x, impl="triton"),
    }
    call = calls[impl]

    def verify() -> None:
        (x,) = inputs[0]
        assert torch.equal(call(x), x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))

    cost = roofline.upsample(1, channels, side * side, dtype.itemsize)
    sizes = {"channels": channels, "side": side, "impl": impl}
    with torch.inference_mode():
        measure(
            call, inputs=inputs, verify=verify, cost=cost, dtype=dtype, sizes=sizes,
            group=f"upsample {channels}x{side}x{side}",
        )  # fmt: skip
