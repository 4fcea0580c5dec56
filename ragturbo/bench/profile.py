"""Profile a Generator's requests on its device thread, and summarize the trace."""

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
    """Run `count` requests with one prompt and seed each, and return their timings."""
    calls = (gen.submit(prompts[i % len(prompts)], seed=i, output_type="uint8", **options) for i in range(count))
    return [call.result().timings for call in calls]


@contextmanager
def traced(gen: Generator, trace: Path) -> Iterator[None]:
    """Run torch.profiler on the device thread inside the block, and write a Chrome trace."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    # torch's profiler prints an error if it is first started on another thread than the one that imported torch.
    with torch.profiler.profile(activities=activities[:1]):
        pass
    profiler = torch.profiler.profile(activities=activities)
    # A profiler records the operations of the thread that started it.
    with on_device_thread(gen, profiler.start, profiler.stop):
        yield
    trace.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(trace))


@contextmanager
def cuda_range(gen: Generator) -> Iterator[None]:
    """Call cudaProfilerStart and cudaProfilerStop around the block, for nsys and ncu."""
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
    """Return the median of each stage, in order of appearance."""
    stages = dict.fromkeys(stage for row in timings for stage in row)
    return {stage: sorted(row.get(stage, 0.0) for row in timings)[len(timings) // 2] for stage in stages}


def summary(trace: Path, most: int = 12) -> dict[str, Any]:
    """Summarize the device's work in a Chrome trace; empty without a GPU.

    Returns:
        "main stream", the busiest, and for each of "streams" its number of operations, busy and idle time, overlap with
        the main stream, and its `most` costliest kernels.
    """
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
    """Merge overlapping and adjacent intervals."""
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
    """Return the command lines that record the same requests with nsys and ncu."""
    import shlex

    again = shlex.join(["ragturbo", "profile", *arguments, "--range"])
    # ncu repeats every kernel many times.
    once = shlex.join(["ragturbo", "profile", *_without_requests(arguments), "--range", "--requests", "1"])
    return {
        # "node" shows every kernel of a graph.
        "nsys": "nsys profile --trace=cuda,nvtx,osrt --cuda-graph-trace=node --capture-range=cudaProfilerApi "
        f"--capture-range-end=stop --force-overwrite=true --output=ragturbo {again}",
        "ncu": "ncu --profile-from-start=off --graph-profiling=node --set=full --force-overwrite --export=ragturbo "
        f"{once}",
    }


def _without_requests(arguments: list[str]) -> list[str]:
    words = iter(arguments)
    # The value of "--requests N" is skipped with it.
    return [w for w in words if not w.startswith("--requests=") and not (w == "--requests" and next(words, ""))]
