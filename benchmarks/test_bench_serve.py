"""One Generator under load: threads, Poisson arrivals at shares of its capacity, first request after idling."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from benchmarks.load_generator import after_idling, closed_loop, open_loop
from benchmarks.timing import sample, summary
from ragturbo.bench.prompts import prompts
from ragturbo.bench.timing import percentiles
from ragturbo.machine import gpu_state, throttled

WORDS = prompts(256)
SHARES = (0.1, 0.5, 0.9)


def options(i: int, mode: str) -> dict[str, Any]:
    return {"prompt": WORDS[i % len(WORDS)], "seed": i, "mode": mode, "output_type": "uint8"}


@pytest.fixture(scope="module")
def served(bundle, make_generator):
    """The Generator and its mode."""
    return make_generator(engine="auto", max_queue=1024), "adapter" if bundle.adapter is not None else "slerp"


@pytest.fixture(scope="module")
def load_seconds(request):
    return max(1.0, 4 * float(request.config.getoption("benchmark_max_time")))


@pytest.fixture(scope="module")
def capacity(served, load_seconds) -> float:
    """Images per second with eight callers."""
    gen, mode = served
    return closed_loop(lambda i: gen(**options(i, mode)), threads=8, seconds=load_seconds).summary()["images_per_s"]


def record(benchmark: Any, run: Any, bundle: Any, mode: str, **extra: Any) -> None:
    """Run one load as one round; its distribution is in extra_info."""
    states: list[Any] = []
    # While the load runs.
    look = threading.Timer(0.5, lambda: states.append(gpu_state()))
    if bundle.device.type == "cuda":
        look.start()
    result = benchmark.pedantic(run, rounds=1)
    look.cancel()
    result["flags"] = [*result.get("flags", []), *(f"throttled: {reason}" for reason in throttled(states))]
    benchmark.group = "serve"
    sizes = {"model": bundle.name, "batch": None, "pixels": bundle.default_size}
    benchmark.extra_info.update(
        {"device": bundle.device.type, "dtype": str(bundle.dtype).removeprefix("torch."), "sizes": sizes, "mode": mode}
        | result
        | extra
    )


@pytest.mark.parametrize("threads", [1, 4, 16])
def test_threads(benchmark, bundle, served, load_seconds, threads):
    gen, mode = served
    before = gen.stats()["batches"]

    def run() -> dict[str, Any]:
        load = closed_loop(lambda i: gen(**options(i, mode)), threads=threads, seconds=load_seconds)
        batches = {size: count - before.get(size, 0) for size, count in gen.stats()["batches"].items()}
        return load.summary() | {"batches": batches}

    record(benchmark, run, bundle, mode, op="serve.threads", threads=threads)


@pytest.mark.parametrize("share", SHARES)
def test_poisson_arrivals(benchmark, bundle, served, capacity, load_seconds, share):
    gen, mode = served

    def run() -> dict[str, Any]:
        load = open_loop(lambda i: gen.submit(**options(i, mode)), rate=share * capacity, seconds=load_seconds)
        return load.summary()

    record(benchmark, run, bundle, mode, op="serve.poisson", share=share, capacity_images_per_s=capacity)


@pytest.mark.quick
def test_first_request_after_idling(benchmark, bundle, served):
    gen, mode = served

    def run() -> dict[str, Any]:
        turn = iter(range(10**6))
        busy = percentiles(sample(lambda: gen(**options(next(turn), mode)), seconds=0.5))
        rested = after_idling(lambda i: gen(**options(100 + i, mode)), pauses=5, idle=0.5)
        return summary(rested) | {"busy_seconds": busy, "idle_s": 0.5}

    record(benchmark, run, bundle, mode, op="serve.after_idling")
