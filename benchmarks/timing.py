"""Time calls: over rotating inputs, interleaved, and in bulk as replays of a CUDA graph."""

from __future__ import annotations

import itertools
import math
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ragturbo.bench.timing import noise, percentiles
from ragturbo.machine import NOISE_LIMIT, throttled

Call = Callable[..., Any]
# Folder of databases and indexes that are built once.
CACHE = Path(os.environ.get("RAGTURBO_BENCH_CACHE", Path.home() / ".cache" / "ragturbo-bench"))
# GPU work is captured if one eager call takes less than this: below it, the host's launches may dominate.
CAPTURE_BELOW = 5e-3
# Length of one replay: one launch and its synchronize are then below 1 % of it.
BULK_TARGET = 2e-3


def summary(seconds: Sequence[float], states: Sequence[dict[str, Any] | None] = ()) -> dict[str, Any]:
    """Return the percentiles, number of rounds, noise and flags of one benchmark.

    Args:
        seconds: the time of each round.
        states: `machine.gpu_state()` taken between the rounds; a throttled GPU adds a flag.
    """
    found = noise(seconds)
    flags = [f"noise {found:.1%}"] if found > NOISE_LIMIT else []
    if reasons := throttled(list(states)):
        flags.append(f"throttled: {', '.join(reasons)}")
    return {"seconds": percentiles(seconds), "rounds": len(seconds), "noise": found, "flags": flags}


def once(run: Callable[[], Any]) -> float:
    """Return the wall time of one call in seconds."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def sample(run: Callable[[], Any], *, seconds: float = 1.0, least: int = 3, most: int = 1000) -> list[float]:
    """Return times of single calls, after two warm-up calls, until `seconds` have passed."""
    for _ in range(2):
        run()
    times: list[float] = []
    until = time.perf_counter() + seconds
    while len(times) < least or (len(times) < most and time.perf_counter() < until):
        times.append(once(run))
    return times


def rotating(call: Call, inputs: Sequence[tuple[Any, ...]]) -> Callable[[], Any]:
    """Return a function that calls `call` with the next input each time, so that repeats do not measure a cache."""
    turns = itertools.cycle(inputs)
    return lambda: call(*next(turns))


def rotation(nbytes: int, *, least: int = 8) -> int:
    """Return how many inputs of `nbytes` to rotate over: twice the size of a GPU's L2, `least` on a CPU."""
    if not torch.cuda.is_available():
        return least
    return max(least, math.ceil(2 * torch.cuda.get_device_properties(0).L2_cache_size / nbytes))


def normal(
    count: int, *shape: int, dtype: torch.dtype, device: str, seed: int = 1, channels_last: bool = False
) -> tuple[torch.Tensor, ...]:
    """Return `count` random tensors, views of one buffer drawn on the device.

    Args:
        channels_last: shape is (B, C, H, W), stored in channels_last order.
    """
    generator = torch.Generator(device).manual_seed(seed)
    if channels_last:
        b, c, h, w = shape
        drawn = torch.randn(count, b, h, w, c, generator=generator, dtype=dtype, device=device)
        return tuple(x.permute(0, 3, 1, 2) for x in drawn)
    return torch.randn(count, *shape, generator=generator, dtype=dtype, device=device).unbind()


def synchronized(call: Callable[[], Any]) -> Callable[[], Any]:
    """Return `call` followed by torch.cuda.synchronize()."""

    def run() -> Any:
        out = call()
        torch.cuda.synchronize()
        return out

    return run


def captured(call: Call, inputs: Sequence[tuple[Any, ...]], calls: int) -> Callable[[], None]:
    """Capture `calls` calls over the rotating inputs in one CUDA graph; return a function that replays and waits."""
    # Keep as many results as there are inputs: memory that is freed at once would be reused from the L2.
    results: deque[Any] = deque(maxlen=len(inputs))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # Lazy handles, compilation and autotuning have to happen before the capture.
        for arguments in itertools.islice(itertools.cycle(inputs), max(3, len(inputs))):
            call(*arguments)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for arguments in itertools.islice(itertools.cycle(inputs), calls):
            results.append(call(*arguments))
    return synchronized(graph.replay)


def bulk_calls(seconds: float, inputs: int = 1) -> int:
    """Return how many calls of this length one replay holds: a multiple of the number of inputs."""
    turns = math.ceil(BULK_TARGET / max(seconds, 1e-7) / inputs)
    return inputs * max(1, min(1000 // inputs, turns))


def in_bulk(call: Call, inputs: Sequence[tuple[Any, ...]]) -> tuple[Callable[[], None], int]:
    """Return `captured` and its number of calls, chosen from the device time of one turn over the inputs."""
    turn = captured(call, inputs, len(inputs))
    turn()
    calls = bulk_calls(once(turn) / len(inputs), len(inputs))
    return (turn if calls == len(inputs) else captured(call, inputs, calls)), calls


def interleaved(runs: dict[str, Callable[[], Any]], *, rounds: int) -> dict[str, list[float]]:
    """Time all runs in each round, in rotating order, so that a drift of the machine affects all of them alike."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for _ in range(2):
        for name in names:
            runs[name]()
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            times[name].append(once(runs[name]))
    return times
