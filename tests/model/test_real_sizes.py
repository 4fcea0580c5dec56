"""Stable Diffusion 2.1 at its real size, with random weights, on the CPU."""

from __future__ import annotations

import time
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from ragturbo.model.adapter import HSpaceAdapter
from ragturbo.model.bundle import Bundle, fingerprints
from ragturbo.model.info import BundleInfo
from ragturbo.model.inject import blend_weights, inject
from ragturbo.model.onestep import make_schedule
from ragturbo.model.text import TextEncoder
from ragturbo.model.unet import HSpaceUNet
from ragturbo.model.vae import VAE

SD21_UNET: dict[str, Any] = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "attention_head_dim": (5, 10, 20, 20),
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}
SD21_VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 768,
}


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_parameter_counts_are_the_papers() -> None:
    with torch.device("meta"):
        unet, adapter = UNet2DConditionModel(**SD21_UNET), HSpaceAdapter(1280, 20)
    share = count(adapter) / (count(unet) + count(adapter))
    print(f"UNet {count(unet) / 1e6:.2f}M, adapter {count(adapter):,} = {share:.2%} of both")
    assert round(count(unet) / 1e6, 2) == 865.91
    assert count(adapter) == 36_071_680
    assert f"{share:.2%}" == "4.00%"
    assert HSpaceUNet(unet).grid(64, 64) == (8, 8)


@pytest.mark.slow
@torch.inference_mode()
def test_text_to_image_at_real_sizes(tiny: ModuleType) -> None:
    tokenizer = tiny.clip_tokenizer(77)
    # Only the vocabulary is small: the encoder has SD 2.1's 23 blocks of width 1024.
    encoder = tiny.text_encoder(
        tokenizer, width=1024, layers=23, num_attention_heads=16, intermediate_size=4096, eos_token_id=2
    )
    unet = UNet2DConditionModel(**SD21_UNET).eval()
    vae = AutoencoderKL(**SD21_VAE).eval()
    start = time.perf_counter()
    names = fingerprints(encoder, unet, vae)
    weights = sum(map(count, (encoder, unet, vae))) / 1e6
    print(f"fingerprints of {weights:.0f}M weights: {time.perf_counter() - start:.3f} s")
    bundle = Bundle(
        name="random",
        info=BundleInfo(distilled=True),
        text=TextEncoder(tokenizer, encoder),
        unet=HSpaceUNet(unet),
        vae=VAE(vae),
        scheduler=tiny.scheduler(),
        adapter=HSpaceAdapter(1280, 20).eval(),
        fingerprints=names,
    )
    assert bundle.adapter is not None
    torch.nn.init.normal_(bundle.adapter.proj_out.weight, std=0.02)

    states = bundle.text.encode(bundle.text.tokenize(["a red circle", "a blue square"]).input_ids)
    text, query = states.hidden_states, states.key
    assert text.shape == (2, 77, 1024)
    latents = bundle.vae.encode(torch.rand(1, 3, 256, 256) * 2 - 1)
    assert latents.shape == (1, 4, 32, 32)
    h_retr = bundle.unet.retrieval_features(latents, text[1:])[:, None]
    assert h_retr.shape == (1, 1, 16, 1280)
    lam, valid = blend_weights(query[:1] @ query[1:].T, torch.tensor([[4]]), torch.tensor([[1.0]]))

    schedule = make_schedule(bundle.scheduler, 1, distilled=True)
    x = torch.randn(1, 4, 64, 64) * schedule.init_sigma
    state = bundle.unet.encode(schedule.scale_input(x, 0), schedule.timesteps[0], text[:1])
    assert state.h.shape == (1, 1280, 8, 8)
    h = inject("adapter", state.h, h_retr, lam=lam, valid=valid, adapter=bundle.adapter)
    assert (h - state.h).abs().max() > 1e-3
    with_retrieval = bundle.unet.decode(state, h)
    plain = bundle.unet.decode(state)
    assert torch.equal(plain, unet(schedule.scale_input(x, 0), schedule.timesteps[0], text[:1]).sample)
    assert 0 < (with_retrieval - plain).norm() / plain.norm() < 1
    image = bundle.vae.decode(schedule.step(x, with_retrieval, 0))
    assert image.shape == (1, 3, 512, 512) and torch.isfinite(image).all()
