"""The device's part of one batch, over tensors that never move: what a CUDA graph records.

Everything that varies is read from the arenas. Nothing here asks the device for a value or makes a tensor on the host,
and the arenas' copies are the only ones between host and device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ragturbo.engine.arena import Arena
from ragturbo.engine.cuda_graphs import Lanes
from ragturbo.engine.fast_model import FastModel
from ragturbo.engine.reference import cosine_of
from ragturbo.engine.step import StepBatch
from ragturbo.engine.tables import Tables
from ragturbo.errors import InvalidRequest
from ragturbo.model.adapter import RetrievedKV
from ragturbo.model.inject import blend_weights, inject
from ragturbo.ops import Rows, gather_rows, to_uint8, topk


@dataclass(frozen=True)
class Spec:
    """What a graph is recorded for. Batches of one spec differ in their numbers alone."""

    rows: int
    latents: tuple[int, ...]
    length: int
    """Tokens of a prompt."""
    text_given: bool
    """There are no tokens: hidden states come from the caller, or `known` from the prompt cache."""
    query: str
    """Where the key comes from: "prompt", "ids" (another text), "key" (given) or "none"."""
    mode: str
    k: int
    per: str
    steps: int
    want: str
    retrieval: str
    """"none"; "given" with the request; "resident": searched and gathered on the device; "fetched": searched on the
    device, rows by slots the host fills; "host": searched on the host."""
    stored: tuple[str, int, int, int] | None = None
    """Rows: type, stride, tokens, channels."""
    grid: tuple[int, int] | None = None
    centred: bool = False
    hot: bool = False
    """Rows may lie on the device instead."""
    known: bool = False
    """Keys and values of all cross-attentions are remembered, on the device."""

    @property
    def split(self) -> bool:
        """Whether the host has a part between the key and the rows."""
        return self.retrieval in ("fetched", "host")

    @property
    def searches(self) -> bool:
        return self.retrieval in ("resident", "fetched")

    @property
    def label(self) -> str:
        return f"{self.rows} x {self.latents}, {self.mode}, {self.steps} steps, retrieval {self.retrieval}"


def spec_of(batch: StepBatch, tables: Tables | None, length: int) -> Spec:
    given = batch.text if batch.context is None else batch.context
    query = "prompt" if given is None else "none"
    if batch.query_key is not None:
        query = "key"
    elif batch.query_ids is not None:
        query = "ids"
    return Spec(
        rows=len(batch),
        latents=tuple(batch.latents.shape[1:]),
        length=length if given is None else given.shape[1],
        text_given=given is not None,
        known=batch.context is not None,
        query=query if batch.mode != "none" else "none",
        mode=batch.mode,
        per=batch.per,
        steps=batch.num_inference_steps,
        want=batch.want,
        **_retrieval_of(batch, tables),
    )


def _retrieval_of(batch: StepBatch, tables: Tables | None) -> dict[str, Any]:
    if batch.mode == "none":
        return {"k": batch.k, "retrieval": "none"}
    if batch.retrieved is not None:
        shape = batch.retrieved.h_retr.shape
        return {"k": shape[1], "retrieval": "given", "stored": ("given", 0, shape[2], shape[3])}
    assert tables is not None
    geometry = tables.source.database.geometry
    form = "host" if tables.keys is None else "resident" if tables.rows.resident else "fetched"
    return {
        "k": batch.k,
        "retrieval": form,
        "stored": (geometry.dtype, tables.rows.stride, geometry.tokens, geometry.channels),
        "grid": (geometry.height, geometry.width),
        "centred": tables.keys is not None and tables.keys.centred,
        "hot": form != "resident" and tables.rows.device_rows is not None,
    }


class Step:
    """The segments of one batch, and the tensors that pass between them."""

    def __init__(
        self, model: FastModel, spec: Spec, lanes: Lanes, *, page_locked: bool, remembered: bool = False
    ) -> None:
        """remembered: the prompts' keys and values are read after a run, by the prompt cache."""
        self.model, self.spec, self.lanes, self._remembered = model, spec, lanes, remembered
        device = model.device
        self.words = Arena(self._words_layout(), device, page_locked=page_locked)
        self.given = Arena(self._given_layout(), device, page_locked=page_locked)
        self.found = Arena(self._found_layout(), device, page_locked=page_locked)
        self.asked = Arena(self._asked_layout(), device, page_locked=page_locked)
        self.out = Arena(self._out_layout(), device, page_locked=page_locked)
        # What one segment leaves to the next. Kept here, a tensor of one lane outlives its use on the other.
        self.key: Tensor | None = None
        self.context: Any = None
        self.state: Any = None
        self.features: Any = None
        # Remembered keys and values come from the device's own memory, past the arenas.
        self.known: Tensor | None = None
        if spec.known:
            shape = (spec.rows, spec.length, model.unet.text_kv_width)
            self.known = torch.empty(shape, dtype=model.dtype, device=device)
        nothing = torch.empty(0)
        self.rows_found = self.scores = self.lam = self.valid = self.cosine = nothing

    # Layouts

    def _words_layout(self) -> dict[str, Any]:
        """What the text encoder reads of a request, or has in its place."""
        spec, text = self.spec, self.model.bundle.text
        n, layout = spec.rows, dict[str, Any]()
        if spec.text_given and not spec.known:
            layout["text"] = ((n, spec.length, text.width), self.model.dtype)
        elif not spec.text_given:
            layout["input_ids"] = ((n, spec.length), torch.int64)
        if spec.query == "ids":
            layout["query_ids"] = ((n, text.max_length), torch.int64)
        elif spec.query == "key":
            layout["query_key"] = ((n, text.key_dim), torch.float32)
        return layout

    def _given_layout(self) -> dict[str, Any]:
        """What else a request brings."""
        spec, model = self.spec, self.model
        n, k, width = spec.rows, spec.k, model.bundle.text.key_dim
        layout: dict[str, Any] = {"latents": ((n, *spec.latents), torch.float32)}
        if spec.mode != "none":
            layout |= {name: ((n,), torch.float32) for name in ("lam", "w", "min_score")}
        if spec.searches:
            layout["tables"] = ((4, 2), torch.int64)
        if spec.centred:
            layout["mean"] = ((width,), torch.float32)
        if spec.retrieval == "given":
            assert spec.stored is not None
            layout |= _found(n, k, width) | {"h_retr": ((n, k, *spec.stored[2:]), model.dtype)}
        return layout

    def _found_layout(self) -> dict[str, Any]:
        """What the host's part of a split retrieval brings."""
        if not self.spec.split:
            return {}
        n, k = self.spec.rows, self.spec.k
        places = {name: ((n, k), torch.int64) for name in ("slots", "hot")}
        return _found(n, k, self.model.bundle.text.key_dim) | places | {"tables": ((4, 2), torch.int64)}

    def _asked_layout(self) -> dict[str, Any]:
        """What the host waits for in a split retrieval: the key, or what the device has found by it."""
        if self.spec.retrieval == "host":
            return {"key": ((self.spec.rows, self.model.bundle.text.key_dim), torch.float32)}
        if self.spec.retrieval == "fetched":
            shape = (self.spec.rows, self.spec.k)
            return {"rows": (shape, torch.int64), "scores": (shape, torch.float32)}
        return {}

    def _out_layout(self) -> dict[str, Any]:
        spec, vae = self.spec, self.model.bundle.vae
        n, k = spec.rows, spec.k
        layout: dict[str, Any] = {"ok": ((n,), torch.bool), "latents_ok": ((n,), torch.bool)}
        if spec.mode != "none":
            layout |= {"lam": ((n,), torch.float32), "valid": ((n, k), torch.bool)}
            layout |= {"scores": ((n, k), torch.float32), "cosine": ((n, k), torch.float32)}
        if spec.searches:
            layout["rows"] = ((n, k), torch.int64)
        height, width = (side * vae.factor for side in spec.latents[1:])
        if spec.want == "latent":
            layout["latents"] = ((n, *spec.latents), torch.float32)
        elif spec.want == "float":
            layout["image"] = ((n, 3, height, width), torch.float32)
        else:
            layout["uint8"] = ((n, height, width, 3), torch.uint8)
        return layout

    def forget(self) -> None:
        """Lets later recordings use the memory of what passes between this batch's two graphs and between their stages:
        no other graph runs in between. The prompt cache reads key and context after a run."""
        self.state = self.features = None
        if not self._remembered:
            self.context = self.key = None

    # Segments

    def rest(self) -> None:
        """All that follows the text encoder where nothing waits for the host: retrieval runs beside the UNet's encoder
        and is joined before the adapter."""
        with self.lanes.stage("copy"):
            self.given.upload()
        if self.spec.mode != "none":
            with self.lanes.fork():
                self._search()
                self._gather()
        self.encode()
        if self.spec.mode != "none":
            self.lanes.join()
        self.finish()

    def ask(self) -> None:
        """Text to hidden states and key: the first graph."""
        with self.lanes.stage("copy"):
            self.words.upload()
            if self.spec.split:
                self.given.upload()
        with self.lanes.stage("text"):
            self._text()
        if self.spec.split:
            if self.spec.searches:
                self._search()
                self.asked.device["rows"].copy_(self.rows_found)
                self.asked.device["scores"].copy_(self.scores)
            else:
                assert self.key is not None
                self.asked.device["key"].copy_(self.key)
            with self.lanes.stage("copy"):
                self.asked.download()

    def encode(self) -> None:
        """The UNet's encoder at the first timestep, while the retrieval goes on. Split: the second graph."""
        spec, model = self.spec, self.model
        with self.lanes.stage("encode"):
            sample = (self.given.device["latents"] * model.schedules[spec.steps].constants[0].p).to(model.dtype)
            if model.device.type == "cuda":
                sample = sample.contiguous(memory_format=torch.channels_last)
            self.state = model.unet.encode(sample, model.timestep(spec.steps, 0), self.context)

    def fetch(self) -> None:
        """The retrieval lane of a split step, after the host's part: rows by slots, λ, the adapter's K and V."""
        with self.lanes.stage("copy"):
            self.found.upload()
        self._gather()

    def finish(self) -> None:
        """Adapter, decoder, further steps, VAE, bytes, and the copy to the host. Split: the third graph."""
        spec, model = self.spec, self.model
        x = self.given.device["latents"]
        constants = model.schedules[spec.steps].constants
        for i, c in enumerate(constants):
            if i > 0:
                with self.lanes.stage("encode"):
                    state = model.unet.encode((x * c.p).to(model.dtype), model.timestep(spec.steps, i), self.context)
            else:
                state = self.state
            with self.lanes.stage("adapter"):
                h = self._inject(state.h)
            with self.lanes.stage("decode"):
                out = model.unet.decode(state, h)
            # One product and one sum: the scheduler's step.
            x = torch.add(x * c.a, out, alpha=c.b)
        self._leave(x)

    def _leave(self, x: Tensor) -> None:
        """Latents to what was asked for, into the arena of results, and that to the host."""
        spec, model, out = self.spec, self.model, self.out.device
        finite = torch.isfinite(x).flatten(1).all(1)
        out["latents_ok"].copy_(finite)
        if spec.want == "latent":
            out["latents"].copy_(x)
        else:
            with self.lanes.stage("vae"):
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
        if spec.searches:
            out["rows"].copy_(self.rows_found)
        with self.lanes.stage("copy"):
            self.out.download()

    # Their parts

    def _text(self) -> None:
        spec, words, model = self.spec, self.words.device, self.model
        hidden, key = words.get("text"), None
        if not spec.text_given:
            ids = words["input_ids"]
            # The prompt and the text to search by go through the encoder together.
            states = model.text(torch.cat([ids, words["query_ids"]]) if spec.query == "ids" else ids)
            hidden, key = states.hidden_states[: spec.rows], states.key[-spec.rows :]
        elif spec.query == "ids":
            key = model.text(words["query_ids"]).key
        self.key = words.get("query_key", key)
        self.context = self.known if hidden is None else model.unet.text_kv(hidden)

    def _search(self) -> None:
        spec, given = self.spec, self.given.device
        if not spec.searches:
            return
        with self.lanes.stage("search"):
            assert self.key is not None
            query = self.key
            if spec.centred:
                query = F.normalize(query - given["mean"], dim=1)
            self.rows_found, self.scores = topk(given["tables"][0], query, spec.k)

    def _gather(self) -> None:
        """Rows, the cosine of the keys, λ, and, for the adapter, K and V: all that needs no target."""
        spec, given, model = self.spec, self.given.device, self.model
        with self.lanes.stage("gather"):
            assert spec.stored is not None
            stored, stride, tokens, channels = spec.stored
            if spec.retrieval == "given":
                ids, self.scores, keys, h_retr = given["ids"], given["scores"], given["keys"], given["h_retr"]
            else:
                if spec.retrieval == "resident":
                    ids, where, tables = self.rows_found, self.rows_found, given["tables"]
                    width = model.bundle.text.key_dim
                    keys = gather_rows(Rows(tables[1], 2 * width, 1, width), ids)[:, :, 0]
                else:
                    brought = self.found.device
                    ids, where, tables = brought["ids"], brought["slots"], brought["tables"]
                    self.scores, keys = brought["scores"], brought["keys"]
                h_retr = gather_rows(Rows(tables[2], stride, tokens, channels, stored), where)
                if spec.hot:
                    hot = self.found.device["hot"]
                    there = gather_rows(Rows(tables[3], stride, tokens, channels, stored), hot)
                    h_retr = torch.where((hot >= 0)[..., None, None], there, h_retr)
            h_retr = h_retr.to(model.dtype)
            self.cosine = torch.ones_like(self.scores) if self.key is None else cosine_of(self.key, keys)
            self.lam, self.valid = blend_weights(
                self.cosine, ids, self.scores, min_score=given["min_score"], lam=given["lam"]
            )
            self.features = h_retr
            if spec.mode == "adapter":
                if model.adapter is None:
                    # New weights without one came between the request and its turn.
                    raise InvalidRequest('mode "adapter" needs an adapter, and the model has none any more')
                self.features = model.adapter.retrieved_kv(h_retr)

    def _inject(self, h: Tensor) -> Tensor:
        spec = self.spec
        if spec.mode == "none":
            return h
        features: Tensor | RetrievedKV = self.features
        return inject(
            spec.mode,
            h,
            features,
            lam=self.lam,
            w=self.given.device["w"],
            valid=self.valid,
            weights=self.cosine,
            adapter=self.model.adapter,
            grid=spec.grid if spec.mode != "adapter" else None,
            per=spec.per,
        )


def _found(rows: int, k: int, width: int) -> dict[str, Any]:
    return {
        "ids": ((rows, k), torch.int64),
        "scores": ((rows, k), torch.float32),
        "keys": ((rows, k, width), torch.float32),
    }
