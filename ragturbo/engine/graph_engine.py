"""The fast engine: a batch is numbers written into page-locked memory, replays of graphs, and numbers read back.

Where nothing is captured (engine="eager" on a GPU, compile=True on a CPU) the same steps are called over the same
buffers, which is what a replay is compared with. Graphs are recorded on the first batch of their kind (`Spec`) and
kept. Three forms of retrieval, by where the search runs and where the rows are; `describe` names the one in use:

* "one graph": exact search over keys on the device, every row in page-locked memory. Search and gather are a branch
  beside the UNet's encoder, and nothing waits for the host from the first copy to the last. The text encoder is
  recorded apart, so that the rest, several hundred nodes with a branch, is launched while it runs.
* "three graphs": the search runs on the host (ScaNN, BM25 or the caller's own) while the encoder runs on the device.
  One wait, for the key.
* "ids to the host": exact search on the device over more rows than memory holds. The host waits for the ids, reads
  what is missing into page-locked slots, and the rest replays.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ragturbo.config import GeneratorConfig
from ragturbo.engine.reference import ReferenceEngine
from ragturbo.engine.fast_model import FastModel
from ragturbo.engine.cuda_graphs import RECORDING, CudaGraphs, Lanes, Program
from ragturbo.engine.prompt_cache import PromptCache
from ragturbo.engine.database import DatabaseSource
from ragturbo.engine.step import StepBatch, StepResult
from ragturbo.engine.segments import Spec, Step, spec_of
from ragturbo.engine.tables import Tables
from ragturbo.engine.timings import host_stage
from ragturbo.errors import InvalidRequest
from ragturbo.model.bundle import Bundle

log = logging.getLogger("ragturbo")
# Every kind of batch keeps its graphs and buffers; the least recently used makes way.
MAX_SPECS = 32


class GraphEngine:
    def __init__(self, bundle: Bundle, config: GeneratorConfig, lanes: Lanes | None = None) -> None:
        """lanes: how steps run; None captures CUDA graphs on the bundle's device."""
        self.bundle, self.device, self._config = bundle, bundle.device, config
        self.name = "graph" if lanes is None else "eager"
        self.oracle = ReferenceEngine(bundle)
        self.lanes = lanes or CudaGraphs(bundle.device)
        self.model = FastModel(bundle, attention=config.attention, compiled=config.compile)
        self.prompts = PromptCache(config.prompt_cache, as_context=True)
        self._recorded: OrderedDict[Spec, Recorded] = OrderedDict()
        self._tables: Tables | None = None
        # The buffers are one batch's at a time, also for callers without an executor.
        self._lock = threading.Lock()
        self.plain_batches: Counter[str] = Counter()

    @torch.inference_mode()
    def run(self, batch: StepBatch) -> StepResult:
        why_not = self.refusal(batch)
        if why_not is not None:
            if self._config.engine == "graph":
                raise InvalidRequest(f"engine='graph': {why_not}; use engine='auto' or 'eager'")
            if why_not not in self.plain_batches:
                log.info("batches run in plain torch: %s", why_not)
            self.plain_batches[why_not] += 1
            return self.oracle.run(batch)
        with self._lock:
            if self.prompts.capacity:
                # What is remembered is read and written in the order of the main lane, behind and before its replays.
                with self.lanes.main():
                    batch = self.prompts.known(batch) or batch
            result = self._run(batch)
            if self._overflowed(result):
                self.model.use_fp32_vae()
                self._recorded.clear()
                result = self._run(batch)
            return result

    def refusal(self, batch: StepBatch) -> str | None:
        """Why a batch is not for graphs: their number of steps is recorded, and their scheduler is constants."""
        if batch.guided:
            return "guidance runs the UNet on two prompts an image, for models of many steps"
        if batch.num_inference_steps not in self.model.schedules:
            return (
                f"{batch.num_inference_steps} steps of {type(self.bundle.scheduler).__name__}: graphs take "
                f"{', '.join(map(str, self.model.schedules)) or 'no'} steps of a deterministic Euler scheduler"
            )
        if batch.mode != "none" and batch.retrieved is None and not isinstance(batch.source, DatabaseSource):
            return "neighbours come from something that is not a database"
        if self.device.type == "cuda" and isinstance(batch.source, DatabaseSource):
            rows = batch.source.cache
            if not rows.page_locked:
                return f"rows must be page-locked for a kernel to read them, and are not: {rows.why_not_locked}"
        return None

    def encode_pairs(self, captions: list[str], images: Tensor) -> tuple[Tensor, Tensor]:
        return self.oracle.encode_pairs(captions, images)

    def load_adapter(self, path: str | os.PathLike[str]) -> None:
        """New weights go into the memory the graphs read; where they do not fit there, the graphs are recorded anew."""
        with self._lock, torch.inference_mode():
            self.oracle.load_adapter(path)
            self.prompts.clear()
            if not self.model.refresh():
                log.info("the new weights touch other layers than before: graphs are recorded again")
                self._recorded.clear()
            self.lanes.settle()

    def describe(self) -> dict[str, Any]:
        """What was chosen and why, what stands in the place of what, and what the graphs hold."""
        model, tables = self.model, self._tables
        replaced: dict[str, int] = {}
        for row in model.replaced:
            name = f"{row.was} -> {row.now}"
            replaced[name] = replaced.get(name, 0) + 1
        return {
            "recorded by": self.lanes.name,
            "attention": f"{model.attention}: {model.attention_why}",
            "compile": model.compiled,
            "replaced": replaced,
            "vae dtype": str(model.vae_dtype).removeprefix("torch."),
            "retrieval": None if tables is None else tables.form,
            "owned weights, bytes": model.unet.ties.owned_bytes,
            "keys on the device, bytes": 0 if tables is None or tables.keys is None else tables.keys.bytes,
            # A copy: the device's thread goes on recording.
            "graphs": [{"kind": s.label, "bytes": r.bytes, "seconds": r.took} for s, r in list(self._recorded.items())],
            "plain batches": dict(self.plain_batches),
            "prompts": {"held": len(self.prompts), "hits": self.prompts.hits, "misses": self.prompts.misses},
            "rows in memory": 0 if tables is None else len(tables.rows.host_rows),
        }

    def _run(self, batch: StepBatch) -> StepResult:
        tables = None
        if batch.mode != "none" and batch.retrieved is None:
            tables = self._tables_of(batch.source)
        spec = spec_of(batch, tables, self.bundle.text.max_length)
        recorded = self._recorded.get(spec)
        if recorded is None:
            recorded = self._record(spec, batch, tables)
        self._recorded.move_to_end(spec)
        result = recorded.run(batch, tables)
        step = recorded.step
        if self.prompts.capacity and step.key is not None and batch.query_key is None:
            with self.lanes.main():
                self.prompts.remember(batch, step.context, step.key)
        return result

    def _record(self, spec: Spec, batch: StepBatch, tables: Tables | None) -> Recorded:
        while len(self._recorded) >= MAX_SPECS:
            self._recorded.popitem(last=False)
        if self.device.type == "cuda":
            # A capture begins so: what the cache held would be taken off what the graph holds.
            with RECORDING:
                torch.cuda.empty_cache()
        before, start = _reserved(self.device), time.perf_counter()
        locked, remembered = self.device.type == "cuda", self.prompts.capacity > 0
        recorded = Recorded(Step(self.model, spec, self.lanes, page_locked=locked, remembered=remembered))
        recorded.fill_words(batch)
        recorded.fill(batch, tables)
        recorded.record()
        recorded.bytes, recorded.took = _reserved(self.device) - before, time.perf_counter() - start
        log.info("recorded %s: %.1f MB, %.2f s", spec.label, recorded.bytes / 1e6, recorded.took)
        self._recorded[spec] = recorded
        return recorded

    def _tables_of(self, source: Any) -> Tables:
        # A batch that waited through a swap still finds its own generation: its tables are made again if need be.
        if self._tables is None or self._tables.source is not source:
            self._tables = Tables(source, self.device)
            self.lanes.settle()
        return self._tables

    def _overflowed(self, result: StepResult) -> bool:
        """fp16 has no room above 65,504: finite latents whose image is not finite."""
        if self.model.vae_dtype != torch.float16 or all(result.ok.tolist()):
            return False
        step = next(reversed(self._recorded.values())).step
        return bool((step.out.host["latents_ok"] & ~step.out.host["ok"]).any())


