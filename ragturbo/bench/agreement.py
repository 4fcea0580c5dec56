"""Compare a Generator's latents with plain torch's before its times are published."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ragturbo.model.inject import inject
from ragturbo.model.onestep import make_schedule

if TYPE_CHECKING:
    from ragturbo.model.bundle import Bundle

# Minimum PSNR of fp16 images against diffusers' pipeline on the same noise, in dB.
LEAST_PSNR = 40.0
# Maximum relative error of latents. At SD 2.1's size fp16 rounding gives 5e-4. With random weights another prompt gives
# 7e-2, a missing adapter 3e-3 and another neighbour 3e-4. With zero terminal SNR, sigma is 4,096 and diffusers' order
# of operations already gives 1e-4 in fp32.
WITHIN = {torch.float16: 2e-3, torch.bfloat16: 1.5e-2, torch.float32: 1e-3}
# The error of a control must exceed the measured error by this factor.
CONTROLS_BY = 10

# (prompt, seed, neighbour id) -> latents
Latents = Callable[[str, int, int], torch.Tensor]


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    a, b = ours.detach().double().cpu(), theirs.detach().double().cpu()
    return float((a - b).norm() / b.norm())


def noise_of(bundle: Bundle, seeds: list[int]) -> torch.Tensor:
    """Return the (B, c, h, w) fp32 noise that diffusers draws with CPU generators of these seeds."""
    size = bundle.unet.unet.config.sample_size
    shape = (1, bundle.vae.channels, size, size)
    return torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def plain_latents(bundle: Bundle, database: Any = None, mode: str = "none") -> Latents:
    """Return the plain torch reference of a mode: one step with one neighbour at λ = 1."""
    schedule = make_schedule(bundle.scheduler, 1, distilled=bundle.info.distilled, device=bundle.device)

    @torch.inference_mode()
    def latents(prompt: str, seed: int, neighbour: int) -> torch.Tensor:
        where, dtype = bundle.device, bundle.dtype
        states = bundle.text.encode(bundle.text.tokenize([prompt]).input_ids.to(where))
        x = noise_of(bundle, [seed]).to(where) * schedule.init_sigma
        state = bundle.unet.encode(schedule.scale_input(x, 0).to(dtype), schedule.timesteps[0], states.hidden_states)
        h = state.h
        if mode != "none":
            rows = database.features(torch.tensor([[neighbour]])).to(where, dtype)
            lam, valid = torch.ones(1, device=where), torch.ones((1, 1), dtype=torch.bool, device=where)
            h = inject(mode, h, rows, lam=lam, valid=valid, adapter=bundle.adapter, impl="reference")
        return schedule.step(x, bundle.unet.decode(state, h).float(), 0)

    return latents


def generator_latents(gen: Any, mode: str) -> Latents:
    """Return the same latents computed by a Generator."""

    def latents(prompt: str, seed: int, neighbour: int) -> torch.Tensor:
        # Random keys are nearly orthogonal to a prompt's key: a λ from the cosine would be close to 0.
        options = {"none": {}, "adapter": {"neighbors": [neighbour], "lam": 1.0}}.get(mode, {"neighbors": [neighbour]})
        out: torch.Tensor = gen(prompt, seed=seed, mode=mode, output_type="latent", **options).images
        return out

    return latents


def latent_agreement(bundle: Bundle, gen: Any, mode: str, words: list[str]) -> dict[str, float]:
    """Return the relative error of a Generator's latents against plain torch's, and of the controls.

    The controls are another prompt and another noise. The effect of another neighbour may be below fp16 rounding, so
    it is measured against the Generator's own latents, which are the same when repeated.

    Args:
        words: two prompts.
    """
    one, other = (0, 0) if mode == "none" else (int(i) for i in gen.database.ids[:2])
    ours = generator_latents(gen, mode)
    reference = plain_latents(bundle, gen.database, mode)(words[0], 0, one)
    first = ours(words[0], 0, one)
    found = {
        "error": relative_error(first, reference),
        "error_other_prompt": relative_error(ours(words[1], 0, one), reference),
        "error_other_noise": relative_error(ours(words[0], 1, one), reference),
    }
    if mode != "none":
        found["changed_by_repeating"] = relative_error(ours(words[0], 0, one), first)
        found["changed_by_neighbour"] = relative_error(ours(words[0], 0, other), first)
    return found


def disagreement(found: dict[str, float], dtype: torch.dtype) -> str | None:
    """Return why a comparison fails, or None if the results agree and no control does.

    Args:
        found: what `latent_agreement` or `benchmarks.diffusers_peer.agreement` returns.
    """
    within, error = WITHIN[dtype], found["error"]
    # Comparisons are negated so that a NaN fails.
    if not error <= within:
        return f"latents differ from the reference's by {error:.1e}, allowed: {within:.0e}"
    for control in ("prompt", "noise"):
        far = found[f"error_other_{control}"]
        if not far > max(within, CONTROLS_BY * error):
            return f"latents of another {control} pass as well ({far:.1e}), so the comparison proves nothing"
    changed = found.get("changed_by_neighbour")
    if changed is not None and not changed > CONTROLS_BY * found["changed_by_repeating"]:
        return (
            f"another neighbour changes the latents by {changed:.1e}, repeating by {found['changed_by_repeating']:.1e}"
        )
    if "psnr" not in found:
        return None
    if not found["psnr"] >= LEAST_PSNR:
        return f"PSNR to the reference is {found['psnr']:.1f} dB, required: {LEAST_PSNR:.0f} dB"
    if not found["psnr_other_noise"] < LEAST_PSNR:
        far = found["psnr_other_noise"]
        return f"images of other noise pass as well ({far:.1f} dB), so the comparison proves nothing"
    return None


def engine_mismatch(info: dict[str, Any], engine: str, dtype: torch.dtype) -> str | None:
    """Return why a Generator did not run as requested, or None if it did.

    Args:
        info: `Generator.info` after the measured calls.
        engine: the expected `info["engine"]`; "auto" accepts any.
        dtype: the expected dtype of the VAE.
    """
    ways = info["ways"]
    if engine not in ("auto", info["engine"]):
        return f"engine {engine!r} was requested, {info['engine']!r} ran"
    if plain := ways.get("plain batches"):
        return "; ".join(f"{count} batches ran in plain torch: {why}" for why, count in plain.items())
    wanted = str(dtype).removeprefix("torch.")
    if (vae := ways.get("vae dtype", wanted)) != wanted:
        return f"the VAE ran in {vae} instead of {wanted}: its decoder overflowed"
    return None
