"""The device thread, the only one that runs the engine, on batches of queued requests.

Any number of threads submit requests. A request's deadline, cancellation and error affect only that request, not the
others in its batch.
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
from functools import partial
from typing import Any, Protocol, TypeVar

from torch import Tensor

from ragturbo.engine import fork
from ragturbo.engine.faults import fresh, typed
from ragturbo.engine.request import Request
from ragturbo.engine.request_queue import RequestQueue, Reservation
from ragturbo.engine.result import Result
from ragturbo.errors import DeadlineExceeded, DeviceLost, GenerationError, NonFiniteOutput

T = TypeVar("T")
log = logging.getLogger("ragturbo")


class Engine(Protocol):
    name: str

    def run(self, request: Request) -> Result: ...

    def encode_pairs(self, captions: list[str], images: Tensor) -> tuple[Tensor, Tensor]:
        """Sec. 3.2, uncached: images (B, 3, H, W) in [-1, 1] -> keys (B, K), features (B, S, C)."""
        ...

    def load_adapter(self, path: str | os.PathLike[str]) -> None: ...

    def describe(self) -> dict[str, Any]:
        """The chosen implementations and why, for `gen.info`."""
        ...


class Executor:
    def __init__(
        self, engine: Engine, *, batch_sizes: tuple[int, ...], batch_window: float = 0.0, max_queue: int = 64
    ) -> None:
        fork.refuse_after_fork()
        self._engine = engine
        self._buckets = batch_sizes
        self.queue = RequestQueue(batch_sizes[-1], max_queue=max_queue, batch_window=batch_window)
        self._calls: deque[Callable[[], None]] = deque()
        self._pid = os.getpid()
        self.batch_sizes: Counter[int] = Counter()
        self._thread = threading.Thread(target=self._loop, name="ragturbo-device", daemon=True)
        self._thread.start()

    @property
    def counts(self) -> Counter[str]:
        return self.queue.counts

    @property
    def healthy(self) -> bool:
        return self.queue.closed is None and os.getpid() == self._pid and self._thread.is_alive()

    def check_room(self, rows: int = 1, timeout: float | None = None) -> None:
        """Raise what `submit` would raise, before any work is done for the request."""
        self._check_process()
        self.queue.check_room(rows, timeout)

    def reserve(self, rows: int = 1, timeout: float | None = None) -> Reservation:
        self._check_process()
        return self.queue.reserve(rows, timeout)

    def submit(self, request: Request, reservation: Reservation | None = None) -> None:
        """Queue a request of any number of rows; wait for it by `request.wait()`.

        Raises:
            Overloaded: the queue is full, or so long that the request's deadline would pass in it; never if
                `reservation` holds enough room.
        """
        self._check_process()
        self.queue.put(request.split(self.queue.max_rows), reservation)

    def call(self, function: Callable[[], T]) -> T:
        """Run a function on the device thread between two batches and return its value."""
        self._check_process()
        if threading.current_thread() is self._thread:
            return function()
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(function())
            except BaseException as error:  # raised in the caller's thread
                future.set_exception(error)

        with self.queue.changed:
            self.queue.check_open()
            self._calls.append(run)
            self.queue.changed.notify()
        return future.result()

    def close(self) -> None:
        """Stop accepting requests, finish the queued ones, and end the thread."""
        if os.getpid() != self._pid:
            # A forked child has no such thread, and its copy of the lock may be held by a thread that does not exist.
            return
        self.queue.close(GenerationError("this Generator is closed; make a new one"))
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise GenerationError(
                f"this Generator belongs to process {self._pid}, and {os.getpid()} is a fork of it without its device "
                "thread. Make the Generator after forking."
            )

    def _loop(self) -> None:
        while (work := self._next()) is not None:
            work()
            # Dropped now, so that the loop does not keep the results in memory until the next request.
            del work

    def _next(self) -> Callable[[], None] | None:
        """Wait for a call or a batch; None once the queue is closed and empty."""
        with self.queue.changed:
            while True:
                if self._calls:
                    return self._calls.popleft()
                if len(self.queue):
                    if batch := self.queue.take():
                        return partial(self._run, batch)
                elif self.queue.closed is not None:
                    return None
                else:
                    self.queue.changed.wait()

    def _run(self, requests: list[Request]) -> None:
        fork.note_use()
        started = time.monotonic()
        rows = max(sum(map(len, requests)), requests[0].min_bucket)
        bucket = next(size for size in self._buckets if size >= rows)
        self.queue.batch_started(bucket, requests[0].queued_at)
        result, error = self._attempt(requests, bucket)
        ended = time.perf_counter()
        self.queue.batch_ended(counts=error is None)
        if error is not None:
            self._fail(requests, error)
            del requests
            return
        assert result is not None
        self.batch_sizes[bucket] += 1
        start = 0
        for request in requests:
            own = result.rows(start, start + len(request))
            start += len(request)
            own.bucket, own.ended = bucket, ended
            own.timings["queue"] = started - request.queued_at
            self._finish(request, own)

    def _attempt(self, requests: list[Request], bucket: int) -> tuple[Result | None, BaseException | None]:
        try:
            return self._engine.run(Request.join(requests, bucket)), None
        except BaseException as error:  # the thread must survive every error
            # The traceback's frames reference the failed batch's tensors, which would stay allocated with the error.
            traceback.clear_frames(error.__traceback__)
            # This frame and its caller's are still running, and the traceback references both: each drops the requests.
            del requests
            return None, error

    def _finish(self, request: Request, result: Result) -> None:
        counts = self.queue.counts
        if request.expired:
            counts["expired"] += 1
            request.future.set_exception(DeadlineExceeded("the deadline passed while the image was being made"))
        elif bad := [i for i, ok in enumerate(result.ok.tolist()) if not ok]:
            counts["non_finite"] += 1
            request.future.set_exception(
                NonFiniteOutput(
                    f"the model produced NaN or infinity for image {bad}; check the weights, or use dtype float32"
                )
            )
        else:
            counts["finished"] += 1
            request.future.set_result(result)

    def _fail(self, requests: list[Request], error: BaseException) -> None:
        reason = typed(error)
        if isinstance(reason, DeviceLost):
            self._die(requests, reason)
        elif len(requests) == 1:
            self.queue.counts["failed"] += 1
            requests[0].future.set_exception(reason)
        else:
            # Each runs again alone, so that one request's error does not fail the others. Only the error's type is
            # logged: its message may quote a prompt.
            log.warning(
                "a batch of %d requests failed (%s); each runs again alone", len(requests), type(error).__name__
            )
            for request in requests:
                if isinstance(self.queue.closed, DeviceLost):
                    self.queue.counts["failed"] += 1
                    request.future.set_exception(fresh(self.queue.closed))
                else:
                    self._run([request])

    def _die(self, requests: list[Request], error: DeviceLost) -> None:
        log.error("the device is lost: %s", error)
        with self.queue.changed:
            self.queue.closed = error
        for request in requests + self.queue.drop_all():
            self.queue.counts["failed"] += 1
            request.future.set_exception(fresh(error))
