from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from ragturbo.errors import InvalidRequest
from ragturbo.kernels import tiles
from ragturbo.kernels.launch import counted
from ragturbo.ops import upsample


@pytest.mark.parametrize("shape", [(1, 8, 1, 1), (2, 24, 5, 7), (1, 33, 19, 4)])
@pytest.mark.parametrize("block", [32, 2048])
def test_every_pixel_four_times_with_its_bits(shape, block, dtype, randn):
    x = randn(*shape, dtype=dtype)
    x[0, 0, 0, 0] = float("inf")
    expected = F.interpolate(x, scale_factor=2.0, mode="nearest")
    for image in (x, x.contiguous(memory_format=torch.channels_last), x.mT.contiguous().mT):
        with tiles.forced("upsample", {"BLOCK": block}), counted() as launched:
            out = upsample(image, impl="triton")
        assert launched == ["upsample"] and out.is_contiguous(memory_format=torch.channels_last)
        assert out.dtype == dtype and torch.equal(out, expected)


def test_nan_stays_nan(randn):
    x = randn(1, 8, 2, 2)
    x[0, 3, 1, 0] = float("nan")
    assert torch.equal(upsample(x, impl="triton").isnan(), F.interpolate(x, scale_factor=2.0).isnan())


def test_nonsense_is_refused_by_name(randn):
    with pytest.raises(InvalidRequest, match=r"\(8, 3, 3\)"):
        upsample(randn(8, 3, 3))
    with pytest.raises(InvalidRequest, match="no backward"):
        upsample(randn(1, 8, 3, 3).requires_grad_(), impl="triton")
