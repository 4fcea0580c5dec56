"""`ragturbo data teacher`: latents that the teacher makes from prompts, stored with the noise they were made from."""

from __future__ import annotations

import time
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
from ragturbo.train.folder import Plan, remaining
from ragturbo.train.progress import loading, local_device, rank_and_world, track
from ragturbo.train.report import DataReport, Left, gather
from ragturbo.train.shards import DTYPES, digest, write_shard
from ragturbo.train.student import trailing_euler


class TeacherSampler:
    """Deterministic Euler steps of the teacher's probability-flow ODE with classifier-free guidance.

    The timestep spacing is trailing, whatever the model's scheduler says: it starts at the student's first σ, so that
    a stored noise and its latents are the input and the target of one student step.
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


@torch.no_grad()
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
    left_out: Sequence[dict[str, Any]] = (),
) -> DataReport:
    """Write this process's share of the missing shards. The arguments are the CLI's options.

    left_out: the rows that `read_prompts` left out, for the report.
    """
    began = time.monotonic()
    if not prompts:
        raise InvalidRequest("no prompts given")
    folder, storage = Path(out).expanduser(), DTYPES[dtype]
    with loading(model):
        bundle, unet = load_teacher(model, device or local_device(), None if precision is None else DTYPES[precision])
    # The batch size is included because the bits of the latents depend on it.
    made_by = {
        "model": model, "teacher": fingerprint(unet), "text_encoder": bundle.fingerprint()["text_encoder"],
        "guidance": guidance, "steps": steps, "seed": seed, "dtype": dtype, "text": store_text, "batch": batch,
        "prompts": digest(prompts),
    }  # fmt: skip
    plan = Plan("teacher", len(prompts), shard_size, made_by)
    plan.check(folder)
    todo = remaining(folder, plan.shards, *rank_and_world())
    sampler = TeacherSampler(unet, bundle.scheduler, steps, guidance)
    size = bundle.unet.unet.config.sample_size
    shape = (bundle.vae.channels, *((size, size) if isinstance(size, int) else size))
    empty = bundle.text.encode(bundle.text.tokenize([""]).input_ids.to(bundle.device)).hidden_states

    def generate(numbers: Sequence[int], left: Left) -> dict[str, Tensor]:
        # The seed of a prompt's noise does not depend on process or shard.
        seeds = [(seed * 0x9E3779B97F4A7C15 + n) % 2**63 for n in numbers]
        draws = [torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
        # Rounded before use, so that the stored noise is exactly what the latents were made from.
        noise = torch.stack(draws).to(storage)
        texts = [prompts[n] for n in numbers]
        tokens = bundle.text.tokenize(texts)
        left.note_tokens(texts, tokens)
        ids = tokens.input_ids
        states = bundle.text.encode(ids.to(bundle.device))
        latents = sampler(noise.to(bundle.device), states.hidden_states, empty)
        if not torch.isfinite(latents).all():
            raise ModelError(
                f"the teacher's latents for prompts {numbers[0]} to {numbers[-1]} are not finite in {unet.dtype}; "
                "try --precision float32"
            )
        fields = {"latents": latents.to(storage), "noise": noise, "input_ids": ids.to(torch.int32)}
        if store_text:
            fields |= {"text": states.hidden_states.to(storage), "key": states.key}
        return {name: value.cpu() for name, value in fields.items()}

    for shard in track(todo, len(todo), "teacher"):
        numbers, left = plan.inputs_of(shard), Left()
        parts = [generate(numbers[i : i + batch], left) for i in range(0, len(numbers), batch)]
        tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        records = [{"caption": prompts[n], "number": n} for n in numbers]
        plan.write_or_check(folder)
        write_shard(folder, shard, tensors, records, left.to_dict())
    return gather(folder, "prompt", plan.shards, len(todo), began, left_out)


def load_teacher(model: str, device: str, dtype: torch.dtype | None) -> tuple[Bundle, Any]:
    """Return the bundle of `model` and its undistilled UNet: teacher_unet/ if it has one, else its own UNet."""
    own = (resolve(model) / TEACHER).is_dir()
    bundle = Bundle.load(model, device=device, dtype=dtype, adapter=False, teacher=own)
    if own:
        return bundle, bundle.teacher
    if bundle.info.distilled:
        raise ModelError(
            f"{model} is distilled (its scheduler is trailing, or its ragturbo.json says so) and has no {TEACHER}/: "
            "guidance with 50 steps needs the undistilled model"
        )
    return bundle, bundle.unet.unet
