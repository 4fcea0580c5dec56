"""Four phases side by side to an image of twice the size: one pass against torch's copies."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import roofline
from benchmarks.timing import normal, rotation
from ragturbo.ops import interleave

GPU = pytest.mark.gpu
IMPLS = ["reference", pytest.param("triton", marks=GPU)]
# (channels of the image, side of the phases less one): the VAE's largest on a GPU, and its first.
SHAPES = [pytest.param(256, 256, marks=[GPU, pytest.mark.quick]), (512, 16)]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("channels, side", SHAPES)
def test_interleave(measure: Any, device: str, channels: int, side: int, impl: str) -> None:
    dtype = torch.float16 if device == "cuda" else torch.float32
    turns = rotation(8 * channels * side * side * dtype.itemsize)
    shape = 1, 4 * channels, side + 1, side + 1
    inputs = [(x,) for x in normal(turns, *shape, dtype=dtype, device=device, channels_last=True)]

    def call(x: torch.Tensor) -> torch.Tensor:
        return interleave(x, impl=impl)

    def verify() -> None:
        (x,) = inputs[0]
        out = call(x)
        assert torch.equal(out[:, :, 1::2, 0::2], x[:, 2 * channels : 3 * channels, 1:, :-1])

    cost = roofline.interleave(1, channels, 4 * side * side, dtype.itemsize)
    sizes = {"channels": channels, "side": side, "impl": impl}
    with torch.inference_mode():
        measure(
            call, inputs=inputs, verify=verify, cost=cost, dtype=dtype, sizes=sizes,
            group=f"interleave {channels}x{side}x{side}",
        )  # fmt: skip