class Recorded:
    """A spec's buffers and what replays over them."""

    def __init__(self, step: Step) -> None:
        self.step, self.spec, self.lanes = step, step.spec, step.lanes
        self.bytes, self.took = 0, 0.0
        # Where steps are called on a CPU, not launched, the stages are the host's own time.
        self._launches = step.model.device.type == "cuda"
        self._programs: dict[str, Program] = {}
        self._lease: Any = None

    def record(self) -> None:
        try:
            self._record()
        except BaseException:
            # What was launched before the error still reads and writes the buffers, which the caller frees.
            self._wait()
            raise

    def _record(self) -> None:
        step, record, label = self.step, self.lanes.record, self.spec.label
        if not self.spec.split:
            ask = record(f"{label}: text", step.ask)
            # So that the next graph's warm-ups read what this one computes, not uninitialised memory.
            ask.replay()
            self._programs = {"ask": ask, "rest": record(f"{label}: image", step.rest)}
            step.forget()
            return
        # In the order they will run: each reads what the one before it left.
        self._programs = {"ask": record(f"{label}: text", step.ask), "encode": record(f"{label}: encoder", step.encode)}
        self._programs["fetch"] = record(f"{label}: rows", step.fetch, beside=True)
        self._programs["finish"] = record(f"{label}: decoder", step.finish)

    def fill_words(self, batch: StepBatch) -> None:
        """What the text encoder reads, into page-locked memory."""
        for name, place in self.step.words.host.items():
            place.copy_(getattr(batch, name))
        if self.spec.known:
            assert self.step.known is not None and batch.context is not None
            with self.lanes.main():
                self.step.known.copy_(batch.context)

    def fill(self, batch: StepBatch, tables: Tables | None) -> None:
        """The request's other numbers."""
        host = self.step.given.host
        for name in ("latents", "lam", "w", "min_score"):
            if name in host:
                host[name].copy_(getattr(batch, name))
        if "tables" in host:
            assert tables is not None
            host["tables"].copy_(tables.descriptors())
        if "mean" in host:
            assert tables is not None and tables.keys is not None and tables.keys.mean is not None
            host["mean"].copy_(tables.keys.mean)
        if self.spec.retrieval == "given":
            assert batch.retrieved is not None
            for name in ("ids", "scores", "keys", "h_retr"):
                host[name].copy_(getattr(batch.retrieved, name))

    def run(self, batch: StepBatch, tables: Tables | None) -> StepResult:
        took: dict[str, float] = {}
        host = {"fill": 0.0, "launch": 0.0}
        ids = None
        try:
            if self.spec.split:
                assert tables is not None
                ids = self._split(batch, tables, took, host)
            else:
                self._together(batch, tables, host)
            launched = time.perf_counter()
            # All that needs no value from the device is done while it works.
            copy, out = self.step.out.copy_of_host()
            result = self._result(out, batch, ids)
        finally:
            # Also after an error: what was launched still reads the rows, and the buffers of the next request.
            self._wait()
            if self._lease is not None:
                self._lease.release()
                self._lease = None
        done = time.perf_counter()
        copy()
        if ids is None and "rows" in out:
            assert tables is not None
            result.ids = _ids_of(out["rows"], tables)
        for program in self._programs.values():
            for stage, seconds in program.seconds().items():
                took[stage] = took.get(stage, 0.0) + seconds
        if self._launches:
            took |= host | {"wait": done - launched, "result": time.perf_counter() - done}
        result.timings = took
        return result

    def _wait(self) -> None:
        if self.spec.split:
            self.lanes.join_replayed()
        self.lanes.await_main()

    def _together(self, batch: StepBatch, tables: Tables | None, host: dict[str, float]) -> None:
        """The text encoder is on its way before the other numbers are written and several hundred nodes launched."""
        with _added(host, "fill"):
            self.fill_words(batch)
        self._replay("ask", host)
        with _added(host, "fill"):
            self.fill(batch, tables)
        self._replay("rest", host)

    def _replay(self, name: str, host: dict[str, float]) -> None:
        with _added(host, "launch"):
            self._programs[name].replay()

    def _split(self, batch: StepBatch, tables: Tables, took: dict[str, float], host: dict[str, float]) -> Tensor:
        """The encoder is on its way before the host waits for the key or the ids, and runs while the host searches."""
        asked = self.step.asked.host
        with _added(host, "fill"):
            self.fill_words(batch)
            self.fill(batch, tables)
        self._replay("ask", host)
        self.lanes.mark_asked()
        self._replay("encode", host)
        self.lanes.await_asked()
        device = self.step.model.device
        with host_stage("search", took, device):
            if self.spec.searches:
                rows, scores = asked["rows"], asked["scores"]
                ids = _ids_of(rows, tables)
            else:
                ids, scores = tables.source.search(asked["key"], batch.texts or None, self.spec.k)
        with host_stage("gather", took, device):
            found = self.step.found.host
            # The rows stay where they are until the host has seen the end of the batch.
            with self.lanes.beside():
                self._lease = tables.rows.lease(ids.reshape(-1))
            found["ids"].copy_(ids)
            found["slots"].copy_(torch.from_numpy(self._lease.host_slots).view(ids.shape))
            found["hot"].copy_(torch.from_numpy(self._lease.device_slots).view(ids.shape))
            found["scores"].copy_(scores)
            found["keys"].copy_(tables.source.database.keys(ids))
            found["tables"].copy_(tables.descriptors())
        self._replay("fetch", host)
        self.lanes.join_replayed()
        self._replay("finish", host)
        return ids.clone()

    def _result(self, out: dict[str, Tensor], batch: StepBatch, ids: Tensor | None) -> StepResult:
        n = self.spec.rows
        if ids is None:
            given = batch.retrieved if self.spec.mode != "none" else None
            ids = torch.empty((n, 0), dtype=torch.int64) if given is None else given.ids.clone()
        nothing = torch.empty((n, 0))
        return StepResult(
            ok=out["ok"],
            lam=out["lam"] if "lam" in out else torch.zeros(n),
            ids=ids,
            scores=out.get("scores", nothing),
            cosine=out.get("cosine", nothing),
            valid=out["valid"] if "valid" in out else nothing.bool(),
            uint8=out.get("uint8"),
            image=out.get("image"),
            latents=out.get("latents"),
        )


@contextmanager
def _added(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] += time.perf_counter() - start


def _ids_of(rows: Tensor, tables: Tables) -> Tensor:
    """Row numbers of a generation, on the host -> ids; -1 stays."""
    return torch.from_numpy(tables.ids[rows.numpy()])


def _reserved(device: torch.device) -> int:
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else 0
