"""Each stage of one image alone: tokenizer, text encoder, UNet encoder, adapter, UNet decoder, VAE."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.counts import stage_counts
from ragturbo.bench.prompts import prompts
from ragturbo.model.inject import inject

STAGES = ("text", "encode", "adapter", "decode", "vae")
ROTATE = 4


def inputs(bundle: Any, batch: int) -> dict[str, list[tuple[Any, ...]]]:
    """Return rotating arguments for each stage, with different prompts and noise."""
    unet, vae, where = bundle.unet, bundle.vae, bundle.device
    size = unet.unet.config.sample_size
    generator = torch.Generator("cpu").manual_seed(1)
    words = prompts(ROTATE * batch)
    timestep = torch.full((batch,), 999.0, device=where)
    rows: dict[str, list[tuple[Any, ...]]] = {stage: [] for stage in STAGES}
    for i in range(ROTATE):
        ids = bundle.text.tokenize(words[i * batch : (i + 1) * batch]).input_ids.to(where)
        text = bundle.text.encode(ids).hidden_states
        noise = torch.randn((batch, vae.channels, size, size), generator=generator).to(where, bundle.dtype)
        grid = unet.grid(size, size)
        h = torch.randn((batch, unet.channels, *grid), generator=generator).to(where, bundle.dtype)
        h_retr = torch.randn((batch, 1, grid[0] * grid[1], unet.channels), generator=generator)
        rows["text"].append((ids,))
        rows["encode"].append((noise, timestep, text))
        rows["adapter"].append((h.contiguous(memory_format=torch.channels_last), h_retr.to(where, bundle.dtype)))
        rows["vae"].append((noise,))
    return rows


@torch.inference_mode()
def run_stage(measure: Any, bundle: Any, stage: str, batch: int, config: str | None = None) -> None:
    rows = inputs(bundle, batch)
    if stage == "decode":
        rows["decode"] = [(bundle.unet.encode(*arguments),) for arguments in rows["encode"]]
    lam = torch.full((batch,), 0.5, device=bundle.device)
    valid = torch.ones((batch, 1), dtype=torch.bool, device=bundle.device)

    def adapt(h: torch.Tensor, h_retr: torch.Tensor) -> torch.Tensor:
        return inject("adapter", h, h_retr, lam=lam, valid=valid, adapter=bundle.adapter)

    calls = {
        "text": bundle.text.encode,
        "encode": bundle.unet.encode,
        "adapter": adapt,
        "decode": bundle.unet.decode,
        "vae": bundle.vae.decode,
    }

    def verify() -> None:
        if stage in ("encode", "decode"):
            noise, timestep, text = rows["encode"][0]
            ours = bundle.unet.decode(bundle.unet.encode(noise, timestep, text))
            theirs = bundle.unet.unet(noise, timestep, text).sample
            assert relative(ours, theirs) < 1e-2
        elif stage == "adapter":
            h, h_retr = rows["adapter"][0]
            other = rows["adapter"][1][1]
            oracle = inject("adapter", h, h_retr, lam=lam, valid=valid, adapter=bundle.adapter, impl="reference")
            assert relative(adapt(h, h_retr), oracle) < 1e-2
            # Another neighbour gives another result.
            assert not torch.equal(adapt(h, h_retr), adapt(h, other))
        elif stage == "text":
            (ids,), (other,) = rows["text"][:2]
            states, raw = bundle.text.encode(ids).hidden_states, bundle.text.text_encoder(input_ids=ids)
            assert relative(states, raw.last_hidden_state) < 1e-2
            assert not torch.equal(states, bundle.text.encode(other).hidden_states)
        else:
            (latents,) = rows["vae"][0]
            module = bundle.vae.module
            # diffusers' own decoder, from unscaled latents to [-1, 1].
            scaled = latents / module.config.scaling_factor + (getattr(module.config, "shift_factor", None) or 0.0)
            raw = (module.decode(scaled).sample / 2 + 0.5).clamp(0, 1)
            assert relative(bundle.vae.decode(latents), raw) < 1e-2

    cost = None
    if config is not None:
        counted = stage_counts(config, torch.float16, batch)[stage]
        # Counted in fp16.
        cost = {"bytes": counted.least_bytes * bundle.dtype.itemsize // 2, "flops": counted.total_flops}
    measure(
        calls[stage], inputs=rows[stage], verify=verify, cost=cost, dtype=bundle.dtype, group=f"stage {stage}",
        sizes={"model": bundle.name, "batch": batch, "pixels": bundle.default_size}, capture=False,
        rounds=2 if stage == "vae" and bundle.device.type == "cpu" and config == "sd21" else None,
        extra={"op": f"stage.{stage}"},
    )  # fmt: skip


def relative(ours: torch.Tensor, reference: torch.Tensor) -> float:
    return float((ours.double() - reference.double()).norm() / reference.double().norm())


@pytest.mark.quick
@pytest.mark.parametrize("stage", STAGES)
def test_stage(measure, bundle, stage):
    if stage == "adapter" and bundle.adapter is None:
        pytest.skip(f"{bundle.name} has no adapter")
    run_stage(measure, bundle, stage, 1)


@pytest.mark.parametrize("batch", [8])
@pytest.mark.parametrize("stage", STAGES)
def test_stage_in_a_batch(measure, bundle, stage, batch):
    if stage == "adapter" and bundle.adapter is None:
        pytest.skip(f"{bundle.name} has no adapter")
    run_stage(measure, bundle, stage, batch)


@pytest.mark.parametrize("stage", STAGES)
def test_stage_at_real_size(measure, sd21, stage):
    run_stage(measure, sd21, stage, 1, config="sd21")


@pytest.mark.quick
def test_tokenize(measure, bundle):
    words = prompts(64)
    measure(
        lambda prompt: bundle.text.tokenize([prompt]), inputs=[(w,) for w in words], device="cpu",
        group="stage tokenize", sizes={"model": bundle.name, "batch": 1}, extra={"op": "stage.tokenize"},
    )  # fmt: skip
