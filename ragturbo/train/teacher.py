"""`ragturbo data teacher`: prompts to the teacher's latents, stored with the noise that made them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ragturbo.errors import InvalidRequest, ModelError
from ragturbo.model.bundle import TEACHER, Bundle
from ragturbo.model.fingerprint import fingerprint
from ragturbo.model.onestep import EulerSchedule
from ragturbo.model.source import resolve
from ragturbo.train.progress import local_device, rank_and_world, track
from ragturbo.train.shards import DTYPES, Plan, digest, remaining, write_shard
from ragturbo.train.student import trailing_euler

# As a training configuration calls them.
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


class TeacherSampler:
    """The teacher's probability-flow ODE by deterministic Euler steps with classifier-free guidance.

    Trailing, whatever spacing its folder names: it starts at the student's own first σ, so that a noise and its latents
    are the two ends of what one step of the student has to cross.
    """

    def __init__(self, unet: Any, scheduler: Any, steps: int = 50, guidance: float = 7.5) -> None:
        self.unet, self.guidance = unet, guidance
        trailing = trailing_euler(scheduler)
        trailing.set_timesteps(steps, device=unet.device)
        first, kind = float(trailing.init_noise_sigma), trailing.config.prediction_type
        self.schedule = EulerSchedule(trailing.sigmas.tolist(), trailing.timesteps, first, kind)

    @torch.no_grad()
    def __call__(self, noise: Tensor, text: Tensor, empty: Tensor) -> Tensor:
        """noise: (B, c, H, W), unit variance; text: (B, L, D); empty: (1, L, D), the states of "" -> latents, fp32."""
        guided = self.guidance != 1
        states = torch.cat([empty.expand_as(text), text]) if guided else text
        x = noise.float() * self.schedule.init_sigma
        for i, t in enumerate(self.schedule.timesteps):
            sample = self.schedule.scale_input(x, i).to(self.unet.dtype)
            if guided:
                without, out = self.unet(torch.cat([sample, sample]), t, states).sample.float().chunk(2)
                out = without + self.guidance * (out - without)
            else:
                out = self.unet(sample, t, states).sample.float()
            x = self.schedule.step(x, out, i)
        return x


def make_teacher_data(
    prompts: Sequence[str],
    out: str | Path,
    *,
    model: str,
    guidance: float = 7.5,
    steps: int = 50,
    seed: int = 0,
    batch: int = 16,
    shard_size: int = 1024,
    dtype: str = "float16",
    store_text: bool = False,
    precision: str | None = None,
    device: str | None = None,
) -> int:
    """Writes the shards that are missing of this process's share; returns how many. Run again, it goes on."""
    if not prompts:
        raise InvalidRequest("there are no prompts")
    folder, storage = Path(out), DTYPES[dtype]
    bundle, unet = load_teacher(model, device or local_device(), precision)
    plan = Plan(
        "teacher",
        len(prompts),
        shard_size,
        {
            "model": model,
            "teacher": fingerprint(unet),
            "text_encoder": bundle.fingerprint()["text_encoder"],
            "guidance": guidance,
            "steps": steps,
            "seed": seed,
            "dtype": dtype,
            "text": store_text,
            # A batch's size is part of its bits.
            "batch": batch,
            "prompts": digest(prompts),
        },
    )
    plan.write_or_check(folder)
    todo = remaining(folder, plan.shards, *rank_and_world())
    sampler = TeacherSampler(unet, bundle.scheduler, steps, guidance)
    empty = bundle.text.encode(bundle.text.tokenize([""]).input_ids.to(bundle.device)).hidden_states
    for shard in track(todo, len(todo), "teacher"):
        numbers = list(plan.inputs_of(shard))
        parts = [
            _latents(bundle, sampler, empty, prompts, numbers[i : i + batch], seed, storage, store_text)
            for i in range(0, len(numbers), batch)
        ]
        tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        write_shard(folder, shard, tensors, [{"caption": prompts[n], "number": n} for n in numbers])
    return len(todo)


def load_teacher(model: str, device: str, precision: str | None) -> tuple[Bundle, Any]:
    """A bundle and its undistilled UNet: teacher_unet/ where there is one."""
    dtype = None if precision is None else PRECISIONS.get(precision) or DTYPES[precision]
    own = (resolve(model) / TEACHER).is_dir()
    bundle = Bundle.load(model, device=device, dtype=dtype, adapter=False, teacher=own)
    if own:
        return bundle, bundle.teacher
    if bundle.info.distilled:
        raise ModelError(
            f"{model} is distilled (its scheduler is trailing, or its ragturbo.json says so) and has no {TEACHER}/: "
            "guidance and 50 steps need the undistilled model it came from"
        )
    return bundle, bundle.unet.unet


def _latents(
    bundle: Bundle,
    sampler: TeacherSampler,
    empty: Tensor,
    prompts: Sequence[str],
    numbers: Sequence[int],
    seed: int,
    storage: torch.dtype,
    store_text: bool,
) -> dict[str, Tensor]:
    size = bundle.unet.unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    shape = (bundle.vae.channels, height, width)
    draws = [torch.randn(shape, generator=torch.Generator().manual_seed(_seed(seed, n))) for n in numbers]
    # Rounded before it is used: the stored noise is the one that made the latents.
    noise = torch.stack(draws).to(storage)
    ids = bundle.text.tokenize([prompts[n] for n in numbers]).input_ids
    with torch.no_grad():
        states = bundle.text.encode(ids.to(bundle.device))
    latents = sampler(noise.to(bundle.device), states.hidden_states, empty)
    if not torch.isfinite(latents).all():
        raise ModelError(
            f"the teacher's latents for prompts {numbers[0]} to {numbers[-1]} are not finite in {sampler.unet.dtype}; "
            "try --precision float32"
        )
    fields = {"latents": latents.to(storage), "noise": noise, "input_ids": ids.to(torch.int32)}
    if store_text:
        fields |= {"text": states.hidden_states.to(storage), "key": states.key}
    return {name: value.cpu() for name, value in fields.items()}


def _seed(seed: int, number: int) -> int:
    """One noise a prompt, whichever process and shard it is in."""
    return (seed * 0x9E3779B97F4A7C15 + number) % 2**63
