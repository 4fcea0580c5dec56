from __future__ import annotations

import pytest
import torch

from ragturbo.errors import InvalidRequest
from ragturbo.kernels import tiles
from ragturbo.kernels.launch import counted
from ragturbo.ops import interleave


def by_definition(phases):
    batch, c, h, w = phases.shape[0], phases.shape[1] // 4, phases.shape[2] - 1, phases.shape[3] - 1
    out = phases.new_empty(batch, c, 2 * h, 2 * w)
    for y in (0, 1):
        for x in (0, 1):
            first = (2 * y + x) * c
            out[:, :, y::2, x::2] = phases[:, first : first + c, y : y + h, x : x + w]
    return out


@pytest.mark.parametrize("shape", [(1, 32, 2, 2), (2, 96, 5, 7), (3, 12, 19, 4)])
@pytest.mark.parametrize("block", [32, 4096])
def test_every_phase_goes_to_its_pixels_with_its_bits(shape, block, dtype, randn):
    phases = randn(*shape, dtype=dtype)
    phases[0, 0, 0, 0] = float("inf")
    expected = by_definition(phases)
    assert torch.equal(interleave(phases, impl="reference"), expected)
    for order in (phases, phases.contiguous(memory_format=torch.channels_last), phases.mT.contiguous().mT):
        with tiles.forced("interleave", {"BLOCK": block}), counted() as launched:
            out = interleave(order, impl="triton")
        assert launched == ["interleave"] and out.is_contiguous(memory_format=torch.channels_last)
        assert out.dtype == dtype and torch.equal(out, expected)


def test_nonsense_is_refused_by_name(randn):
    with pytest.raises(InvalidRequest, match=r"\(1, 6, 3, 3\)"):
        interleave(randn(1, 6, 3, 3))
    with pytest.raises(InvalidRequest, match="no backward"):
        interleave(randn(1, 8, 3, 3).requires_grad_(), impl="triton")
