"""Measuring one call: percentiles, noise, and GPU work timed in bulk as replays of a captured graph."""

from __future__ import annotations

import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ragturbo.machine import NOISE_LIMIT, throttled

Call = Callable[..., Any]
# GPU work is captured where one eager call takes less than this. The host's time tells no more than that: ten launches
# may take it 0.2 ms and the device 0.05.
CAPTURE_BELOW = 5e-3
# One launch and its synchronize are then below a hundredth of a replay.
BULK_TARGET = 2e-3


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """p50, p95, p99, min, max and mean, by linear interpolation between the sorted values."""
    ordered = sorted(seconds)
    if not ordered:
        raise ValueError("no measurements")

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = math.floor(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    return {
        "p50": at(0.5),
        "p95": at(0.95),
        "p99": at(0.99),
        "min": ordered[0],
        "max": ordered[-1],
        "mean": sum(ordered) / len(ordered),
    }


def noise(seconds: Sequence[float]) -> float:
    """How far the medians of the first and the second half of a run lie apart: a smaller difference means nothing."""
    half = len(seconds) // 2
    if half == 0:
        return 0.0
    first, second = (percentiles(part)["p50"] for part in (seconds[:half], seconds[-half:]))
    return abs(first - second) / max(min(first, second), 1e-12)


def summary(seconds: Sequence[float], states: Sequence[dict[str, Any] | None] = ()) -> dict[str, Any]:
    """What every row stores: percentiles, of how many rounds, noise, and flags: too much of it, a GPU held back."""
    found = noise(seconds)
    flags = [f"noise {found:.1%}"] if found > NOISE_LIMIT else []
    if held := throttled(list(states)):
        flags.append(f"throttled: {', '.join(held)}")
    return {"seconds": percentiles(seconds), "rounds": len(seconds), "noise": found, "flags": flags}


def rotating(call: Call, inputs: Sequence[tuple[Any, ...]]) -> Callable[[], Any]:
    """`call` over one input after another, so that repeated runs do not measure a cache."""
    turns: Iterator[tuple[Any, ...]] = itertools.cycle(inputs)
    return lambda: call(*next(turns))


def rotation(nbytes: int, *, least: int = 8) -> int:
    """How many inputs of `nbytes` a call rotates over: twice what a GPU's L2 holds; `least` on a CPU."""
    if not torch.cuda.is_available():
        return least
    return max(least, math.ceil(2 * torch.cuda.get_device_properties(0).L2_cache_size / nbytes))


def normal(
    count: int, *shape: int, dtype: torch.dtype, device: str, seed: int = 1, channels_last: bool = False
) -> tuple[torch.Tensor, ...]:
    """`count` random tensors, parts of one buffer that is drawn where it stays: a CPU takes 20 s for a gigabyte.

    channels_last: shape is (B, C, H, W) and channels lie next to one another in memory.
    """
    generator = torch.Generator(device).manual_seed(seed)
    if channels_last:
        b, c, h, w = shape
        drawn = torch.randn(count, b, h, w, c, generator=generator, dtype=dtype, device=device)
        return tuple(x.permute(0, 3, 1, 2) for x in drawn)
    return torch.randn(count, *shape, generator=generator, dtype=dtype, device=device).unbind()


def synchronized(call: Callable[[], Any]) -> Callable[[], Any]:
    """Device work is asynchronous: the clock stops when the device has finished."""

    def run() -> Any:
        out = call()
        torch.cuda.synchronize()
        return out

    return run


def captured(call: Call, inputs: Sequence[tuple[Any, ...]], calls: int) -> Callable[[], None]:
    """One CUDA graph of `calls` calls over the rotating inputs; running it replays and waits."""
    # As many results are alive as inputs rotate: one that is freed is written again, out of the L2.
    results: deque[Any] = deque(maxlen=len(inputs))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # Lazy handles, compiles and autotuning must be over before capture.
        for arguments in itertools.islice(itertools.cycle(inputs), max(3, len(inputs))):
            call(*arguments)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for arguments in itertools.islice(itertools.cycle(inputs), calls):
            results.append(call(*arguments))

    def replay() -> None:
        graph.replay()
        torch.cuda.synchronize()

    return replay


def once(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def sample(run: Callable[[], Any], *, seconds: float = 1.0, least: int = 3, most: int = 1000) -> list[float]:
    """Times of single runs after two to warm up, until `seconds` have passed."""
    for _ in range(2):
        run()
    times: list[float] = []
    until = time.perf_counter() + seconds
    while len(times) < least or (len(times) < most and time.perf_counter() < until):
        times.append(once(run))
    return times


def sample_events(run: Callable[[], Any], *, seconds: float = 1.0, least: int = 3, most: int = 1000) -> list[float]:
    """As `sample`, between two events on the current stream: what the device did, launch gaps included."""
    for _ in range(2):
        run()
    torch.cuda.synchronize()
    times: list[float] = []
    until = time.perf_counter() + seconds
    while len(times) < least or (len(times) < most and time.perf_counter() < until):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return times


def bulk_calls(seconds: float, inputs: int = 1) -> int:
    """How many calls of this length one replay holds: whole turns of the inputs, and never less than one of them."""
    turns = math.ceil(BULK_TARGET / max(seconds, 1e-7) / inputs)
    return inputs * max(1, min(1000 // inputs, turns))


def in_bulk(call: Call, inputs: Sequence[tuple[Any, ...]]) -> tuple[Callable[[], None], int]:
    """`captured`, and how many calls it holds: by the device's time, which one turn of the inputs tells."""
    turn = captured(call, inputs, len(inputs))
    turn()
    calls = bulk_calls(once(turn) / len(inputs), len(inputs))
    return (turn if calls == len(inputs) else captured(call, inputs, calls)), calls


def interleaved(runs: dict[str, Callable[[], Any]], *, rounds: int) -> dict[str, list[float]]:
    """Each round runs all of them, in an order that turns, so that a drift of the machine falls on all alike."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for _ in range(2):
        for name in names:
            runs[name]()
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            times[name].append(once(runs[name]))
    return times
