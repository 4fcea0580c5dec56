"""The device thread, with an engine that computes a known function of each row."""

from __future__ import annotations

import gc
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future

import numpy as np
import pytest
import torch
from submission import submit

from ragturbo.engine.executor import Executor
from ragturbo.engine.request import Request
from ragturbo.engine.result import Result
from ragturbo.errors import (
    DeadlineExceeded,
    DeviceLost,
    GenerationError,
    NonFiniteOutput,
    OutOfDeviceMemory,
    Overloaded,
)


class Doubler:
    """An engine that doubles its input. It waits for `gate`; `fail(batch)` may raise."""

    name = "doubler"

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Semaphore(0)
        self.fail: Callable[[Request], None] = lambda batch: None
        self.sizes: list[int] = []

    def run(self, batch: Request) -> Result:
        self.entered.release()
        assert self.gate.wait(30)
        self.sizes.append(len(batch))
        self.fail(batch)
        out = batch.latents * 2
        ok = torch.isfinite(out).flatten(1).all(1)
        return Result.without_neighbours(ok, latents=out)


def batch(*values: float, mode: str = "none") -> Request:
    rows = len(values)
    latents = torch.tensor(values).view(rows, 1, 1, 1)
    return Request(latents, torch.zeros(rows), torch.zeros(rows), torch.zeros(rows), mode=mode, output_type="latent")


def values(future: Future[Result]) -> list[float]:
    result = future.result(30)
    assert result.latents is not None
    return result.latents.flatten().tolist()


@pytest.fixture
def engine() -> Doubler:
    return Doubler()


@pytest.fixture
def executor(engine: Doubler) -> Iterator[Executor]:
    executor = Executor(engine, batch_sizes=(1, 2, 4, 8), max_queue=16)
    yield executor
    engine.gate.set()
    executor.close()


def held(engine: Doubler, executor: Executor) -> Future[Result]:
    """A request that stays on the device until the gate opens, so that later requests have to queue."""
    engine.gate.clear()
    first = submit(executor, batch(-1))
    assert engine.entered.acquire(timeout=30)
    return first


def test_waiting_requests_of_one_kind_run_as_one_padded_batch_and_get_their_own_rows(engine, executor):
    held(engine, executor)
    futures = [submit(executor, batch(float(i), float(i) + 0.5)) for i in range(3)]
    other = submit(executor, batch(9, mode="slerp"))
    engine.gate.set()
    assert [values(f) for f in futures] == [[0, 1], [2, 3], [4, 5]]
    assert values(other) == [18]
    # Six rows run in the bucket of eight, and requests of another kind run in a batch of their own.
    assert engine.sizes == [1, 8, 1]
    assert futures[0].result().bucket == 8 and other.result().bucket == 1


def test_a_full_queue_refuses_at_once_and_takes_all_of_a_call_or_nothing(engine, executor):
    held(engine, executor)
    for i in range(15):
        submit(executor, batch(float(i)))
    with pytest.raises(Overloaded, match="15 requests wait and max_queue is 16"):
        submit(executor, batch(*range(9)))
    assert len(executor.queue) == 15
    submit(executor, batch(1))


def test_a_reservation_holds_until_it_is_used_or_released(engine, executor):
    held(engine, executor)
    with executor.reserve(9) as reservation:
        # Nine rows are two batches.
        for i in range(14):
            submit(executor, batch(float(i)))
        for refuse in (executor.check_room, executor.reserve, lambda: submit(executor, batch(1))):
            with pytest.raises(Overloaded, match="16 requests wait and max_queue is 16"):
                refuse()
        kept = batch(*range(9))
        executor.submit(kept, reservation)
        # A reservation can be used once.
        with pytest.raises(Overloaded):
            submit(executor, batch(1), reservation=reservation)
    assert len(executor.queue) == 16 and kept.pieces[1].future.cancel()
    with executor.reserve(), pytest.raises(Overloaded):
        executor.reserve()
    with executor.reserve() as reservation:
        pass
    submit(executor, batch(1))
    # A released reservation holds no room.
    with pytest.raises(Overloaded):
        submit(executor, batch(1), reservation=reservation)
    assert executor.counts["rejected"] == 6


def test_a_reservation_is_for_so_many_and_is_not_refused_for_its_deadline(engine, executor):
    values(submit(executor, batch(1)))
    assert engine.entered.acquire(timeout=30)
    held(engine, executor)
    with executor.reserve(1, timeout=60) as reservation:
        for i in range(15):
            submit(executor, batch(float(i)))
        # Long past what the pace allows by now; it was decided before.
        late = submit(executor, batch(3), timeout=1e-9, reservation=reservation)
    with pytest.raises(Overloaded), executor.reserve(1):
        pass
    engine.gate.set()
    with pytest.raises(DeadlineExceeded):
        late.result(30)


