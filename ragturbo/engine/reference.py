"""The oracle: the whole way of one batch in plain torch, on any device, one stage after another."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ragturbo.engine.prompt_cache import PromptCache
from ragturbo.engine.step import Retrieved, StepBatch, StepResult
from ragturbo.engine.timings import StageClock
from ragturbo.errors import InvalidRequest
from ragturbo.model.bundle import Bundle
from ragturbo.model.inject import blend_weights, inject
from ragturbo.model.onestep import EulerSchedule, Schedule, guided, make_schedule
from ragturbo.model.text import TextStates

log = logging.getLogger("ragturbo")


class ReferenceEngine:
    name = "eager"

    def __init__(self, bundle: Bundle, *, prompt_cache: int = 0, why_plain: str = "it is the oracle") -> None:
        """why_plain: for `gen.info`, why it is this engine that runs."""
        self.bundle = bundle
        self.prompts = PromptCache(prompt_cache)
        self._vae, self._why_plain = bundle.vae, why_plain
        self._schedules: dict[int, Schedule] = {}

    @property
    def device(self) -> torch.device:
        return self.bundle.device

    @torch.inference_mode()
    def run(self, batch: StepBatch) -> StepResult:
        clock = StageClock(self.device)
        batch = self.prompts.known(batch) or batch
        with clock.stage("text"):
            text, key = self._text(batch)
        found = self._retrieve(batch, key, clock)
        latents = self._denoise(batch, text, found, clock)
        image = None
        if batch.want != "latent":
            with clock.stage("vae"):
                image = self._decode(latents)
        with clock.stage("copy"):
            result = _to_host(batch, latents, image, found)
        result.timings = clock.seconds()
        return result

    def load_adapter(self, path: str | os.PathLike[str]) -> None:
        self.bundle.load_adapter(path)

    def describe(self) -> dict[str, Any]:
        prompts = self.prompts
        return {
            "plain torch": self._why_plain,
            "vae dtype": str(self._vae.dtype).removeprefix("torch."),
            "prompts": {"held": len(prompts), "hits": prompts.hits, "misses": prompts.misses},
        }

    def encode_pairs(self, captions: list[str], images: Tensor) -> tuple[Tensor, Tensor]:
        """Sec. 3.2 on the spot: images (B, 3, H, W) in [-1, 1] -> keys (B, K), features (B, T, C)."""
        bundle = self.bundle
        with torch.inference_mode():
            states = self._states(bundle.text.tokenize(captions).input_ids)
            latents = bundle.vae.encode(images.to(self.device, bundle.dtype))
            return states.key, bundle.unet.retrieval_features(latents, states.hidden_states)

    def _states(self, input_ids: Tensor) -> TextStates:
        return self.bundle.text.encode(input_ids.to(self.device))

    def _text(self, batch: StepBatch) -> tuple[Tensor, Tensor | None]:
        """The UNet's context, negative rows first where guided, and the key to search by."""
        key = None
        if batch.text is not None:
            text = batch.text.to(self.device, self.bundle.dtype)
        else:
            assert batch.input_ids is not None
            states = self._states(batch.input_ids)
            text, key = states.hidden_states, states.key
            self.prompts.remember(batch, text, key)
        if batch.query_key is not None:
            key = batch.query_key.to(self.device)
        elif batch.query_ids is not None:
            key = self._states(batch.query_ids).key
        if batch.guided:
            if batch.negative_text is not None:
                negative = batch.negative_text.to(self.device, self.bundle.dtype)
            else:
                assert batch.negative_ids is not None
                negative = self._states(batch.negative_ids).hidden_states
            text = torch.cat([negative, text])
        return text, key

    def _retrieve(self, batch: StepBatch, key: Tensor | None, clock: StageClock) -> Found | None:
        if batch.mode == "none":
            return None
        if (found := batch.retrieved) is None:
            if key is None or batch.source is None:
                raise InvalidRequest("nothing to search by: give a prompt, query= or neighbors=")
            with clock.stage("search"):
                ids, scores = batch.source.search(key, batch.texts or None, batch.k)
            with clock.stage("gather"):
                found = batch.source.gather(ids, scores)
        found = Retrieved(*(t.to(self.device) for t in (found.ids, found.scores, found.keys, found.h_retr)))
        # Embeddings without a query have no key: their neighbours weigh the same, and λ is the caller's.
        cosine = torch.ones_like(found.scores) if key is None else cosine_of(key, found.keys)
        limit, given = batch.min_score.to(self.device), batch.lam.to(self.device)
        lam, valid = blend_weights(cosine, found.ids, found.scores, min_score=limit, lam=given)
        return Found(found, cosine, lam, valid)

    def _denoise(self, batch: StepBatch, text: Tensor, found: Found | None, clock: StageClock) -> Tensor:
        bundle = self.bundle
        schedule = self._schedule(batch.num_inference_steps)
        generators = None
        if not isinstance(schedule, EulerSchedule):
            generators = [torch.Generator("cpu").manual_seed(s) for s in batch.seeds if s is not None] or None
        x = batch.latents.to(self.device) * schedule.init_sigma
        for i, timestep in enumerate(schedule.timesteps):
            model_input = schedule.scale_input(x, i).to(bundle.dtype)
            if batch.guided:
                model_input = torch.cat([model_input, model_input])
            with clock.stage("encode"):
                state = bundle.unet.encode(model_input, timestep, text)
            with clock.stage("adapter"):
                h = state.h if found is None else self._inject(batch, state.h, found)
            with clock.stage("decode"):
                out = bundle.unet.decode(state, h).float()
            if batch.guided:
                negative, positive = out.chunk(2)
                out = guided(negative, positive, batch.guidance_scale)
            x = schedule.step(x, out, i, generators)
        return x

    def _inject(self, batch: StepBatch, h: Tensor, found: Found) -> Tensor:
        """Retrieval speaks for the prompt: under guidance the negative half stays as it is."""
        negative = len(batch) if batch.guided else 0
        out = inject(
            batch.mode,
            h[negative:],
            found.rows.h_retr.to(h.dtype),
            lam=found.lam,
            w=batch.w.to(self.device),
            valid=found.valid,
            weights=found.cosine,
            adapter=self.bundle.adapter,
            per=batch.per,
        )
        return torch.cat([h[:negative], out]) if negative else out

    def _decode(self, latents: Tensor) -> Tensor:
        """In [0, 1]. A decoder that overflows in fp16, at finite latents, is a copy in fp32 from then on."""
        image = self._vae.decode(latents).float()
        if self._vae.dtype != torch.float16:
            return image
        lost = torch.isfinite(latents).flatten(1).all(1) & ~torch.isfinite(image).flatten(1).all(1)
        if not bool(lost.any()):
            return image
        log.warning("the VAE's decoder overflows in float16: it runs in float32 from now on")
        self._vae = self._vae.decoder_in(torch.float32)
        return self._vae.decode(latents)

    def _schedule(self, steps: int) -> Schedule:
        if (schedule := self._schedules.get(steps)) is None:
            distilled = self.bundle.info.distilled
            schedule = make_schedule(self.bundle.scheduler, steps, distilled=distilled, device=self.device)
            # The closed form has no state; diffusers' schedulers carry a run's own.
            if isinstance(schedule, EulerSchedule):
                self._schedules[steps] = schedule
        return schedule


