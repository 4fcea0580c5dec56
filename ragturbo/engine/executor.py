"""One thread owns the device; any number of threads hand it work.

Requests wait in a bounded queue. What is waiting and may run together does, up to the largest bucket. A request's
deadline, cancellation and error are its own: nothing of them reaches another request of the same batch.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ragturbo.engine.faults import typed
from ragturbo.engine.pace import Pace
from ragturbo.engine.step import Engine, StepBatch, StepResult, join
from ragturbo.errors import (
    DeadlineExceeded,
    DeviceLost,
    GenerationError,
    NonFiniteOutput,
    Overloaded,
)

T = TypeVar("T")
log = logging.getLogger("ragturbo")

_used = False
_forked_after_use = False


def _note_fork() -> None:
    global _forked_after_use
    _forked_after_use = _forked_after_use or _used


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


def refuse_after_fork() -> None:
    """Torch's own threads do not survive a fork: a child of a process that has run a model would wait for them for
    ever, or be refused by CUDA."""
    if _forked_after_use:
        raise GenerationError(
            f"process {os.getpid()} was forked from one that had already run a model; torch cannot go on there. Make "
            "the first Generator after forking, or start workers by 'spawn'."
        )


@dataclass(eq=False)
class Job:
    batch: StepBatch
    deadline: float | None = None
    """time.monotonic() after which the result is worthless."""
    future: Future[StepResult] = field(default_factory=Future)
    queued_at: float = field(default_factory=time.monotonic)

    @property
    def expired(self) -> bool:
        return self.deadline is not None and time.monotonic() >= self.deadline


@dataclass(eq=False)
class Place:
    """Room in the queue that nobody else is given, until `submit` takes it or the `with` block ends."""

    executor: Executor
    rows: int
    jobs: int

    def __enter__(self) -> Place:
        return self

    def __exit__(self, *exception: object) -> None:
        self.executor.give_back(self)


class Executor:
    def __init__(
        self, engine: Engine, *, batch_sizes: tuple[int, ...], batch_window: float = 0.0, max_queue: int = 64
    ) -> None:
        refuse_after_fork()
        self._engine = engine
        self._buckets = batch_sizes
        self._window = batch_window
        self._max_queue = max_queue
        self._queue: deque[Job] = deque()
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._places: set[Place] = set()
        self._reserved = 0
        """Jobs of all places: what is in the queue, or is about to be."""
        self._retry_after = 0.0
        self._wake = threading.Condition()
        self._counting = threading.Lock()
        self._closing = False
        self._dead: DeviceLost | None = None
        self._pid = os.getpid()
        self._pace = Pace(self.max_rows)
        self.counts: Counter[str] = Counter()
        self.batch_sizes: Counter[int] = Counter()
        self._thread = threading.Thread(target=self._loop, name="ragturbo-device", daemon=True)
        self._thread.start()

    @property
    def max_rows(self) -> int:
        return self._buckets[-1]

    @property
    def healthy(self) -> bool:
        return self._dead is None and not self._closing and os.getpid() == self._pid and self._thread.is_alive()

    @property
    def waiting(self) -> int:
        return len(self._queue)

    @property
    def running(self) -> int:
        """Rows on the device now, padding included."""
        return self._pace.running

    def expected_wait(self, rows: int = 1) -> float:
        """Seconds until `rows` more would be done, by the pace of the last batches; 0 where that is not known yet."""
        with self._wake:
            return self._expected_wait(rows)

    def forget_pace(self) -> None:
        """After a warm-up, whose batches loaded, compiled and captured."""
        with self._wake:
            self._pace.forget()

    def check_room(self, rows: int = 1, timeout: float | None = None) -> None:
        """Raises what `submit` would, before anything has been spent on the request. It keeps no room."""
        self._check_process()
        self._check_open()
        jobs = self._jobs(rows)
        # Without the lock, for whoever is refused needs none: while a batch is put together the queue looks shorter
        # than it is, never longer.
        if len(self._queue) + self._reserved + jobs > self._max_queue:
            raise self._full(self._retry_after)
        with self._wake:
            self._check_room(rows, jobs, timeout)

    def reserve(self, rows: int = 1, timeout: float | None = None) -> Place:
        """`check_room`, and the room is kept: `submit(…, place)` will not refuse. For `with`."""
        self._check_process()
        place = Place(self, rows, self._jobs(rows))
        with self._wake:
            self._check_room(place.rows, place.jobs, timeout)
            self._places.add(place)
            self._reserved += place.jobs
        return place

    def give_back(self, place: Place) -> None:
        """Nothing happens to a place that `submit` has taken."""
        with self._wake:
            self._take(place)

    def _take(self, place: Place) -> bool:
        """False: it is another executor's, or was taken or given back before."""
        if place not in self._places:
            return False
        self._places.remove(place)
        self._reserved -= place.jobs
        return True

    def _jobs(self, rows: int) -> int:
        return -(-rows // self.max_rows)

    def submit(
        self, batches: list[StepBatch], timeout: float | None = None, place: Place | None = None
    ) -> list[Future[StepResult]]:
        """All of them are taken or none is: Overloaded at once where the queue has no room, or is so long that the
        deadline would pass in it; never where `place` was kept for as much."""
        self._check_process()
        deadline = None if timeout is None else time.monotonic() + timeout
        jobs = [Job(b, deadline) for b in batches]
        rows = sum(map(len, batches))
        for job in jobs:
            # Not bound to the job: that would be a cycle, and what a request holds would outlive it until a collection.
            job.future.add_done_callback(self._leave)
        with self._wake:
            kept = place is not None and self._take(place) and place.rows >= rows and place.jobs >= len(jobs)
            if kept:
                self._check_open()
            else:
                self._check_room(rows, len(jobs), timeout)
            self._queue.extend(jobs)
            self.counts["accepted"] += len(jobs)
            self._wake.notify()
        return [job.future for job in jobs]

    def _check_room(self, rows: int, jobs: int, timeout: float | None) -> None:
        self._check_open()
        taken = len(self._queue) + self._reserved
        if taken + jobs > self._max_queue:
            raise self._full(self._expected_wait(0))
        # Where nothing waits it is taken whatever the pace was: a slow hour must not be the last one measured.
        if timeout is not None and taken and (expected := self._expected_wait(rows)) > timeout:
            self._rejected()
            raise Overloaded(
                f"{taken} requests wait: about {expected:.2f} s, more than timeout={timeout:g}; retry later",
                reason="deadline",
                retry_after=expected - timeout,
            )

    def _full(self, retry_after: float) -> Overloaded:
        self._rejected()
        return Overloaded(
            f"{len(self._queue) + self._reserved} requests wait and max_queue is {self._max_queue}; retry later or "
            "raise it",
            retry_after=retry_after,
        )

    def _rejected(self) -> None:
        # Counted from any thread, and not always under the queue's lock.
        with self._counting:
            self.counts["rejected"] += 1

    def _leave(self, future: Future[StepResult]) -> None:
        """A cancelled request makes room at once, not when the device's thread next looks."""
        if future.cancelled():
            with self._wake:
                for job in self._queue:
                    if job.future is future:
                        self._queue.remove(job)
                        self.counts["cancelled"] += 1
                        break

    def _expected_wait(self, rows: int) -> float:
        reserved = sum(place.rows for place in self._places)
        return self._pace.expected(rows + reserved + sum(len(job.batch) for job in self._queue))

    def call(self, function: Callable[[], T]) -> T:
        """Runs it on the device's thread between two batches, and waits: how weights change under live requests."""
        self._check_process()
        if threading.current_thread() is self._thread:
            return function()
        future: Future[T] = Future()
        with self._wake:
            self._check_open()
            self._calls.append((function, future))
            self._wake.notify()
        return future.result()

    def close(self) -> None:
        """Takes no more, finishes what waits, ends the thread."""
        if os.getpid() != self._pid:
            # A forked child has no such thread, and its copy of the lock may be held for ever.
            return
        with self._wake:
            self._closing = True
            self._wake.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise GenerationError(
                f"this Generator belongs to process {self._pid} and was carried into {os.getpid()} by a fork; "
                "its device thread did not come along. Make the Generator after forking."
            )

    def _check_open(self) -> None:
        if self._dead is not None:
            raise self._dead
        if self._closing:
            raise GenerationError("this Generator is closed; make a new one")

    def _loop(self) -> None:
        while (jobs := self._next()) is not None:
            if jobs:
                self._run(jobs)
            # A future outlives its job only in the caller's hands: a result is not kept until the next request.
            del jobs

    def _next(self) -> list[Job] | None:
        """The jobs of the next batch, in order of arrival; None when closed and drained."""
        with self._wake:
            while not self._queue:
                self._answer_calls()
                if self._queue:
                    break
                if self._closing:
                    return None
                self._wake.wait()
            self._answer_calls()
            if self._window and not self._closing:
                self._wait_for_company()
            first: Job | None = None
            chosen: list[Job] = []
            kept: deque[Job] = deque()
            rows = 0
            while self._queue:
                job = self._queue.popleft()
                if job.expired:
                    self._expire(job)
                elif first is None or (job.batch.key == first.batch.key and rows + len(job.batch) <= self.max_rows):
                    if not job.future.set_running_or_notify_cancel():
                        self.counts["cancelled"] += 1
                        continue
                    first = first or job
                    rows += len(job.batch)
                    chosen.append(job)
                else:
                    kept.append(job)
            self._queue = kept
            return chosen

    def _answer_calls(self) -> None:
        """Holds the lock but while a function runs."""
        while self._calls:
            function, future = self._calls.popleft()
            self._wake.release()
            try:
                future.set_result(function())
            except BaseException as error:  # it belongs to the caller
                future.set_exception(error)
            finally:
                self._wake.acquire()

    def _wait_for_company(self) -> None:
        until = time.monotonic() + self._window
        while sum(len(j.batch) for j in self._queue) < self.max_rows and (left := until - time.monotonic()) > 0:
            self._wake.wait(left)

    def _expire(self, job: Job) -> None:
        if job.future.set_running_or_notify_cancel():
            self.counts["expired"] += 1
            waited = time.monotonic() - job.queued_at
            job.future.set_exception(DeadlineExceeded(f"the deadline passed after {waited:.3f} s in the queue"))
        else:
            self.counts["cancelled"] += 1

    def _run(self, jobs: list[Job]) -> None:
        global _used
        _used = True
        started = time.monotonic()
        rows = sum(len(j.batch) for j in jobs)
        least = max(rows, jobs[0].batch.min_bucket)
        bucket = next(b for b in self._buckets if b >= least)
        with self._wake:
            self._pace.started(bucket, jobs[0].queued_at)
        result, error = self._attempt(jobs, bucket)
        ended = time.perf_counter()
        with self._wake:
            self._pace.ended(counts=error is None)
        if result is None:
            assert error is not None
            self._note_pace()
            self._failed(jobs, error)
            return
        self.batch_sizes[bucket] += 1
        start = 0
        for job in jobs:
            own = result.rows(start, start + len(job.batch))
            start += len(job.batch)
            own.bucket, own.ended = bucket, ended
            own.timings["queue"] = started - job.queued_at
            self._finish(job, own)
        self._note_pace()

    def _note_pace(self) -> None:
        """Behind the answers: nobody waits for it."""
        with self._wake:
            self._retry_after = self._expected_wait(0)

    def _attempt(self, jobs: list[Job], bucket: int) -> tuple[StepResult | None, BaseException | None]:
        try:
            return self._engine.run(join([j.batch for j in jobs], bucket)), None
        except BaseException as error:  # the thread must outlive every error; each goes to its own request
            # The traceback's frames hold the failed step's tensors: the next step, and whoever keeps the error, would
            # find the device as full as it was.
            traceback.clear_frames(error.__traceback__)
            return None, error

    def _finish(self, job: Job, result: StepResult) -> None:
        if job.expired:
            self.counts["expired"] += 1
            job.future.set_exception(DeadlineExceeded("the deadline passed while the image was being made"))
        elif bad := [i for i, ok in enumerate(result.ok.tolist()) if not ok]:
            self.counts["non_finite"] += 1
            job.future.set_exception(
                NonFiniteOutput(
                    f"the model produced NaN or infinity for image {bad}; check the weights, or use dtype float32"
                )
            )
        else:
            self.counts["finished"] += 1
            job.future.set_result(result)

    def _failed(self, jobs: list[Job], error: BaseException) -> None:
        reason = typed(error)
        if isinstance(reason, DeviceLost):
            self._die(jobs, reason)
        elif len(jobs) > 1:
            # One request's fault must not be its neighbours': each runs again alone, in order.
            # Its type alone: what an error says may quote what it failed on.
            kind = type(error).__name__
            log.warning("a batch of %d requests failed (%s); each runs again alone", len(jobs), kind)
            for job in jobs:
                if self._dead is None:
                    self._run([job])
                else:
                    self.counts["failed"] += 1
                    job.future.set_exception(self._dead)
        else:
            self.counts["failed"] += 1
            jobs[0].future.set_exception(reason)

    def _die(self, jobs: list[Job], error: DeviceLost) -> None:
        log.error("the device is lost: %s", error)
        with self._wake:
            self._dead = error
            waiting, self._queue = list(self._queue), deque()
        self.counts["failed"] += len(jobs) + len(waiting)
        for job in jobs:
            job.future.set_exception(error)
        for job in waiting:
            if job.future.set_running_or_notify_cancel():
                job.future.set_exception(error)
