"""Times by stage."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.profiler import record_function


class StageClock:
    """Sums seconds by stage: with the host's clock on a CPU, with events on a GPU, read once after the work."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._host: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        if self._cuda:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            with torch.cuda.nvtx.range(name), _recorded(name):
                begin.record()
                yield
                end.record()
            self._events.append((name, begin, end))
        else:
            start = time.perf_counter()
            with _recorded(name):
                yield
            self._host[name] = self._host.get(name, 0.0) + time.perf_counter() - start

    def seconds(self) -> dict[str, float]:
        """Call after waiting for the device."""
        out = dict(self._host)
        for name, begin, end in self._events:
            out[name] = out.get(name, 0.0) + begin.elapsed_time(end) / 1e3
        return out


@contextmanager
def host_stage(name: str, seconds: dict[str, float], device: torch.device) -> Iterator[None]:
    """Add the host's time to `seconds`, and mark a range in Nsight's timeline and torch's trace."""
    start = time.perf_counter()
    with torch.cuda.nvtx.range(name) if device.type == "cuda" else nullcontext(), _recorded(name):
        yield
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start


def _recorded(name: str) -> Any:
    """A range in torch's trace, only if a profiler is on, since it costs time."""
    return record_function(name) if getattr(torch.autograd.profiler, "_is_profiler_enabled", True) else nullcontext()
