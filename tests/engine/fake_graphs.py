"""What torch does around a capture, without a GPU: pools and their use counts, the generator's flag, cuBLAS workspaces.

Modelled on CUDAGraph.cpp, CUDACachingAllocator.cpp and CUDAGeneratorImpl.cpp. How far a failed capture is undone
depends on the release: 2.11 leaves the pool open and the default generator capturing, 2.13 leaves the use count of the
pool, 2.14 nothing.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch


class FakeCuda:
    def __init__(self, release: str) -> None:
        self.release = release
        self.uses: Counter[int] = Counter()
        self.open: set[int] = set()
        self.capturing: dict[int, Graph] = {}
        """By thread."""
        self.generator_capturing = False
        self.workspaces: dict[tuple[int, int], int] = {}
        """(thread, stream) -> pool; 0 is memory outside all pools."""
        self.log: list[str] = []
        self.lost = False
        self.here = threading.local()
        self._handles = iter(range(1, 10_000))

    def patch(self, patch: pytest.MonkeyPatch) -> None:
        cuda, c = torch.cuda, torch._C
        numbers = iter(range(1, 10_000))
        patch.setattr(cuda, "Stream", lambda device=None: Stream(next(numbers)))
        patch.setattr(cuda, "Event", Event)
        patch.setattr(cuda, "CUDAGraph", lambda: Graph(self))
        patch.setattr(cuda, "graph", self.graph)
        patch.setattr(cuda, "stream", self.stream)
        patch.setattr(cuda, "current_stream", lambda device=None: self.current)
        patch.setattr(cuda, "graph_pool_handle", lambda: next(self._handles))
        patch.setattr(cuda, "synchronize", lambda device=None: self.synchronize())
        patch.setattr(cuda.nvtx, "range", lambda name: self.stream(self.current))
        patch.setattr(c, "_cuda_clearCublasWorkspaces", self.workspaces.clear)
        patch.setattr(c, "_cuda_endAllocateToPool", lambda index, pool: self.end(pool))
        patch.setattr(c, "_cuda_releasePool", lambda index, pool: self.uses.subtract([pool]))

    @property
    def current(self) -> Stream:
        return getattr(self.here, "stream", Stream(0))

    @property
    def mine(self) -> Graph | None:
        return self.capturing.get(threading.get_ident())

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.here.stream = self.current, stream
        try:
            yield
        finally:
            self.here.stream = before

    def synchronize(self) -> None:
        if self.lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        if self.capturing:
            for graph in self.capturing.values():
                graph.broken = True
            raise RuntimeError("operation not permitted when stream is capturing")

    def end(self, pool: int) -> None:
        if pool not in self.open:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.open.remove(pool)

    # What a step does

    def multiply(self) -> None:
        """A matrix product: its workspace is that of this thread and stream, allocated from the current pool."""
        graph = self.mine
        place = self.workspaces.setdefault((threading.get_ident(), self.current.number), graph.pool if graph else 0)
        if graph is not None:
            graph.workspaces.append(place)

    def random(self) -> None:
        if self.generator_capturing and self.mine is None:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")

    def item(self) -> None:
        """A value for the host."""
        if self.mine is not None:
            self.mine.broken = True
            raise RuntimeError("operation not permitted when stream is capturing")

    @contextmanager
    def graph(self, graph: Graph, pool: int, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local"
        self.synchronize()
        # As torch's: the stream stays current where the end raises.
        self.here.stream, before = stream, self.current
        graph.begin(pool)
        try:
            yield
        finally:
            graph.end()
        self.here.stream = before


class Stream:
    device_index = 0

    def __init__(self, number: int) -> None:
        self.number = number

    def wait_stream(self, other: Stream) -> None: ...

    def synchronize(self) -> None: ...


class Event:
    def __init__(self, **options: bool) -> None: ...

    def record(self, stream: Any = None) -> None: ...

    def elapsed_time(self, end: Event) -> float:
        return 1.0


class Graph:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda, self.pool = cuda, 0
        self.broken = self.ended = self.holds = False
        self.workspaces: list[int] = []

    def begin(self, pool: int) -> None:
        cuda = self.cuda
        if pool in cuda.open:
            raise RuntimeError("beginAllocateToPool: already recording to mempool_id")
        self.pool, self.holds = pool, True
        cuda.uses[pool] += 1
        cuda.open.add(pool)
        cuda.generator_capturing = cuda.release == "2.11"
        cuda.capturing[threading.get_ident()] = self
        # Another thread gets its chance.
        time.sleep(0.002)

    def end(self) -> None:
        cuda = self.cuda
        del cuda.capturing[threading.get_ident()]
        if self.broken and cuda.release == "2.11":
            raise RuntimeError("operation failed due to a previous error during capture")
        cuda.end(self.pool)
        cuda.generator_capturing = False
        if self.broken:
            raise RuntimeError("operation failed due to a previous error during capture")
        self.ended = True

    def reset(self) -> None:
        if self.holds and (self.ended or self.cuda.release == "2.14"):
            self.cuda.uses[self.pool] -= 1
            if not self.ended:
                self.cuda.open.discard(self.pool)
            self.holds = self.ended = False

    __del__ = reset

    def replay(self) -> None:
        self.cuda.random()
        assert self.ended and self.cuda.uses[self.pool] > 0, "the graph's memory is gone"
        assert not self.cuda.capturing or self.cuda.release != "2.11"
        self.cuda.log.append("replay")
