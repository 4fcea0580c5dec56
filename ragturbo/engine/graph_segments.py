"""The device work of one batch, split into segments over fixed buffers. Each segment can be a CUDA graph.

Everything that varies between requests is read from the arenas. No segment waits for the device or creates a tensor on
the host, and host-device copies happen only in Arena.upload and Arena.download.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ragturbo.engine.buffers import Buffers
from ragturbo.engine.fast_model import FastModel
from ragturbo.engine.recorder import Recorder
from ragturbo.engine.spec import Spec
from ragturbo.errors import InvalidRequest
from ragturbo.model.adapter import RetrievedKV
from ragturbo.model.inject import blend_weights, cosine, inject
from ragturbo.ops import Rows, gather_rows, to_uint8, topk


class Segments:
    """The segments of one spec, their arenas, and the tensors that pass between them."""

    def __init__(
        self, model: FastModel, spec: Spec, recorder: Recorder, *, page_locked: bool, caches_prompts: bool = False
    ) -> None:
        """caches_prompts: the prompt cache reads `key` and `text_kv` after a run."""
        self.model, self.spec, self.recorder, self._caches_prompts = model, spec, recorder, caches_prompts
        self.buffers = Buffers(spec, model.bundle, page_locked=page_locked)
        # Kept as attributes, so that the allocator does not reuse a tensor's memory while the other stream reads it.
        self.key: Tensor | None = None
        self.text_kv: Any = None
        self.state: Any = None
        self.features: Any = None
        # Copied from the prompt cache on the device, not through an arena.
        self.cached_kv: Tensor | None = None
        if spec.cached:
            shape = (spec.rows, spec.length, model.unet.text_kv_width)
            self.cached_kv = torch.empty(shape, dtype=model.dtype, device=model.device)
        empty = torch.empty(0)
        self.rows_found = self.scores = self.lam = self.lams = self.valid = self.cosine = empty

    def release(self) -> None:
        """Drop the tensors passed between segments, so that later recordings reuse their memory. This is safe because
        no other graph runs between this spec's segments. The prompt cache reads key and text_kv after a run."""
        self.state = self.features = None
        if not self._caches_prompts:
            self.text_kv = self.key = None

    # The segments

    def encode_text(self) -> None:
        """Prompts to hidden states and search key: the first graph."""
        with self.recorder.stage("copy"):
            self.buffers.text_inputs.upload()
            if self.spec.split:
                self.buffers.inputs.upload()
        with self.recorder.stage("text"):
            self._text()
        if self.spec.split:
            if self.spec.searches:
                self._search()
                self.buffers.to_host.device["rows"].copy_(self.rows_found)
                self.buffers.to_host.device["scores"].copy_(self.scores)
            else:
                assert self.key is not None
                self.buffers.to_host.device["key"].copy_(self.key)
            with self.recorder.stage("copy"):
                self.buffers.to_host.download()

    def generate(self) -> None:
        """Everything after the text encoder, if retrieval needs no host work: it runs beside the UNet's encoder and is
        joined before the adapter."""
        with self.recorder.stage("copy"):
            self.buffers.inputs.upload()
        if self.spec.mode != "none":
            with self.recorder.fork():
                self._search()
                self._gather()
        self.encode()
        if self.spec.mode != "none":
            self.recorder.join()
        self.finish()

    def encode(self) -> None:
        """The UNet's encoder at the first timestep, beside retrieval. Split: the second graph."""
        spec, model = self.spec, self.model
        with self.recorder.stage("encode"):
            latents = self.buffers.inputs.device["latents"]
            sample = (latents * model.schedules[spec.steps].constants[0].p).to(model.sample_dtype)
            if model.device.type == "cuda":
                sample = sample.contiguous(memory_format=torch.channels_last)
            self.state = model.unet.encode(sample, model.timestep(spec.steps, 0), self.text_kv)

    def gather(self) -> None:
        """On the retrieval stream, after the host's part of a split retrieval: features, λ, the adapter's K and V."""
        with self.recorder.stage("copy"):
            self.buffers.from_host.upload()
        self._gather()

    def finish(self) -> None:
        """Adapter, decoder, further steps, VAE, and the copy to the host. Split: the third graph."""
        spec, model = self.spec, self.model
        x = self.buffers.inputs.device["latents"]
        for i, c in enumerate(model.schedules[spec.steps].constants):
            state = self.state
            if i > 0:
                with self.recorder.stage("encode"):
                    state = model.unet.encode(
                        (x * c.p).to(model.sample_dtype), model.timestep(spec.steps, i), self.text_kv
                    )
            with self.recorder.stage("adapter"):
                h = self._inject(state.h)
            with self.recorder.stage("decode"):
                out = model.unet.decode(state, h)
            # The scheduler's step.
            x = torch.add(x * c.a, out, alpha=c.b)
        self._write_out(x)

    # Parts of segments

    def _text(self) -> None:
        spec, inputs, model = self.spec, self.buffers.text_inputs.device, self.model
        hidden, key = inputs.get("text"), None
        if spec.has_ids:
            ids = inputs["input_ids"]
            # The prompts and the texts to search by go through the encoder as one batch.
            states = model.text(torch.cat([ids, inputs["query_ids"].flatten(0, 1)]) if spec.query == "ids" else ids)
            hidden, key = states.hidden_states[: spec.rows], states.key[-spec.rows * spec.phrases :]
        elif spec.query == "ids":
            key = model.text(inputs["query_ids"].flatten(0, 1)).key
        self.key = inputs.get("query_key", key)
        if self.key is not None:
            self.key = self.key.view(spec.key_shape(self.key.shape[-1]))
        self.text_kv = self.cached_kv if hidden is None else model.unet.text_kv(hidden)

    def _search(self) -> None:
        spec, inputs = self.spec, self.buffers.inputs.device
        if not spec.searches:
            return
        with self.recorder.stage("search"):
            assert self.key is not None
            query = self.key.flatten(0, -2)
            if spec.centred:
                query = F.normalize(query - inputs["mean"], dim=1)
            rows, scores = topk(inputs["tables"][0], query, spec.k // spec.phrases)
            self.rows_found, self.scores = rows.view(spec.rows, -1), scores.view(spec.rows, -1)
            if spec.phrases > 1:
                # Queries that pad an image's phrases have no neighbours.
                searched = inputs["searched"][:, :, None].expand(-1, -1, rows.shape[1]).flatten(1)
                self.rows_found = torch.where(searched, self.rows_found, -1)
                self.scores = torch.where(searched, self.scores, float("nan"))

    def _gather(self) -> None:
        """Features, cosines of the keys, λ and the adapter's K and V: all that does not depend on h_tgt."""
        spec, inputs, model = self.spec, self.buffers.inputs.device, self.model
        with self.recorder.stage("gather"):
            assert spec.stored is not None
            stored, stride, tokens, channels = spec.stored
            if spec.retrieval == "given":
                ids, self.scores, keys, h_retr, share = (
                    inputs[name] for name in ("ids", "scores", "keys", "h_retr", "rare_share")
                )
            else:
                if spec.retrieval == "resident":
                    ids, share = self.rows_found, None
                    slots = ids
                    tables, width = inputs["tables"], model.bundle.text.key_dim
                    keys = gather_rows(Rows(tables[1], 2 * width, 1, width), ids)[:, :, 0]
                else:
                    found = self.buffers.from_host.device
                    ids, slots, tables = found["ids"], found["slots"], found["tables"]
                    self.scores, keys, share = found["scores"], found["keys"], found["rare_share"]
                h_retr = gather_rows(Rows(tables[2], stride, tokens, channels, stored), slots)
                if spec.hot:
                    hot = self.buffers.from_host.device["hot"]
                    on_device = gather_rows(Rows(tables[3], stride, tokens, channels, stored), hot)
                    h_retr = torch.where((hot >= 0)[..., None, None], on_device, h_retr)
            h_retr = h_retr.to(model.dtype)
            self.cosine = torch.ones_like(self.scores) if self.key is None else cosine(self.key, keys)
            weights = self.cosine if share is None else torch.maximum(self.cosine, share)
            self.lams, self.valid = blend_weights(
                weights, ids, self.scores, min_score=inputs["min_score"], lam=inputs["lam"]
            )
            self.features = h_retr
            if spec.mode == "adapter":
                if model.adapter is None:
                    # Weights without an adapter were loaded after the request was accepted.
                    raise InvalidRequest('mode "adapter" needs an adapter, and the model no longer has one')
                # Here, so that it runs beside the UNet's encoder.
                kv = model.adapter.retrieved_kv(h_retr, phrases=inputs.get("searched"))
                self.features, self.lam = kv.weighted(self.lams)
            else:
                self.lam = self.lams.amax(-1)

    def _inject(self, h: Tensor) -> Tensor:
        spec = self.spec
        if spec.mode == "none":
            return h
        features: Tensor | RetrievedKV = self.features
        return inject(
            spec.mode,
            h,
            features,
            lam=self.lam if spec.mode == "adapter" else self.lams,
            w=self.buffers.inputs.device["w"],
            valid=self.valid,
            adapter=self.model.adapter,
            grid=spec.grid if spec.mode != "adapter" else None,
            per=spec.per,
        )

    def _write_out(self, x: Tensor) -> None:
        """Latents to the wanted form in the output arena, and its copy to the host."""
        spec, model, out = self.spec, self.model, self.buffers.out.device
        finite = torch.isfinite(x).flatten(1).all(1)
        out["latents_ok"].copy_(finite)
        if spec.want == "latent":
            out["latents"].copy_(x)
        else:
            with self.recorder.stage("vae"):
                image = model.decode(x)
                finite = finite & torch.isfinite(image).flatten(1).all(1)
                if spec.want == "float":
                    out["image"].copy_((image.float() / 2 + 0.5).clamp(0, 1))
                else:
                    out["uint8"].copy_(to_uint8(image))
        out["ok"].copy_(finite)
        if spec.mode != "none":
            out["lam"].copy_(self.lam)
            out["valid"].copy_(self.valid)
            out["scores"].copy_(self.scores)
            out["cosine"].copy_(self.cosine)
            out["lams"].copy_(self.lams)
        if spec.searches:
            out["rows"].copy_(self.rows_found)
        with self.recorder.stage("copy"):
            self.buffers.out.download()
