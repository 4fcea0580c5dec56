"""The reference engine: one batch in plain torch, on any device, one stage after another."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ragturbo.engine.prompt_cache import PromptCache
from ragturbo.engine.request import Request
from ragturbo.engine.result import Result, Retrieved
from ragturbo.engine.timings import StageClock
from ragturbo.errors import InvalidRequest
from ragturbo.model.bundle import Bundle
from ragturbo.model.inject import blend_weights, cosine, inject
from ragturbo.model.onestep import EulerSchedule, Schedule, guided, make_schedule
from ragturbo.model.text import TextStates

log = logging.getLogger("ragturbo")


class ReferenceEngine:
    name = "reference"

    def __init__(self, bundle: Bundle, *, prompt_cache: int = 0, reason: str = "it was requested") -> None:
        """reason: why this engine was chosen, for `gen.info`."""
        self.bundle = bundle
        self.prompts = PromptCache(prompt_cache)
        self._vae, self._reason = bundle.vae, reason
        self._schedules: dict[int, Schedule] = {}

    @property
    def device(self) -> torch.device:
        return self.bundle.device

    @torch.inference_mode()
    def run(self, request: Request) -> Result:
        clock = StageClock(self.device)
        request = self.prompts.known(request) or request
        with clock.stage("text"):
            text, key = self._text(request)
        result, blend = self._retrieve(request, key, clock)
        latents = self._denoise(request, text, blend, clock)
        image = None
        if request.want != "latent":
            with clock.stage("vae"):
                image = self._decode(latents)
        with clock.stage("copy"):
            _fill(result, request.want, latents, image)
        result.timings = clock.seconds()
        return result

    def load_adapter(self, path: str | os.PathLike[str]) -> None:
        self.bundle.load_adapter(path)

    def describe(self) -> dict[str, Any]:
        prompts = self.prompts
        return {
            "plain torch": self._reason,
            "vae dtype": str(self._vae.dtype).removeprefix("torch."),
            "prompts": {"held": len(prompts), "hits": prompts.hits, "misses": prompts.misses},
        }

    def encode_pairs(self, captions: list[str], images: Tensor) -> tuple[Tensor, Tensor]:
        """Sec. 3.2, uncached: images (B, 3, H, W) in [-1, 1] -> keys (B, K), features (B, S, C)."""
        bundle = self.bundle
        with torch.inference_mode():
            states = self._states(bundle.text.tokenize(captions).input_ids)
            latents = bundle.vae.encode(images.to(self.device, bundle.dtype))
            return states.key, bundle.unet.retrieval_features(latents, states.hidden_states)

    def _states(self, input_ids: Tensor) -> TextStates:
        return self.bundle.text.encode(input_ids.to(self.device))

    def _text(self, request: Request) -> tuple[Tensor, Tensor | None]:
        """The hidden states for the UNet, negative rows first under guidance, and the key to search by."""
        key = None
        if request.text is not None:
            text = request.text.to(self.device, self.bundle.dtype)
        else:
            assert request.input_ids is not None
            ids, rows = request.input_ids, len(request)
            if request.query_ids is not None:
                # One pass for prompts and queries: of a small batch, it takes little longer than for the prompts.
                ids = torch.cat([ids, request.query_ids.flatten(0, 1)])
            states = self._states(ids)
            text, key = states.hidden_states[:rows], states.key[-rows * request.queries :]
            self.prompts.remember(request, text, key)
        if request.query_key is not None:
            key = request.query_key.to(self.device)
        elif request.query_ids is not None and request.input_ids is None:
            key = self._states(request.query_ids.flatten(0, 1)).key
        if request.queries > 1 and key is not None:
            key = key.unflatten(0, (len(request), -1))
        if request.guided:
            if request.negative_text is not None:
                negative = request.negative_text.to(self.device, self.bundle.dtype)
            else:
                assert request.negative_ids is not None
                negative = self._states(request.negative_ids).hidden_states
            text = torch.cat([negative, text])
        return text, key

    def _retrieve(
        self, request: Request, key: Tensor | None, clock: StageClock
    ) -> tuple[Result, Callable[[Tensor], Tensor]]:
        """A result that holds the neighbours, and the function that blends them into h."""
        if request.mode == "none":
            return Result.without_neighbours(torch.ones(len(request), dtype=torch.bool)), lambda h: h
        if (found := request.retrieved) is None:
            if key is None or request.database is None:
                raise InvalidRequest("no search key: give a prompt, query= or neighbors=")
            with clock.stage("search"):
                hits = request.database.search(key, request.texts, request.k, request.searched)
            with clock.stage("gather"):
                found = request.database.gather(hits.ids, hits.scores, hits.rare_share)
            bm25 = hits.bm25
        else:
            bm25 = torch.full_like(found.scores, float("nan"))
        found = found.map(lambda value: value.to(self.device))
        assert found.rare_share is not None
        # Embeddings without a query have no key: neighbours have equal weights, and the caller gives λ.
        similarity = torch.ones_like(found.scores) if key is None else cosine(key, found.keys)
        limit, given = request.min_score.to(self.device), request.lam.to(self.device)
        weights = torch.maximum(similarity, found.rare_share)
        lams, valid = blend_weights(weights, found.ids, found.scores, min_score=limit, lam=given)
        ok = torch.ones(len(request), dtype=torch.bool)
        result = Result(ok, lams.amax(-1), found.ids, found.scores, similarity, valid, bm25, lams)
        return result, partial(self._inject, request, found, lams, valid)

    def _inject(self, request: Request, found: Retrieved, lams: Tensor, valid: Tensor, h: Tensor) -> Tensor:
        """Blend the neighbours into h. Under guidance the rows of the negative prompt stay unchanged."""
        negative = len(request) if request.guided else 0
        out = inject(
            request.mode,
            h[negative:],
            found.h_retr.to(h.dtype),
            lam=lams,
            w=request.w.to(self.device),
            valid=valid,
            adapter=self.bundle.adapter,
            per=request.per,
            phrases=None if request.searched is None else request.searched.to(self.device),
        )
        return torch.cat([h[:negative], out]) if negative else out

    def _denoise(self, request: Request, text: Tensor, blend: Callable[[Tensor], Tensor], clock: StageClock) -> Tensor:
        bundle = self.bundle
        schedule = self._schedule(request.num_inference_steps)
        generators = None
        if not isinstance(schedule, EulerSchedule):
            generators = [torch.Generator("cpu").manual_seed(s) for s in request.seeds if s is not None] or None
        x = request.latents.to(self.device) * schedule.init_sigma
        for i, timestep in enumerate(schedule.timesteps):
            model_input = schedule.scale_input(x, i).to(bundle.dtype)
            if request.guided:
                model_input = torch.cat([model_input, model_input])
            with clock.stage("encode"):
                state = bundle.unet.encode(model_input, timestep, text)
            with clock.stage("adapter"):
                h = blend(state.h)
            with clock.stage("decode"):
                out = bundle.unet.decode(state, h).float()
            if request.guided:
                negative, positive = out.chunk(2)
                out = guided(negative, positive, request.guidance_scale)
            x = schedule.step(x, out, i, generators)
        return x

    def _decode(self, latents: Tensor) -> Tensor:
        """Decode to [0, 1]. If the decoder overflows in fp16 at finite latents, use an fp32 copy from then on."""
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
            # diffusers' schedulers keep the state of a run; only the closed form can be reused.
            if isinstance(schedule, EulerSchedule):
                self._schedules[steps] = schedule
        return schedule


def _fill(result: Result, want: str, latents: Tensor, image: Tensor | None) -> None:
    for name in ("lam", "ids", "scores", "cosine", "valid", "bm25", "lams"):
        setattr(result, name, getattr(result, name).cpu())
    ok = torch.isfinite(latents).flatten(1).all(1)
    if image is None:
        result.latents = latents.cpu()
    else:
        ok &= torch.isfinite(image).flatten(1).all(1)
        if want == "float":
            result.image = image.cpu()
        else:
            # Round half to even, as diffusers' image processor does.
            result.uint8 = (image * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu()
    result.ok = ok.cpu()
