"""Latents in the UNet's scale, images in [0, 1], for both autoencoders."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL

from ragturbo.errors import InvalidRequest, ModelError
from ragturbo.model.vae import VAE


def shifted() -> Any:
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        scaling_factor=0.5,
        shift_factor=0.25,
    ).eval()


@pytest.mark.parametrize("kind", ["full", "tiny"])
@torch.no_grad()
def test_as_diffusers_would(tiny: ModuleType, kind: str) -> None:
    module = tiny.vae() if kind == "full" else tiny.tiny_vae()
    vae = VAE(module)
    assert (vae.channels, vae.factor) == (4, 8)
    images = torch.rand(2, 3, 32, 48) * 2 - 1
    latents = vae.encode(images)
    assert latents.shape == (2, 4, 4, 6)
    scale = module.config.scaling_factor
    raw = module.encode(images)
    torch.testing.assert_close(latents, (raw.latents if kind == "tiny" else raw.latent_dist.mode()) * scale)
    decoded = vae.decode(latents)
    torch.testing.assert_close(decoded, (module.decode(latents / scale).sample / 2 + 0.5).clamp(0, 1))
    assert decoded.shape == images.shape and decoded.min() >= 0 and decoded.max() <= 1
    # The mean, not a sample: encoding twice gives the same bits.
    assert torch.equal(vae.encode(images), latents)


@torch.no_grad()
def test_a_shift_is_undone_where_it_was_made() -> None:
    vae = VAE(shifted())
    images = torch.rand(1, 3, 8, 8) * 2 - 1
    latents = vae.encode(images)
    torch.testing.assert_close(latents, (vae.module.encode(images).latent_dist.mean - 0.25) * 0.5)
    direct = vae.module.decode(latents / 0.5 + 0.25).sample
    torch.testing.assert_close(vae.decode(latents), (direct / 2 + 0.5).clamp(0, 1))


@torch.no_grad()
def test_nan_is_not_clamped_away(tiny: ModuleType) -> None:
    latents = torch.zeros(2, 4, 4, 4)
    latents[1, 0, 0, 0] = float("nan")
    decoded = VAE(tiny.vae()).decode(latents)
    assert torch.isfinite(decoded[0]).all() and decoded[1].isnan().any()


@torch.no_grad()
def test_fp32_latents_go_through_an_fp16_decoder(tiny: ModuleType) -> None:
    vae = VAE(tiny.vae().half())
    out = vae.decode(torch.randn(1, 4, 4, 4))
    assert out.dtype == torch.float16 and vae.dtype == torch.float16
    assert vae.encode(torch.zeros(1, 3, 32, 32)).dtype == torch.float16


def test_what_is_no_vae_and_no_multiple_is_refused(tiny: ModuleType) -> None:
    with pytest.raises(ModelError, match="Linear"):
        VAE(torch.nn.Linear(1, 1))
    with pytest.raises(InvalidRequest, match="8 pixels, got 33x32"):
        VAE(tiny.vae()).encode(torch.zeros(1, 3, 32, 33))
