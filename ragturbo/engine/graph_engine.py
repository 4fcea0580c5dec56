"""The graph engine: fused modules over fixed buffers, recorded as CUDA graphs on the first batch of each `Spec`.

Uncaptured (capture=False, or on a CPU), the same segments are called over the same buffers. Retrieval has
three forms, by where the search runs and where the features are; `describe` names the one in use:

* "one graph": exact search over keys on the device, all features in page-locked memory. Search and gather run beside
  the UNet's encoder, and nothing waits for the host. The text encoder is a graph of its own, so that the rest, several
  hundred nodes with a branch, is launched while it runs.
* "three graphs": the search runs on the host (ScaNN, BM25 or the caller's own) while the UNet's encoder runs on the
  device. The host waits once, for the search key.
* "ids to the host": exact search on the device over more features than fit into memory. The host waits for the ids,
  reads missing features into page-locked slots, and the rest replays.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import Counter, OrderedDict
from typing import Any

import torch
from torch import Tensor

from ragturbo.config import GeneratorConfig
from ragturbo.engine import fork
from ragturbo.engine.cuda_graphs import RECORDING, CudaGraphs
from ragturbo.engine.database import DatabaseGeneration
from ragturbo.engine.dtype import make_model
from ragturbo.engine.graph_segments import Segments
from ragturbo.engine.prompt_cache import PromptCache
from ragturbo.engine.recorder import Recorder, Uncaptured
from ragturbo.engine.recording import Recording
from ragturbo.engine.reference import ReferenceEngine
from ragturbo.engine.request import Request
from ragturbo.engine.result import Result
from ragturbo.engine.spec import Spec
from ragturbo.engine.tables import Tables
from ragturbo.errors import InvalidRequest
from ragturbo.model.bundle import Bundle

log = logging.getLogger("ragturbo")
# Recordings kept, each with its graphs and buffers; the least recently used is dropped.
MAX_RECORDINGS = 32


class GraphEngine:
    name = "graph"

    def __init__(self, bundle: Bundle, config: GeneratorConfig, recorder: Recorder | None = None) -> None:
        """recorder: how segments run; None: CUDA graphs on a GPU unless capture=False."""
        self.bundle, self.device, self._config = bundle, bundle.device, config
        self.reference = ReferenceEngine(bundle)
        # A recorder given by the caller may watch torch's operations, which packed layers are not.
        packs = recorder is None
        if recorder is None:
            captured = config.capture and self.device.type == "cuda"
            recorder = CudaGraphs(self.device) if captured else Uncaptured(self.device)
        self.recorder = recorder
        if self.device.type == "cpu":
            # Choosing the dtype may run the model.
            fork.note_use()
        self.model, self._dtype_why = make_model(bundle, config, packs=packs)
        self.prompts = PromptCache(config.prompt_cache, keeps_kv=True)
        self._recordings: OrderedDict[Spec, Recording] = OrderedDict()
        self._tables: Tables | None = None
        # The buffers serve one batch at a time, also for callers without an executor.
        self._lock = threading.Lock()
        self.reference_batches: Counter[str] = Counter()

    @torch.inference_mode()
    def run(self, request: Request) -> Result:
        why_not = self.refusal(request)
        if why_not is not None:
            if self._config.engine == "graph":
                raise InvalidRequest(f"engine='graph': {why_not}; use engine='auto' or 'reference'")
            if why_not not in self.reference_batches:
                log.info("batches run in the reference engine: %s", why_not)
            self.reference_batches[why_not] += 1
            return self.reference.run(request)
        with self._lock:
            if self.prompts.capacity:
                # On the main stream, so that reads and writes of the cache are ordered with replays.
                with self.recorder.main_stream():
                    request = self.prompts.known(request) or request
            result = self._run(request)
            if self._overflowed(result):
                self.model.use_fp32_vae()
                self._recordings.clear()
                result = self._run(request)
            return result

    def refusal(self, request: Request) -> str | None:
        """Why a batch cannot run here: graphs record a fixed number of steps, with the scheduler as constants."""
        if request.guided:
            return "guidance runs the UNet on two prompts per image, for models of many steps"
        if request.num_inference_steps not in self.model.schedules:
            return (
                f"{request.num_inference_steps} steps of {type(self.bundle.scheduler).__name__}: graphs take "
                f"{', '.join(map(str, self.model.schedules)) or 'no'} steps of a deterministic Euler scheduler"
            )
        if request.database is not None and self.device.type == "cuda":
            rows = request.database.cache
            if not rows.page_locked:
                return f"kernels can only read features in page-locked memory: {rows.why_not_locked}"
        return None

    def encode_pairs(self, captions: list[str], images: Tensor) -> tuple[Tensor, Tensor]:
        return self.reference.encode_pairs(captions, images)

    def load_adapter(self, path: str | os.PathLike[str]) -> None:
        """Copy new weights into the memory that graphs read; if they do not fit it, graphs are recorded again."""
        with self._lock, torch.inference_mode():
            self.reference.load_adapter(path)
            self.prompts.clear()
            if not self.model.refresh():
                log.info("the new weights change other layers than before: graphs are recorded again")
                self._recordings.clear()
            self.recorder.synchronize_default()

    def describe(self) -> dict[str, Any]:
        model, tables = self.model, self._tables
        replaced: dict[str, int] = {}
        for row in model.replaced:
            name = f"{row.was} -> {row.now}"
            replaced[name] = replaced.get(name, 0) + 1
        return {
            "capture": self.recorder.name,
            "products": f"{str(model.dtype).removeprefix('torch.')}: {self._dtype_why}",
            "weights": model.packs_why,
            "attention": f"{model.attention}: {model.attention_why}",
            "compile": model.compiled,
            "replaced": replaced,
            "vae dtype": str(model.vae_dtype).removeprefix("torch."),
            "retrieval": None if tables is None else tables.form,
            "owned weights, bytes": model.unet.ties.owned_bytes,
            "packed weights of the UNet, bytes": model.unet.ties.packed_bytes,
            "keys on the device, bytes": 0 if tables is None or tables.keys is None else tables.keys.bytes,
            # list(): the device thread may be recording.
            "graphs": [
                {"kind": spec.label, "bytes": recording.bytes, "seconds": recording.seconds}
                for spec, recording in list(self._recordings.items())
            ],
            "plain batches": dict(self.reference_batches),
            "prompts": {"held": len(self.prompts), "hits": self.prompts.hits, "misses": self.prompts.misses},
            "rows in memory": 0 if tables is None else len(tables.rows.host_rows),
        }

    def _run(self, request: Request) -> Result:
        tables = None if request.database is None else self._tables_of(request.database)
        spec = Spec.of(request, tables, self.bundle.text.max_length)
        recording = self._recordings.get(spec) or self._record(spec, request, tables)
        self._recordings.move_to_end(spec)
        result = recording.run(request, tables)
        segments = recording.segments
        if self.prompts.capacity and segments.key is not None and request.query_key is None:
            with self.recorder.main_stream():
                self.prompts.remember(request, segments.text_kv, segments.key)
        return result

    def _record(self, spec: Spec, request: Request, tables: Tables | None) -> Recording:
        while len(self._recordings) >= MAX_RECORDINGS:
            self._recordings.popitem(last=False)
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            # torch.cuda.graph empties the cache too; doing it first keeps that out of the bytes counted below.
            with RECORDING:
                torch.cuda.empty_cache()
        before, start = _reserved(self.device), time.perf_counter()
        caches_prompts = self.prompts.capacity > 0
        recording = Recording(
            Segments(self.model, spec, self.recorder, page_locked=on_gpu, caches_prompts=caches_prompts)
        )
        recording.record(request, tables)
        recording.bytes, recording.seconds = _reserved(self.device) - before, time.perf_counter() - start
        log.info("recorded %s: %.1f MB, %.2f s", spec.label, recording.bytes / 1e6, recording.seconds)
        self._recordings[spec] = recording
        return recording

    def _tables_of(self, database: DatabaseGeneration) -> Tables:
        # A batch accepted before a swap still uses its own generation, whose tables are made again.
        if self._tables is None or self._tables.database is not database:
            self._tables = Tables(database, self.device)
            self.recorder.synchronize_default()
        return self._tables

    def _overflowed(self, result: Result) -> bool:
        """Whether the VAE's decoder overflowed in fp16: finite latents whose image is not finite."""
        if self.model.vae_dtype != torch.float16 or all(result.ok.tolist()):
            return False
        out = next(reversed(self._recordings.values())).segments.buffers.out.host
        return bool((out["latents_ok"] & ~out["ok"]).any())


def _reserved(device: torch.device) -> int:
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else 0
