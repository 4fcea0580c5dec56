"""One spec's recorded segments: fill the inputs, replay, read the result."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ragturbo.engine.graph_segments import Segments
from ragturbo.engine.recorder import Program
from ragturbo.engine.request import Request
from ragturbo.engine.result import RETRIEVED_FIELDS, Result
from ragturbo.engine.tables import Tables
from ragturbo.engine.timings import host_stage
from ragturbo.retrieval.retriever import Hits


class Recording:
    def __init__(self, segments: Segments) -> None:
        self.segments, self.spec, self.recorder = segments, segments.spec, segments.recorder
        self.bytes, self.seconds = 0, 0.0
        # On a CPU the stages already are the host's time.
        self._launches = segments.model.device.type == "cuda"
        self._programs: dict[str, Program] = {}
        self._lease: Any = None

    def record(self, request: Request, tables: Tables | None) -> None:
        """Record every segment; `request` gives the values for warming up."""
        self._fill_text(request)
        self._fill(request, tables)
        try:
            self._record()
        except BaseException:
            # Launched work still uses the buffers, which the caller is about to free.
            self._wait()
            raise

    def _record(self) -> None:
        segments, record, label = self.segments, self.recorder.record, self.spec.label
        text = self._programs["text"] = record(f"{label}: text", segments.encode_text)
        if not self.spec.split:
            # So that the warm-ups of the next segment read real values, not uninitialised memory.
            text.replay()
            self._programs["image"] = record(f"{label}: image", segments.generate)
            segments.release()
            return
        # In the order they run: each reads the results of the one before it.
        self._programs["encoder"] = record(f"{label}: encoder", segments.encode)
        self._programs["rows"] = record(f"{label}: rows", segments.gather, on_retrieval=True)
        self._programs["decoder"] = record(f"{label}: decoder", segments.finish)

    def run(self, request: Request, tables: Tables | None) -> Result:
        stages: dict[str, float] = {}
        host = {"fill": 0.0, "launch": 0.0}
        hits = None
        try:
            if self.spec.split:
                assert tables is not None
                hits = self._run_split(request, tables, stages, host)
            else:
                self._run_whole(request, tables, host)
            launched = time.perf_counter()
            # Work that needs no value from the device is done while the device is busy.
            copy, out = self.segments.buffers.out.copy_of_host()
            result = self._result(out, request, hits)
        finally:
            # Also after an error: launched work still reads the features and the buffers.
            self._wait()
            if self._lease is not None:
                self._lease.release()
                self._lease = None
        done = time.perf_counter()
        copy()
        if hits is None and "rows" in out:
            assert tables is not None
            result.ids = _ids_of(out["rows"], tables)
        for program in self._programs.values():
            for stage, seconds in program.seconds().items():
                stages[stage] = stages.get(stage, 0.0) + seconds
        if self._launches:
            stages |= host | {"wait": done - launched, "result": time.perf_counter() - done}
        result.timings = stages
        return result

    def _run_whole(self, request: Request, tables: Tables | None, host: dict[str, float]) -> None:
        """Replay the text encoder first; it runs while the host writes the other inputs and launches the second graph,
        which has several hundred nodes."""
        with _timed(host, "fill"):
            self._fill_text(request)
        self._replay("text", host)
        with _timed(host, "fill"):
            self._fill(request, tables)
        self._replay("image", host)

    def _run_split(self, request: Request, tables: Tables, stages: dict[str, float], host: dict[str, float]) -> Hits:
        """Launch the UNet's encoder before waiting for the key or the ids; it runs while the host searches."""
        segments = self.segments
        with _timed(host, "fill"):
            self._fill_text(request)
            self._fill(request, tables)
        self._replay("text", host)
        self.recorder.mark_main()
        self._replay("encoder", host)
        self.recorder.wait_for_mark()
        answer, device = segments.buffers.to_host.host, segments.model.device
        with host_stage("search", stages, device):
            if self.spec.searches:
                nothing = torch.zeros_like(answer["scores"])
                hits = Hits(
                    _ids_of(answer["rows"], tables), answer["scores"], torch.full_like(nothing, float("nan")), nothing
                )
            else:
                hits = tables.database.search(answer["key"], request.texts, request.k, request.searched)
        with host_stage("gather", stages, device):
            found, ids = segments.buffers.from_host.host, hits.ids
            # The features stay in place until the batch has finished.
            with self.recorder.retrieval_stream():
                self._lease = tables.rows.lease(ids.reshape(-1))
            found["ids"].copy_(ids)
            found["slots"].copy_(torch.from_numpy(self._lease.host_slots).view(ids.shape))
            found["hot"].copy_(torch.from_numpy(self._lease.device_slots).view(ids.shape))
            found["scores"].copy_(hits.scores)
            found["rare_share"].copy_(hits.rare_share)
            found["keys"].copy_(tables.database.database.keys(ids))
            found["tables"].copy_(tables.descriptors())
        self._replay("rows", host)
        self.recorder.main_after_retrieval()
        self._replay("decoder", host)
        return Hits(*(part.clone() for part in hits))

    def _fill_text(self, request: Request) -> None:
        for name, place in self.segments.buffers.text_inputs.host.items():
            place.copy_(getattr(request, name))
        if self.spec.cached:
            assert self.segments.cached_kv is not None and request.text_kv is not None
            with self.recorder.main_stream():
                self.segments.cached_kv.copy_(request.text_kv)

    def _fill(self, request: Request, tables: Tables | None) -> None:
        host = self.segments.buffers.inputs.host
        for name in ("latents", "lam", "w", "min_score", "searched"):
            if name in host:
                host[name].copy_(getattr(request, name))
        if "tables" in host:
            assert tables is not None
            host["tables"].copy_(tables.descriptors())
        if "mean" in host:
            assert tables is not None and tables.keys is not None and tables.keys.mean is not None
            host["mean"].copy_(tables.keys.mean)
        if self.spec.retrieval == "given":
            for name in RETRIEVED_FIELDS:
                host[name].copy_(getattr(request.retrieved, name))

    def _replay(self, name: str, host: dict[str, float]) -> None:
        with _timed(host, "launch"):
            self._programs[name].replay()

    def _wait(self) -> None:
        if self.spec.split:
            self.recorder.main_after_retrieval()
        self.recorder.wait_for_main()

    def _result(self, out: dict[str, Tensor], request: Request, hits: Hits | None) -> Result:
        images: dict[str, Any] = {name: out.get(name) for name in ("uint8", "image", "latents")}
        if request.mode == "none":
            return Result.without_neighbours(out["ok"], **images)
        if hits is not None:
            ids, bm25 = hits.ids, hits.bm25
        else:
            # Found by the device: `run` fills them in.
            ids = out["rows"] if request.retrieved is None else request.retrieved.ids.clone()
            bm25 = torch.full(ids.shape, float("nan"))
        found: dict[str, Any] = {name: out[name] for name in ("lam", "scores", "cosine", "valid", "lams")}
        return Result(ok=out["ok"], ids=ids, bm25=bm25, **found, **images)


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] += time.perf_counter() - start


def _ids_of(rows: Tensor, tables: Tables) -> Tensor:
    """A generation's row numbers -> ids; -1 stays -1."""
    return torch.from_numpy(tables.ids[rows.numpy()])
