"""Others doing the same work in the same run, held to equal results before a speed-up is said."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ragturbo.bench.models import diffusers_pipeline
from ragturbo.model.inject import inject
from ragturbo.model.onestep import make_schedule

if TYPE_CHECKING:
    from ragturbo.model.bundle import Bundle

# DESIGN: fp16 text → image agrees with diffusers' own pipeline on the same noise to at least this.
LEAST_PSNR = 40.0
# Latents' relative error. At SD 2.1's size fp16 rounds to 0.05 %; with random weights another prompt, which an image
# hardly shows, makes 7 %, an adapter that is left out 0.3 %, another neighbour 0.03 %. With zero terminal SNR σ is
# 4,096, and diffusers' own order of operations rounds to 0.01 % in fp32 already.
WITHIN = {torch.float16: 2e-3, torch.bfloat16: 1.5e-2, torch.float32: 1e-3}
# A control must lie this many times farther from the reference than what was compared.
CONTROLS_BY = 10


def psnr(ours: np.ndarray, theirs: np.ndarray) -> float:
    """dB between images in [0, 1]; infinite where they are equal. A NaN anywhere gives NaN, which passes no bar."""
    error = float(np.mean((ours.astype(np.float64) - theirs.astype(np.float64)) ** 2))
    return math.inf if error == 0 else -10 * math.log10(error)


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    a, b = ours.detach().double().cpu(), theirs.detach().double().cpu()
    return float((a - b).norm() / b.norm())


# Prompts, seeds and "latent" or "np" to latents or images.
Draw = Callable[[list[str], list[int], str], Any]


def noise_of(bundle: Bundle, seeds: list[int]) -> torch.Tensor:
    """diffusers' CPU-generator noise of these seeds, (B, c, h, w) fp32."""
    size = bundle.unet.unet.config.sample_size
    shape = (1, bundle.vae.channels, size, size)
    return torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


class Diffusers:
    """diffusers' pipeline over the bundle's own weights, in one step without guidance, as the paper's SD Turbo row."""

    name = "diffusers"

    def __init__(self, bundle: Bundle, *, compile: bool = False, mode: str = "reduce-overhead") -> None:
        """compile: UNet, VAE decoder and text encoder by torch.compile, channels_last. mode: torch.compile's; the
        default records CUDA graphs, and compiles without the minutes of autotuning that "max-autotune" needs."""
        self.bundle, self.compiled = bundle, compile
        self.pipe = pipe = diffusers_pipeline(bundle)
        # Copies, in the layout diffusers loads: our engine lays the bundle's own out anew, which a peer must not gain
        # from; and what a peer's compiler does to its modules must not reach ours.
        layout = torch.channels_last if compile else torch.contiguous_format
        for name in ("unet", "vae"):
            module = copy.deepcopy(getattr(pipe, name))
            setattr(pipe, name, torch.nn.Module.to(module, memory_format=layout))
        if compile:
            self.name = f"diffusers + torch.compile({mode}, channels_last)"
            pipe.unet = torch.compile(pipe.unet, mode=mode, fullgraph=True)
            pipe.vae.decode = torch.compile(pipe.vae.decode, mode=mode, fullgraph=True)
            pipe.text_encoder = torch.compile(pipe.text_encoder, mode=mode)

    def __call__(self, prompts: list[str], seeds: list[int], output_type: str = "np") -> Any:
        noise = noise_of(self.bundle, seeds).to(self.bundle.dtype)
        if self.compiled:
            # One image is one step of the recorded graphs: without the mark, each compiled module begins a new step and
            # may overwrite what the one before it gave.
            torch.compiler.cudagraph_mark_step_begin()
        return self.pipe(
            prompts, latents=noise.to(self.bundle.device), num_inference_steps=1, guidance_scale=0.0,
            output_type=output_type,
        ).images  # fmt: skip


def by_modules(bundle: Bundle, database: Any = None, mode: str = "none") -> Callable[[str, int, int], torch.Tensor]:
    """The reference of every mode, in plain torch: prompt, seed and one neighbour's id to latents, at λ = 1."""
    schedule = make_schedule(bundle.scheduler, 1, distilled=bundle.info.distilled, device=bundle.device)

    @torch.inference_mode()
    def latents(word: str, seed: int, neighbour: int) -> torch.Tensor:
        where, dtype = bundle.device, bundle.dtype
        states = bundle.text.encode(bundle.text.tokenize([word]).input_ids.to(where))
        x = noise_of(bundle, [seed]).to(where) * schedule.init_sigma
        state = bundle.unet.encode(schedule.scale_input(x, 0).to(dtype), schedule.timesteps[0], states.hidden_states)
        h = state.h
        if mode != "none":
            rows = database.features(torch.tensor([[neighbour]])).to(where, dtype)
            lam, valid = torch.ones(1, device=where), torch.ones((1, 1), dtype=torch.bool, device=where)
            h = inject(mode, h, rows, lam=lam, valid=valid, adapter=bundle.adapter, impl="reference")
        return schedule.step(x, bundle.unet.decode(state, h).float(), 0)

    return latents


