"""Open-loop load: latency counts from the intended arrival."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

from benchmarks.load_generator import after_idling, closed_loop, open_loop
from ragturbo.errors import Overloaded


def test_a_server_that_stands_still_shows_it_in_every_later_request():
    gate = threading.Event()
    with ThreadPoolExecutor(1) as server:
        server.submit(gate.wait, 10)
        threading.Timer(0.4, gate.set).start()
        load = open_loop(lambda i: server.submit(lambda: None), rate=200.0, seconds=0.2)
    # The requests were quick once they ran; what callers waited was the stall.
    assert len(load.latencies) == 40 and load.rejected == 0
    assert min(load.latencies) > 0.05 and load.summary()["seconds"]["max"] > 0.3


def test_refused_requests_are_counted_and_have_no_latency():
    def submit(i: int) -> Future[None]:
        if i % 2:
            raise Overloaded("full")
        done: Future[None] = Future()
        done.set_result(None)
        return done

    load = open_loop(submit, rate=1000.0, seconds=0.02)
    assert load.rejected == len(load.latencies) == 10
    found = load.summary()
    assert found["requests"] == 20 and found["rounds"] == 10 and "10 rejected" in found["flags"]


def test_arrivals_are_poisson_at_the_rate_and_the_same_for_a_seed():
    def arrivals(seed: int) -> list[float]:
        at: list[float] = []

        def submit(i: int) -> Future[None]:
            at.append(time.perf_counter())
            done: Future[None] = Future()
            done.set_result(None)
            return done

        open_loop(submit, rate=2000.0, seconds=0.2, seed=seed)
        return at

    assert len(arrivals(1)) == len(arrivals(2)) == 400


def test_a_closed_loop_keeps_every_caller_busy():
    running, most, lock = 0, 0, threading.Lock()

    def call(i: int) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.01)
        with lock:
            running -= 1

    load = closed_loop(call, threads=4, seconds=0.2)
    assert most == 4 and load.summary()["images_per_s"] > 0
    assert len(after_idling(call, pauses=2, idle=0.01)) == 2
