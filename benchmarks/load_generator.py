"""Load on one Generator: closed-loop threads, and open-loop Poisson arrivals timed from the intended arrival."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from benchmarks import timing
from ragturbo.errors import Overloaded

Submit = Callable[[int], "Future[Any]"]


@dataclass
class LoadResult:
    """
    Args:
        rate: requested arrivals per second; 0 for a closed loop.
        latencies: seconds from the intended arrival to the finished image, which includes the delay of a slow server.
        late_start: maximum delay of the load generator itself; large values invalidate the run.
    """

    rate: float
    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    rejected: int = 0
    late_start: float = 0.0

    def summary(self) -> dict[str, Any]:
        out: dict[str, Any] = {
            "rate": self.rate,
            "requests": len(self.latencies) + self.rejected,
            "rejected": self.rejected,
            "images_per_s": len(self.latencies) / self.seconds if self.seconds else 0.0,
            "late_start_s": self.late_start,
        }
        if self.latencies:
            out |= timing.summary(self.latencies)
            if self.rejected:
                out["flags"].append(f"{self.rejected} rejected")
        return out


def closed_loop(call: Callable[[int], Any], *, threads: int, seconds: float) -> LoadResult:
    """Run `threads` callers with one request in flight each. The result gives the capacity."""
    result, lock = LoadResult(rate=0.0), threading.Lock()
    turn = iter(range(10**9))
    start = time.perf_counter()
    until = start + seconds

    def caller() -> None:
        while (begin := time.perf_counter()) < until:
            with lock:
                i = next(turn)
            call(i)
            took = time.perf_counter() - begin
            with lock:
                result.latencies.append(took)

    workers = [threading.Thread(target=caller) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    result.seconds = time.perf_counter() - start
    return result


def open_loop(submit: Submit, *, rate: float, seconds: float, seed: int = 0, least: int = 10) -> LoadResult:
    """Submit Poisson arrivals at `rate` per second, whether or not earlier requests have finished."""
    rng = np.random.default_rng(seed)
    gaps = rng.exponential(1 / rate, size=max(least, int(rate * seconds)))
    arrivals = np.cumsum(gaps)
    result, lock = LoadResult(rate=rate), threading.Lock()
    done = threading.Semaphore(0)
    start = time.perf_counter()

    def finished(intended: float, future: Future[Any]) -> None:
        now = time.perf_counter()
        with lock:
            if future.exception() is None:
                result.latencies.append(now - intended)
            else:
                result.rejected += 1
        done.release()

    for i, offset in enumerate(arrivals):
        intended = start + float(offset)
        wait = intended - time.perf_counter()
        if wait > 0:
            time.sleep(wait)
        result.late_start = max(result.late_start, time.perf_counter() - intended)
        try:
            future = submit(i)
        except Overloaded:
            result.rejected += 1
            done.release()
            continue
        future.add_done_callback(partial(finished, intended))
    for _ in arrivals:
        done.acquire()
    result.seconds = time.perf_counter() - start
    return result


def after_idling(call: Callable[[int], Any], *, pauses: int, idle: float) -> list[float]:
    """Return the seconds of the first request after each pause."""
    out = []
    for i in range(pauses):
        time.sleep(idle)
        begin = time.perf_counter()
        call(i)
        out.append(time.perf_counter() - begin)
    return out