def generated(gen: Any, mode: str) -> Callable[[str, int, int], torch.Tensor]:
    """The same by a Generator."""

    def latents(word: str, seed: int, neighbour: int) -> torch.Tensor:
        # Random keys are as good as orthogonal to a prompt's: by the cosine λ would be 0 and no neighbour counted.
        options = {"none": {}, "adapter": {"neighbors": [neighbour], "lam": 1.0}}.get(mode, {"neighbors": [neighbour]})
        out: torch.Tensor = gen(word, seed=seed, mode=mode, output_type="latent", **options).images
        return out

    return latents


def latent_agreement(bundle: Bundle, gen: Any, mode: str, words: list[str]) -> dict[str, float]:
    """A Generator's latents against plain torch's, and of another prompt and other noise.

    Another neighbour, whose part may be less than fp16 rounds to, is held against the Generator's own: repeated, its
    latents are the same.
    """
    one, other = (0, 0) if mode == "none" else (int(i) for i in gen.database.ids[:2])
    ours = generated(gen, mode)
    reference = by_modules(bundle, gen.database, mode)(words[0], 0, one)
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


def agreement(ours: Draw, theirs: Draw, words: list[str], others: list[str]) -> dict[str, float]:
    """Latents' relative error and images' PSNR of equal prompts and noise, and of the controls. others: other prompts.

    Images in [0, 1]: they say whether the VAE does the same. Whether the prompt is heeded only latents show.
    """
    seeds = list(range(len(words)))
    noises = [seed + 1000 for seed in seeds]
    reference, image = theirs(words, seeds, "latent"), theirs(words, seeds, "np")
    return {
        "error": relative_error(ours(words, seeds, "latent"), reference),
        "error_other_prompt": relative_error(ours(others, seeds, "latent"), reference),
        "error_other_noise": relative_error(ours(words, noises, "latent"), reference),
        "psnr": psnr(ours(words, seeds, "np"), image),
        "psnr_other_noise": psnr(ours(words, noises, "np"), image),
    }


def refused(info: dict[str, Any], engine: str, dtype: torch.dtype) -> str | None:
    """Why a Generator with this `info` did not run as asked: a time of it would be another engine's. None where it did.

    engine: the name `info["engine"]` must have; "auto" stands for whichever was chosen.
    """
    ways = info["ways"]
    if engine not in ("auto", info["engine"]):
        return f"asked for engine {engine!r}, and {info['engine']!r} ran"
    if plain := ways.get("plain batches"):
        return "; ".join(f"{count} batches ran in plain torch: {why}" for why, count in plain.items())
    wanted = str(dtype).removeprefix("torch.")
    if (vae := ways.get("vae dtype", wanted)) != wanted:
        return f"the VAE ran in {vae} in place of {wanted}: its decoder overflowed"
    return None


def equal(found: dict[str, float], dtype: torch.dtype) -> str | None:
    """Why these are not the same results; None where they are, and no control is."""
    within, error = WITHIN[dtype], found["error"]
    if not error <= within:
        return f"latents {error:.1e} from the reference's, at most {within:.0e} is allowed"
    for control in ("prompt", "noise"):
        far = found[f"error_other_{control}"]
        if not far > max(within, CONTROLS_BY * error):
            return f"latents of another {control} pass as well ({far:.1e}): the comparison proves nothing"
    changed = found.get("changed_by_neighbour")
    if changed is not None and not changed > CONTROLS_BY * found["changed_by_repeating"]:
        return (
            f"another neighbour changes the latents by {changed:.1e}, repeating by {found['changed_by_repeating']:.1e}"
        )
    if "psnr" not in found:
        return None
    if not found["psnr"] >= LEAST_PSNR:
        return f"{found['psnr']:.1f} dB to the reference, at least {LEAST_PSNR:.0f} are needed"
    if not found["psnr_other_noise"] < LEAST_PSNR:
        return f"images of other noise pass as well ({found['psnr_other_noise']:.1f} dB): the comparison proves nothing"
    return None