@dataclass
class Found:
    rows: Retrieved
    cosine: Tensor
    """(B, k): λ before the mean."""
    lam: Tensor
    valid: Tensor


def cosine_of(key: Tensor, stored: Tensor) -> Tensor:
    """λ before the mean: (B, K), (B, k, K) unit vectors -> (B, k) in [0, 1]."""
    return torch.einsum("bd,bkd->bk", key.float(), stored.float()).clamp(0, 1)


def _to_host(batch: StepBatch, latents: Tensor, image: Tensor | None, found: Found | None) -> StepResult:
    rows = len(batch)
    ok = torch.isfinite(latents).flatten(1).all(1)
    if image is not None:
        ok &= torch.isfinite(image).flatten(1).all(1)
    result = StepResult(
        ok=ok.cpu(),
        lam=torch.zeros(rows),
        ids=torch.empty((rows, 0), dtype=torch.int64),
        scores=torch.empty((rows, 0)),
        cosine=torch.empty((rows, 0)),
        valid=torch.empty((rows, 0), dtype=torch.bool),
    )
    if found is not None:
        result.lam, result.valid = found.lam.cpu(), found.valid.cpu()
        result.ids, result.scores, result.cosine = found.rows.ids.cpu(), found.rows.scores.cpu(), found.cosine.cpu()
    if batch.want == "latent":
        result.latents = latents.cpu()
    elif batch.want == "float":
        assert image is not None
        result.image = image.cpu()
    else:
        assert image is not None
        # As diffusers' image processor rounds: half to even.
        result.uint8 = (image * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu()
    return result
