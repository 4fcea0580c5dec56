"""Segments recorded as CUDA graphs: capture, recovery from failed captures, replay.

All graphs share one memory pool; there is a main stream and a retrieval stream, neither of them the default stream.

`record` warms a segment up, then captures it into the open pool. If the capture fails, torch's allocator and default
generator are left in capturing state: `_abandon` closes the pool, `_open_pool` opens a new one, and the capture is
tried once more. Graphs recorded before keep the old pool.
"""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ragturbo.engine.recorder import Program
from ragturbo.errors import GenerationError

log = logging.getLogger("ragturbo")
WARMUPS = 3
# Held from the beginning of a capture to its end and while a replay is launched, so that in one process no capture
# overlaps another capture, a replay or one of our device-wide calls. While any stream of a device is capturing:
# * torch.cuda.synchronize, which torch.cuda.graph calls first, fails on every other thread and breaks the capture in
#   every capture_error_mode; empty_cache may synchronise as well;
# * replays on other threads fail in torch releases whose default generator has one "capturing" flag for all graphs;
# * the garbage collector's switch and the table of cuBLAS workspaces are process-wide.
# Warm-ups, uploads and allocations on other threads are allowed.
RECORDING = threading.Lock()
# Graphs whose capture failed. Torch's allocator of page-locked memory may keep querying their stream (in torch 2.10 to
# 2.13 this cannot be prevented), so they are never destroyed.
_ABANDONED: list[torch.cuda.CUDAGraph] = []
_MODELS = (
    "ragturbo.model", "ragturbo.ops", "ragturbo.kernels", "ragturbo.engine.graph_segments",
    "ragturbo.engine.fast_model", "diffusers.", "transformers.",
)  # fmt: skip


