"""A Generator under a profiler: requests with prompts of their own, warmed up, on the device's own thread."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from ragturbo.generate import Generator

WARMUPS = 3
# Chrome trace categories of what ran on the device.
_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")


def run(gen: Generator, prompts: list[str], count: int, **options: Any) -> list[dict[str, float]]:
    """The timings of `count` requests, one prompt each and another seed each."""
    calls = (gen.submit(prompts[i % len(prompts)], seed=i, output_type="uint8", **options) for i in range(count))
    return [call.result().timings for call in calls]


@contextmanager
def traced(gen: Generator, trace: Path) -> Iterator[None]:
    """torch.profiler around what the device's thread does meanwhile, written as a Chrome trace."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    profiler = torch.profiler.profile(activities=activities)
    # A profiler sees the operations of the thread that started it.
    with on_device_thread(gen, profiler.start, profiler.stop):
        yield
    trace.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(trace))


@contextmanager
def cuda_range(gen: Generator) -> Iterator[None]:
    """cudaProfilerStart and -Stop: what nsys and ncu record when told to wait for them."""
    with on_device_thread(gen, torch.cuda.profiler.start, torch.cuda.profiler.stop):
        yield


@contextmanager
def on_device_thread(gen: Generator, start: Callable[[], Any], stop: Callable[[], Any]) -> Iterator[None]:
    gen.call(start)
    try:
        yield
    finally:
        gen.call(stop)


def median(timings: list[dict[str, float]]) -> dict[str, float]:
    """By stage, in the order they were met."""
    stages = dict.fromkeys(stage for row in timings for stage in row)
    return {stage: sorted(row.get(stage, 0.0) for row in timings)[len(timings) // 2] for stage in stages}


def summary(trace: Path, most: int = 12) -> dict[str, Any]:
    """What a Chrome trace says of the device: by stream its operations, busy and idle time, the costliest kernels, and
    how much of what the other streams did lay beside work of the busiest one. Empty without a GPU."""
    events = [e for e in json.loads(trace.read_text("utf-8"))["traceEvents"] if e.get("cat") in _ON_DEVICE]
    streams: dict[int, list[tuple[float, float, str]]] = {}
    for event in events:
        start = float(event["ts"])
        streams.setdefault(event["args"]["stream"], []).append((start, start + float(event["dur"]), event["name"]))
    if not streams:
        return {}
    busiest = max(streams, key=lambda s: _length(_merged(streams[s])))
    main = _merged(streams[busiest])
    out: dict[str, Any] = {"main stream": busiest, "streams": {}}
    for stream, work in streams.items():
        spans = _merged(work)
        beside = sum(max(0.0, min(b, d) - max(a, c)) for a, b in spans for c, d in main)
        totals: dict[str, list[float]] = {}
        for start, end, name in work:
            totals.setdefault(name[:90], []).append(end - start)
        out["streams"][stream] = {
            "operations": len(work),
            "busy_us": round(_length(spans), 1),
            "idle_us": round(spans[-1][1] - spans[0][0] - _length(spans), 1),
            "beside_main_us": None if stream == busiest else round(beside, 1),
            "costliest": [
                {"name": name, "calls": len(times), "us": round(sum(times), 1)}
                for name, times in sorted(totals.items(), key=lambda item: -sum(item[1]))[:most]
            ],
        }
    return out


def _merged(work: list[tuple[float, float, str]]) -> list[tuple[float, float]]:
    """Intervals that touch, as one."""
    spans: list[tuple[float, float]] = []
    for start, end, _ in sorted(work):
        if spans and start <= spans[-1][1]:
            spans[-1] = (spans[-1][0], max(spans[-1][1], end))
        else:
            spans.append((start, end))
    return spans


def _length(spans: list[tuple[float, float]]) -> float:
    return sum(end - start for start, end in spans)


def commands(arguments: list[str]) -> dict[str, str]:
    """The exact command lines that record the same requests with NVIDIA's tools."""
    import shlex

    again = shlex.join(["ragturbo", "profile", *arguments, "--range"])
    return {
        # Without "node" a replay is one bar; with it, every kernel of the graph is told apart.
        "nsys": "nsys profile --trace=cuda,nvtx,osrt --cuda-graph-trace=node --capture-range=cudaProfilerApi "
        f"--capture-range-end=stop --force-overwrite=true --output=ragturbo {again}",
        "ncu": "ncu --profile-from-start=off --graph-profiling=node --set=full --force-overwrite --export=ragturbo "
        f"{again} --requests 1",
    }
