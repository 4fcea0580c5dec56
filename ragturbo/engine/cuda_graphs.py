"""How a step function runs: recorded once as a CUDA graph and replayed, or called each time.

`Direct` is the same structure without graphs: on a CPU, where the tests drive all of it, and on a GPU, where it is the
eager engine, which a replay must equal bit for bit.
"""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import torch

from ragturbo.engine.timings import StageClock
from ragturbo.errors import GenerationError

log = logging.getLogger("ragturbo")
WARMUPS = 3
# One recording at a time in a process, with no replay and no device-wide call of ours beside it. While any stream of a
# device is capturing:
# * torch.cuda.synchronize, with which torch.cuda.graph begins, fails on every other thread and breaks the capture, in
#   every capture_error_mode; empty_cache may synchronise as well;
# * replays on other threads fail in releases of torch whose default generator has one "capturing" flag for all graphs;
# * the switch of the garbage collector and the table of cuBLAS workspaces belong to the whole process.
# Warm-ups, uploads and allocations of other threads are allowed. So this lock is held from the beginning of a capture
# to its end and while a replay is launched, and not for warm-ups.
RECORDING = threading.Lock()
# Graphs whose capture failed. Torch's allocator of page-locked memory may go on asking them which stream is theirs
# (torch 2.10 to 2.13 have no way to end that), so they are never destroyed.
_ABANDONED: list[torch.cuda.CUDAGraph] = []
_MODELS = (
    "ragturbo.model", "ragturbo.ops", "ragturbo.kernels", "ragturbo.engine.segments", "ragturbo.engine.fast_model", "diffusers.",
    "transformers.",
)  # fmt: skip


class Program(Protocol):
    """Something recorded: run it, wait for it, and read how long its stages took."""

    def replay(self) -> None: ...

    def seconds(self) -> dict[str, float]: ...


class Lanes(Protocol):
    name: str

    def record(self, label: str, step: Callable[[], None], *, beside: bool = False) -> Program:
        """`beside`: on the retrieval lane, which runs beside the main one."""
        ...

    def stage(self, name: str) -> Any:
        """A context manager inside a step: its time is reported under this name."""
        ...

    def fork(self) -> Any:
        """A context manager inside a step: what is in it runs beside what follows it, up to `join`.

        Tensors that cross must stay referenced until the join: the allocator would hand their memory to the other lane.
        """
        ...

    def join(self) -> None: ...

    def settle(self) -> None:
        """Waits for what was started on neither lane: new weights, new tables."""
        ...

    def main(self) -> Any:
        """A context manager for the host's part: what it starts on the device goes to the main lane."""
        ...

    def beside(self) -> Any:
        """The same for the retrieval lane."""
        ...

    def mark_asked(self) -> None:
        """Remembers how far the main lane has come."""
        ...

    def await_asked(self) -> None:
        """The host waits for the main lane to come as far as that, not for what was replayed since."""
        ...

    def await_main(self) -> None:
        """The host waits for what was replayed on the main lane."""
        ...

    def join_replayed(self) -> None:
        """The main lane waits, on the device, for what was replayed on the retrieval lane."""
        ...


