from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor

from ragturbo.errors import InvalidRequest
from ragturbo.ops import to_uint8


def diffusers_bytes(images):
    pil = VaeImageProcessor().postprocess(images.cpu(), output_type="pil")
    return torch.from_numpy(np.stack([np.asarray(image) for image in pil]))


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_diffusers_image_processors_bytes(impl, dtype, randn, device):
    images = randn(2, 3, 9, 11, dtype=dtype)
    expected = diffusers_bytes(images)
    for layout in (torch.contiguous_format, torch.channels_last):
        out = to_uint8(images.contiguous(memory_format=layout), impl=impl)
        assert out.is_contiguous() and torch.equal(out.cpu(), expected)
    assert torch.equal(to_uint8(images.transpose(2, 3), impl=impl).cpu(), expected.transpose(1, 2))


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_every_16_bit_number_there_is(impl, kind, device):
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(getattr(torch, kind))
    numbers = numbers[numbers.isfinite()]
    images = numbers[: len(numbers) // 3 * 3].view(1, 3, 1, -1).to(device)
    assert torch.equal(to_uint8(images, impl=impl).cpu(), diffusers_bytes(images))


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_ties_go_to_even_and_unsigned_images_are_taken_as_they_are(impl, device):
    levels = (torch.arange(255, dtype=torch.float64) + 0.5) / 255
    images = levels.float()[:, None, None, None].to(device)
    expected = (images.cpu().float().numpy() * 255).round().astype("uint8").transpose(0, 2, 3, 1)
    assert torch.equal(to_uint8(images, signed=False, impl=impl).cpu(), torch.from_numpy(expected))


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_what_is_no_colour_is_clamped_and_nan_is_black(impl, device):
    images = torch.tensor([torch.nan, torch.inf, -torch.inf, 2.0, -2.0, 1.0], device=device).view(1, 3, 1, 2)
    # Channels first in, channels last out: pixel 0 is (NaN, -inf, -2), pixel 1 is (inf, 2, 1).
    assert to_uint8(images, impl=impl).cpu().tolist() == [[[[0, 0, 0], [255, 255, 255]]]]


def test_nonsense_is_refused_by_name(randn):
    with pytest.raises(InvalidRequest, match=r"\(3, 8, 8\)"):
        to_uint8(randn(3, 8, 8))
    with pytest.raises(InvalidRequest, match="int64"):
        to_uint8(torch.zeros(1, 3, 8, 8, dtype=torch.int64))