def test_a_reservation_is_never_refused_whoever_else_submits(engine, executor, long_count):
    """Threads that reserve, wait and submit, among others that do not reserve; the queue has room for half of them."""
    refused, beyond, times = [], [], long_count(500)

    def client(i: int) -> None:
        for _ in range(times):
            try:
                with executor.reserve() as reservation:
                    time.sleep(0.0002 * (i % 3))
                    try:
                        future = submit(executor, batch(float(i)), reservation=reservation)
                    except Overloaded:
                        refused.append(i)
                        continue
                    if i % 5 == 0:
                        future.cancel()
                        continue
                assert values(future) == [2 * i]
            except Overloaded:
                time.sleep(0.0001)

    def without_reservation() -> None:
        for _ in range(times):
            try:
                submit(executor, batch(1))
            except Overloaded:
                pass
            if len(executor.queue) > 16:
                beyond.append(len(executor.queue))

    threads = [threading.Thread(target=client, args=(i,)) for i in range(24)]
    threads += [threading.Thread(target=without_reservation) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not refused and not beyond and executor.counts["rejected"] > 0
    executor.close()
    # Nothing is left reserved.
    assert executor.queue._reserved == 0 and not executor.queue._reservations


def test_a_deadline_that_passes_in_the_queue_never_reaches_the_device(engine, executor):
    held(engine, executor)
    late = submit(executor, batch(1), timeout=0.01)
    patient = submit(executor, batch(2))
    time.sleep(0.05)
    engine.gate.set()
    with pytest.raises(DeadlineExceeded):
        late.result(30)
    assert values(patient) == [4]
    assert engine.sizes == [1, 1]


def test_a_cancelled_request_makes_room(engine, executor, rng):
    held(engine, executor)
    futures = [submit(executor, batch(float(i))) for i in range(12)]
    gone = set(rng.choice(12, 6, replace=False).tolist())
    assert all(futures[i].cancel() for i in gone)
    engine.gate.set()
    for i, future in enumerate(futures):
        if i in gone:
            with pytest.raises(CancelledError):
                future.result(30)
        else:
            assert values(future) == [2 * i]
    assert len(executor.queue) == 0 and executor.counts["cancelled"] == 6


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), OutOfDeviceMemory),
        (MemoryError(), OutOfDeviceMemory),
        (ValueError("surprise"), GenerationError),
    ],
)
def test_one_requests_fault_is_its_own(engine, executor, fault, expected):
    def fail(b: Request) -> None:
        if bool((b.latents == 13).any()):
            raise fault

    engine.fail = fail
    held(engine, executor)
    good, bad, also_good = (submit(executor, batch(v)) for v in (1.0, 13.0, 2.0))
    engine.gate.set()
    assert values(good) == [2] and values(also_good) == [4]
    with pytest.raises(expected):
        bad.result(30)
    assert executor.healthy
    assert values(submit(executor, batch(3))) == [6]


def test_not_a_number_is_the_error_of_the_request_it_belongs_to(engine, executor):
    held(engine, executor)
    good, bad = submit(executor, batch(1)), submit(executor, batch(2, float("nan")))
    engine.gate.set()
    assert values(good) == [2]
    with pytest.raises(NonFiniteOutput, match=r"image \[1\]"):
        bad.result(30)


def test_a_batch_that_runs_again_one_by_one_finds_what_it_held_freed(engine, executor):
    """Tensors in a traceback's frames would still be allocated: the device would be as full as at the first try."""
    held_at_first, still_there = [], []

    def fail(b: Request) -> None:
        if len(b) > 1:
            activations = torch.zeros(8)
            held_at_first.append(weakref.ref(activations))
            raise torch.OutOfMemoryError("no room")
        still_there.append([ref for ref in held_at_first if ref() is not None])

    held(engine, executor)
    futures = [submit(executor, batch(float(i))) for i in range(3)]
    engine.fail = fail
    engine.gate.set()
    assert [values(f) for f in futures] == [[0], [2], [4]]
    assert held_at_first and still_there and not any(still_there)


@pytest.mark.parametrize(
    "said",
    ["CUDA error: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"],
)
def test_an_allocation_that_fails_outside_torchs_allocator_costs_its_request_alone(engine, executor, said):
    def fail(b: Request) -> None:
        raise RuntimeError(said)

    engine.fail = fail
    with pytest.raises(OutOfDeviceMemory):
        submit(executor, batch(1)).result(30)
    engine.fail = lambda b: None
    assert executor.healthy and values(submit(executor, batch(1))) == [2]