class CudaGraphs:
    name = "CUDA graphs"

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._main = torch.cuda.Stream(device)
        self._retrieval = torch.cuda.Stream(device)
        self._marks: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] | None = None
        self._mark = torch.cuda.Event()
        self._done = torch.cuda.Event()
        self._retrieved = torch.cuda.Event()
        self._keeper: torch.cuda.CUDAGraph | None = None
        # A tensor created in inference mode could not be written outside it.
        with torch.inference_mode(False), torch.cuda.stream(self._main):
            self._nothing = torch.zeros(1, device=device)
        with RECORDING:
            self._open_pool()

    def record(self, label: str, segment: Callable[[], None], *, on_retrieval: bool = False) -> Program:
        stream = self._retrieval if on_retrieval else self._main
        stream.wait_stream(torch.cuda.current_stream(self._device))
        # Library loading, autotuning and lazy buffers happen here, outside the capture. Errors are the segment's.
        with torch.cuda.stream(stream):
            for _ in range(WARMUPS):
                segment()
        stream.synchronize()
        marks: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._marks = marks
        try:
            with RECORDING:
                graph = self._capture_twice(label, stream, segment)
        finally:
            self._marks = None
        return _Graph(label, graph, stream, marks)

    def _capture_twice(self, label: str, stream: torch.cuda.Stream, segment: Callable[[], Any]) -> torch.cuda.CUDAGraph:
        """Retry once: a capture also fails if another thread synchronizes the device meanwhile."""
        last = False
        while True:
            if self._keeper is None:
                self._open_pool()
            graph = torch.cuda.CUDAGraph()
            try:
                self._capture(graph, stream, segment)
                return graph
            except BaseException as error:
                # If the device is lost, this raises its own error, which is the one to report.
                self._recover(graph)
                for cause in _chain(error):
                    if isinstance(cause, torch.OutOfMemoryError) or not isinstance(cause, Exception):
                        raise cause from None
                where, first = culprit(error)
                if last:
                    raise GenerationError(f"{label}: {where} cannot be captured in a CUDA graph: {first}") from error
                log.warning("%s: capturing failed in %s and is tried again: %s", label, where, first)
            last = True
            if self._marks is not None:
                self._marks.clear()

    def _capture(self, graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, segment: Callable[[], Any]) -> None:
        """The caller must hold RECORDING."""
        collecting = gc.isenabled()
        # A collection could free events and page-locked buffers of other threads, which breaks a capture.
        gc.disable()
        # Torch keeps one cuBLAS workspace per handle and stream, made on first use and freed when anything clears the
        # table (Inductor does, before each of its own recordings). A workspace made by a warm-up could be freed while
        # this graph still uses it. Clearing the table at the start of the capture allocates a new workspace from the
        # graph's pool; clearing it afterwards keeps other work from using that one. It must not be cleared before the
        # capture: that would empty the allocator's cache while another thread may be about to launch a product with
        # the cleared workspace.
        try:
            # thread_local: other threads may allocate and copy meanwhile, but not synchronise the device (RECORDING).
            # The outer context restores the current stream, which torch.cuda.graph leaves changed if its exit fails.
            with torch.cuda.stream(stream):
                with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                    torch._C._cuda_clearCublasWorkspaces()
                    segment()
        finally:
            torch._C._cuda_clearCublasWorkspaces()
            if collecting:
                gc.enable()

    def _open_pool(self) -> None:
        """Open a new memory pool and keep it open with a graph that is never replayed: a pool is freed with its last
        graph, and its handle cannot be reused. After a failed capture, capturing the keeper also resets the default
        generator, which would otherwise stay in capturing state (older torch) and raise in every replay."""
        self._pool = torch.cuda.graph_pool_handle()
        keeper = torch.cuda.CUDAGraph()
        try:
            # Must not allocate: the device may be full.
            self._capture(keeper, self._main, self._nothing.zero_)
        except BaseException:
            self._abandon(keeper)
            raise
        self._keeper = keeper

    def _recover(self, graph: torch.cuda.CUDAGraph) -> None:
        """After a failed capture, record into a new pool. Earlier graphs keep the old pool alive."""
        self._abandon(graph)
        self._open_pool()

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """Close what the failed capture left open in torch's allocator: the next capture fails if a pool is open."""
        self._keeper = None
        _ABANDONED.append(graph)
        graph.reset()
        index = self._main.device_index
        try:
            torch._C._cuda_endAllocateToPool(index, self._pool)
        except RuntimeError:
            # Not open: torch 2.12 and later end it themselves, and 2.14 also releases it. Releasing it again would take
            # the pool from the graphs in it.
            return
        torch._C._cuda_releasePool(index, self._pool)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        if self._marks is None:
            yield
            return
        # external: a plain event inside a capture is only a dependency and cannot be timed.
        begin, end = (torch.cuda.Event(enable_timing=True, external=True) for _ in range(2))
        begin.record()
        yield
        end.record()
        self._marks.append((name, begin, end))

    @contextmanager
    def fork(self) -> Iterator[None]:
        self._retrieval.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._retrieval):
            yield

    def join(self) -> None:
        torch.cuda.current_stream(self._device).wait_stream(self._retrieval)

    def main_stream(self) -> Any:
        return torch.cuda.stream(self._main)

    def retrieval_stream(self) -> Any:
        return torch.cuda.stream(self._retrieval)

    def mark_main(self) -> None:
        self._mark.record(self._main)

    def wait_for_mark(self) -> None:
        self._mark.synchronize()

    def wait_for_main(self) -> None:
        self._done.record(self._main)
        self._done.synchronize()

    def main_after_retrieval(self) -> None:
        self._retrieved.record(self._retrieval)
        self._main.wait_event(self._retrieved)

    def synchronize_default(self) -> None:
        # Neither stream waits for the default stream implicitly.
        torch.cuda.current_stream(self._device).synchronize()


class _Graph:
    def __init__(self, label: str, graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, marks: list[Any]) -> None:
        self._label, self._graph, self._stream, self._marks = label, graph, stream, marks

    def replay(self) -> None:
        # An NVTX range on the host, because a replay contains kernels only (docs/profiling.md maps them to stages).
        with torch.cuda.nvtx.range(self._label), torch.cuda.stream(self._stream), RECORDING:
            self._graph.replay()

    def seconds(self) -> dict[str, float]:
        out: dict[str, float] = {}
        for name, begin, end in self._marks:
            out[name] = out.get(name, 0.0) + begin.elapsed_time(end) / 1e3
        return out


def culprit(error: BaseException) -> tuple[str, BaseException]:
    """Return the innermost model, op or kernel call in which a capture failed, and the error raised there.

    Exiting a failed capture raises a second error, so the original one is in the `__context__` of the error caught.
    """
    chain = _chain(error)
    for candidate in reversed(chain):
        where, trace = None, candidate.__traceback__
        while trace is not None:
            code, module = trace.tb_frame.f_code, trace.tb_frame.f_globals.get("__name__", "")
            if module.startswith(_MODELS):
                where = f"{module}.{getattr(code, 'co_qualname', code.co_name)}:{trace.tb_lineno}"
            trace = trace.tb_next
        if where is not None:
            return where, candidate
    return "an operation", chain[-1]


def _chain(error: BaseException) -> list[BaseException]:
    """The error and its contexts, latest first."""
    chain = [error]
    while (earlier := chain[-1].__context__) is not None:
        chain.append(earlier)
    return chain
