"""The paper's pipeline: eager modules in sequence, an fp32 VAE, search on the CPU."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import LCMScheduler, PNDMScheduler, StableDiffusionPipeline
from torch import Tensor

from ragturbo.bench.agreement import noise_of
from ragturbo.bench.models import SCHEDULE
from ragturbo.engine.timings import StageClock
from ragturbo.model.bundle import Bundle
from ragturbo.model.inject import inject
from ragturbo.model.vae import VAE
from ragturbo.output import to_pil
from ragturbo.retrieval import Database, Retriever

RETRIEVAL = ("search", "gather", "encode pair")
PNDM: dict[str, Any] = {"skip_prk_steps": True, "steps_offset": 1, "set_alpha_to_one": False}


@dataclass
class TimedImage:
    image: Any
    latents: Tensor
    seconds: float
    stages: dict[str, float] = field(default_factory=dict)


class EagerPipeline:
    """One model of Fig. 6: `steps` evaluations, with guidance twice as many."""

    def __init__(
        self, bundle: Bundle, kind: str, *, steps: int, guidance: float = 0.0, search: Retriever | None = None,
        database: Database | None = None, uncached: Callable[[int], tuple[str, Tensor]] | None = None,
    ) -> None:  # fmt: skip
        """
        Args:
            kind: "teacher", "lcm", "turbo" or "ours".
            database: holds the features of the ids that `search` returns.
            uncached: returns (caption, pixels (1, 3, H, W)) of an id; the pair is then encoded for every request
                instead of read from the database.
        """
        self.bundle, self.kind, self.steps, self.guidance = bundle, kind, steps, guidance
        self._search, self._database, self._uncached = search, database, uncached
        # diffusers decodes SD's latents in fp32 (force_upcast), because the original VAE overflows in fp16.
        self.vae = bundle.vae
        if bundle.dtype != torch.float32:
            self.vae = VAE(torch.nn.Module.to(copy.deepcopy(bundle.vae.module), torch.float32))
        self.scheduler = _scheduler(kind, bundle)

    @torch.inference_mode()
    def __call__(self, prompt: str, seed: int) -> TimedImage:
        bundle, where = self.bundle, self.bundle.device
        clock = StageClock(where)
        start = time.perf_counter()
        words = ["", prompt] if self.guidance > 1 else [prompt]
        ids = bundle.text.tokenize(words).input_ids
        tokenized = time.perf_counter() - start
        with clock.stage("text"):
            states = bundle.text.encode(ids.to(where))
        h_retr = lam = None
        searched = 0.0
        if self._search is not None:
            begin = time.perf_counter()
            key = states.key[-1:].float().cpu()
            found, _ = self._search.search(key, 1)
            searched = time.perf_counter() - begin
            h_retr, lam = self._retrieve(key, found, clock)
        latents = self._denoise(states.hidden_states, h_retr, lam, seed, clock)
        with clock.stage("vae"):
            image = self.vae.decode(latents.float())
        with clock.stage("copy"):
            array = (image.float() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()
        out = to_pil(array)[0]
        seconds = time.perf_counter() - start
        stages = {"tokenize": tokenized, **clock.seconds()}
        if self._search is not None:
            stages["search"] = searched
        return TimedImage(out, latents, seconds, stages)

    def _retrieve(self, key: Tensor, found: Tensor, clock: StageClock) -> tuple[Tensor, Tensor]:
        bundle, where = self.bundle, self.bundle.device
        assert self._database is not None
        with clock.stage("gather"):
            keys = self._database.keys(found)
            h_retr = self._database.features(found).to(where, bundle.dtype)
            lam = torch.einsum("bd,bkd->bk", key, keys).clamp(0, 1).to(where)
        if self._uncached is not None:
            caption, pixels = self._uncached(int(found[0, 0]))
            with clock.stage("encode pair"):
                # Fig. 2 without the cache.
                text = bundle.text.encode(bundle.text.tokenize([caption]).input_ids.to(where)).hidden_states
                latents = bundle.vae.encode(pixels.to(where, bundle.dtype))
                h_retr = bundle.unet.retrieval_features(latents, text)[:, None]
        return h_retr, lam

    def _denoise(self, text: Tensor, h_retr: Tensor | None, lam: Tensor | None, seed: int, clock: StageClock) -> Tensor:
        bundle, scheduler = self.bundle, self.scheduler
        scheduler.set_timesteps(self.steps, device=bundle.device)
        generator = torch.Generator().manual_seed(seed)
        x = noise_of(bundle, [seed]).to(bundle.device, bundle.dtype) * scheduler.init_noise_sigma
        conditions: dict[str, Any] = {}
        if width := bundle.unet.unet.config.time_cond_proj_dim:
            # LCM takes the guidance scale as an embedding; 8.5 is the scale of the authors' example.
            embed = StableDiffusionPipeline.get_guidance_scale_embedding
            embedding = embed(None, torch.tensor([8.5 - 1]), embedding_dim=width)  # type: ignore[arg-type]
            conditions["timestep_cond"] = embedding.to(bundle.device, bundle.dtype)
        for timestep in scheduler.timesteps:
            sample = torch.cat([x, x]) if self.guidance > 1 else x
            sample = scheduler.scale_model_input(sample, timestep)
            with clock.stage("encode"):
                state = bundle.unet.encode(sample, timestep, text, **conditions)
            h = None
            if h_retr is not None:
                with clock.stage("adapter"):
                    h = inject("adapter", state.h, h_retr, lam=lam, adapter=bundle.adapter, impl="sdpa")
            with clock.stage("decode"):
                out = bundle.unet.decode(state, h)
            with clock.stage("scheduler"):
                if self.guidance > 1:
                    negative, positive = out.chunk(2)
                    out = negative + self.guidance * (positive - negative)
                options = {"generator": generator} if self.kind == "lcm" else {}
                stepped = scheduler.step(out, timestep, x, **options)
                x = stepped.prev_sample
        # LCM's scheduler returns the denoised sample apart from the noised one of the next step.
        return stepped.denoised if self.kind == "lcm" else x


def _scheduler(kind: str, bundle: Bundle) -> Any:
    """Return PNDM for the teacher, as SD 2.1-base ships it, LCM's own, and Euler for one step."""
    if kind == "teacher":
        return PNDMScheduler(**SCHEDULE, **PNDM)
    if kind == "lcm":
        return LCMScheduler(**SCHEDULE)
    return type(bundle.scheduler).from_config(bundle.scheduler.config)