def test_a_device_lost_while_a_batch_runs_one_by_one_is_not_asked_again(engine, executor):
    def fail(b: Request) -> None:
        if len(b) > 1:
            raise RuntimeError("an injected fault")
        if b.latents.max() > 10:
            raise RuntimeError("CUDA error: an illegal memory access")

    held(engine, executor)
    futures = [submit(executor, batch(float(i))) for i in (11, 12, 13)]
    engine.fail = fail
    engine.gate.set()
    for future in futures:
        with pytest.raises(DeviceLost):
            future.result(30)
    assert engine.sizes == [1, 4, 1] and executor.counts["failed"] == 3


def test_a_lost_device_fails_everything_at_once_and_says_restart(engine, executor):
    def fail(b: Request) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    first = held(engine, executor)
    waiting = [submit(executor, batch(float(i))) for i in range(3)]
    engine.fail = fail
    engine.gate.set()
    for future in [first, *waiting]:
        with pytest.raises(DeviceLost, match="restart"):
            future.result(30)
    assert not executor.healthy
    with pytest.raises(DeviceLost):
        submit(executor, batch(1))


def test_every_request_of_a_lost_device_has_an_error_of_its_own(engine, executor):
    def fail(b: Request) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    first = held(engine, executor)
    futures = [first, *(submit(executor, batch(float(i))) for i in range(3))]
    engine.fail = fail
    engine.gate.set()
    errors = [future.exception(30) for future in futures]
    with pytest.raises(DeviceLost) as later:
        submit(executor, batch(1))
    assert len({id(error) for error in [*errors, later.value]}) == 5
    assert all("illegal memory access" in str(error.__cause__) for error in [*errors, later.value])


def test_the_error_of_a_failed_batch_does_not_keep_its_request(engine, executor):
    def fail(b: Request) -> None:
        raise ValueError("an injected fault")

    engine.fail = fail
    gc.collect()
    gc.disable()
    try:
        request = batch(1)
        executor.submit(request)
        error = request.future.exception(30)
        kept = weakref.ref(request)
        executor.call(lambda: None)
        del request
        assert isinstance(error, GenerationError) and kept() is None
    finally:
        gc.enable()


def test_a_refusal_of_several_pieces_says_when_to_retry(engine, executor):
    values(submit(executor, batch(1)))
    assert engine.entered.acquire(timeout=30)
    held(engine, executor)
    for i in range(15):
        submit(executor, batch(float(i)))
    with pytest.raises(Overloaded) as checked:
        executor.check_room(9)
    assert checked.value.retry_after > 0


def test_close_finishes_what_waits_and_takes_no_more(engine, executor):
    held(engine, executor)
    futures = [submit(executor, batch(float(i))) for i in range(5)]
    threading.Timer(0.05, engine.gate.set).start()
    executor.close()
    assert [values(f) for f in futures] == [[2.0 * i] for i in range(5)]
    with pytest.raises(GenerationError, match="closed"):
        submit(executor, batch(1))


def test_a_window_waits_for_more_requests_but_not_once_the_bucket_is_full(engine):
    # A window longer than any wait below: only a full bucket can end it in time.
    executor = Executor(engine, batch_sizes=(1, 2, 4), batch_window=600.0, max_queue=16)
    try:
        futures = [submit(executor, batch(float(i))) for i in range(4)]
        assert [values(f) for f in futures] == [[0], [2], [4], [6]]
        assert engine.sizes == [4]
    finally:
        executor.close()


def test_a_call_runs_on_the_device_thread_between_batches_and_returns_its_error(engine, executor):
    name = executor.call(lambda: threading.current_thread().name)
    assert name == "ragturbo-device"
    with pytest.raises(ZeroDivisionError):
        executor.call(lambda: 1 // 0)
    assert values(submit(executor, batch(1))) == [2]


def test_results_do_not_change_while_later_requests_run(engine, executor, rng):
    kept = submit(executor, batch(*rng.normal(size=4).tolist())).result(30)
    assert kept.latents is not None
    before = kept.latents.clone()
    for _ in range(20):
        values(submit(executor, batch(*rng.normal(size=4).tolist())))
    assert torch.equal(kept.latents, before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_is_told_so(executor):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            submit(executor, batch(1))
            os.write(write, b"it ran")
        except GenerationError as error:
            os.write(write, str(error).encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert b"after forking" in os.read(read, 1000)


def test_many_threads_each_get_their_own(engine, executor, rng, long_count):
    executor.queue._max_queue = 10**6
    count = long_count(1000)
    numbers = rng.integers(0, 1000, size=(16, count // 16 + 1))
    wrong: list[tuple[float, list[float]]] = []

    def client(row: np.ndarray) -> None:
        for number in row.tolist():
            got = values(submit(executor, batch(float(number), mode="slerp" if number % 3 else "none")))
            if got != [2.0 * number]:
                wrong.append((number, got))

    threads = [threading.Thread(target=client, args=(row,)) for row in numbers]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert not wrong
    assert executor.counts["finished"] == numbers.size