class Direct:
    """Steps are called each time: for the tests on a CPU, and as the eager engine on a GPU."""

    name = "calls"

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self._clock = StageClock(self._device)

    def record(self, label: str, step: Callable[[], None], *, beside: bool = False) -> Program:
        return _Called(self, step)

    def stage(self, name: str) -> Any:
        return self._clock.stage(name)

    @contextmanager
    def fork(self) -> Iterator[None]:
        yield

    def join(self) -> None: ...

    def settle(self) -> None: ...

    def main(self) -> Any:
        return nullcontext()

    def beside(self) -> Any:
        return nullcontext()

    def mark_asked(self) -> None: ...

    def await_asked(self) -> None:
        self.await_main()

    def await_main(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def join_replayed(self) -> None: ...


class _Called:
    def __init__(self, lanes: Direct, step: Callable[[], None]) -> None:
        self._lanes, self._step = lanes, step
        self._clock = lanes._clock

    def replay(self) -> None:
        lanes = self._lanes
        lanes._clock = self._clock = StageClock(lanes._device)
        # Events and streams are made on the current device, which need not be the model's.
        with torch.cuda.device(lanes._device) if lanes._device.type == "cuda" else nullcontext():
            self._step()

    def seconds(self) -> dict[str, float]:
        return self._clock.seconds()


class CudaGraphs:
    """One memory pool for all graphs, a main stream and a retrieval stream. Neither is the default stream."""

    name = "cuda graphs"

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._main = torch.cuda.Stream(device)
        self._beside = torch.cuda.Stream(device)
        self._marks: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] | None = None
        self._asked = torch.cuda.Event()
        self._done = torch.cuda.Event()
        self._retrieved = torch.cuda.Event()
        self._keeper: torch.cuda.CUDAGraph | None = None
        # A tensor of inference mode could not be written outside it.
        with torch.inference_mode(False), torch.cuda.stream(self._main):
            self._nothing = torch.zeros(1, device=device)
        with RECORDING:
            self._open_pool()

    def record(self, label: str, step: Callable[[], None], *, beside: bool = False) -> Program:
        stream = self._beside if beside else self._main
        stream.wait_stream(torch.cuda.current_stream(self._device))
        # Lazy libraries, autotuning and lazily made buffers happen here, off the record. An error is the step's own.
        with torch.cuda.stream(stream):
            for _ in range(WARMUPS):
                step()
        stream.synchronize()
        marks: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._marks = marks
        try:
            with RECORDING:
                graph = self._recorded(label, stream, step)
        finally:
            self._marks = None
        return _Graph(label, graph, stream, marks)

    def _recorded(self, label: str, stream: torch.cuda.Stream, step: Callable[[], Any]) -> torch.cuda.CUDAGraph:
        """Tried twice: a capture also fails because of what another thread does, such as torch.cuda.synchronize."""
        last = False
        while True:
            if self._keeper is None:
                self._open_pool()
            graph = torch.cuda.CUDAGraph()
            try:
                self._capture(graph, stream, step)
                return graph
            except BaseException as error:
                # If the device is lost, this raises an error of its own, which is the one to report.
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

    def _capture(self, graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, step: Callable[[], Any]) -> None:
        """With RECORDING held."""
        collecting = gc.isenabled()
        # A collection could end events and page-locked buffers of others, which a stream being captured must not see.
        gc.disable()
        # Torch keeps one cuBLAS workspace for each handle and stream, made at its first use and freed when anything
        # clears the table (Inductor does, before each of its own recordings). Made by a warm-up, it would be freed
        # under this graph. Made during the capture, it lies in the graph's pool; cleared afterwards, nothing outside
        # this pool's graphs uses it. Not cleared before the capture begins: that empties the allocator's cache, and a
        # product of another thread may be about to be launched with the workspace that was cleared.
        try:
            # Thread-local: other threads may allocate and copy meanwhile, but not synchronise the device (RECORDING).
            # The outer context restores the current stream, which torch.cuda.graph leaves changed if its end fails.
            with torch.cuda.stream(stream):
                with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                    torch._C._cuda_clearCublasWorkspaces()
                    step()
        finally:
            torch._C._cuda_clearCublasWorkspaces()
            if collecting:
                gc.enable()

    def _open_pool(self) -> None:
        """A new memory pool. It would end with its last graph, and its handle then opens no other: the keeper, which is
        never replayed, prevents that. After a failed capture, the keeper's own capture also ends the capturing state of
        the default generator (one flag in older releases of torch), in which random numbers and all replays raise."""
        self._pool = torch.cuda.graph_pool_handle()
        keeper = torch.cuda.CUDAGraph()
        try:
            # Allocates nothing: the device may be full.
            self._capture(keeper, self._main, self._nothing.zero_)
        except BaseException:
            self._abandon(keeper)
            raise
        self._keeper = keeper

    def _recover(self, graph: torch.cuda.CUDAGraph) -> None:
        """After a failed capture: recordings go on in a new pool. The earlier ones hold the old pool themselves."""
        self._abandon(graph)
        self._open_pool()

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """Ends what the failed capture left open in torch's allocator; a pool left open refuses the next capture."""
        self._keeper = None
        _ABANDONED.append(graph)
        graph.reset()
        index = self._main.device_index
        try:
            torch._C._cuda_endAllocateToPool(index, self._pool)
        except RuntimeError:
            # Not open: torch 2.12 and later end it themselves, and 2.14 also releases it. Once too often would take the
            # pool from the recordings that are in it.
            return
        torch._C._cuda_releasePool(index, self._pool)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        if self._marks is None:
            yield
            return
        # External: a plain event inside a capture is a dependency only, and has no time to tell.
        begin, end = (torch.cuda.Event(enable_timing=True, external=True) for _ in range(2))
        begin.record()
        yield
        end.record()
        self._marks.append((name, begin, end))

    @contextmanager
    def fork(self) -> Iterator[None]:
        self._beside.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._beside):
            yield

    def join(self) -> None:
        torch.cuda.current_stream(self._device).wait_stream(self._beside)

    def settle(self) -> None:
        # The lanes are no streams that the default one waits for, or that wait for it.
        torch.cuda.current_stream(self._device).synchronize()

    def main(self) -> Any:
        return torch.cuda.stream(self._main)

    def beside(self) -> Any:
        return torch.cuda.stream(self._beside)

    def mark_asked(self) -> None:
        self._asked.record(self._main)

    def await_asked(self) -> None:
        self._asked.synchronize()

    def await_main(self) -> None:
        self._done.record(self._main)
        self._done.synchronize()

    def join_replayed(self) -> None:
        self._retrieved.record(self._beside)
        self._main.wait_event(self._retrieved)


class _Graph:
    def __init__(self, label: str, graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, marks: list[Any]) -> None:
        self._label, self._graph, self._stream, self._marks = label, graph, stream, marks

    def replay(self) -> None:
        # The range is the host's: a replay has no ranges of its own, only kernels (docs/profiling.md maps them).
        with torch.cuda.nvtx.range(self._label), torch.cuda.stream(self._stream), RECORDING:
            self._graph.replay()

    def seconds(self) -> dict[str, float]:
        out: dict[str, float] = {}
        for name, begin, end in self._marks:
            out[name] = out.get(name, 0.0) + begin.elapsed_time(end) / 1e3
        return out


def culprit(error: BaseException) -> tuple[str, BaseException]:
    """The innermost call of a model, an op or a kernel that a capture failed in, and the error raised there.

    Leaving a broken capture raises once more: the error that broke it is then the context of the one that is seen.
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
    """The error and those it was raised while handling, latest first."""
    chain = [error]
    while (earlier := chain[-1].__context__) is not None:
        chain.append(earlier)
    return chain
