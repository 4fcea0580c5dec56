"""The bounded queue in front of the device thread: admission, reservations, and which requests run as one batch."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from ragturbo.engine.faults import fresh
from ragturbo.engine.pace import Pace
from ragturbo.engine.request import Request
from ragturbo.engine.result import Result
from ragturbo.errors import DeadlineExceeded, Overloaded, RagTurboError


@dataclass(eq=False)
class Reservation:
    """Room in the queue for `rows` images, held until a request is submitted with it or the `with` block ends."""

    queue: RequestQueue
    rows: int
    pieces: int

    def __enter__(self) -> Reservation:
        return self

    def __exit__(self, *exception: object) -> None:
        self.queue.release(self)


class RequestQueue:
    """Requests in order of arrival. `changed` is the lock of everything here; the device thread waits on it."""

    def __init__(self, max_rows: int, *, max_queue: int, batch_window: float) -> None:
        self.max_rows = max_rows
        self.changed = threading.Condition()
        self.closed: RagTurboError | None = None
        """Why nothing is accepted any more."""
        self.counts: Counter[str] = Counter()
        self._max_queue, self._window = max_queue, batch_window
        self._requests: deque[Request] = deque()
        self._reservations: set[Reservation] = set()
        self._reserved = 0
        """Pieces of all reservations."""
        self._pace = Pace(max_rows)
        self._retry_after = 0.0
        self._counting = threading.Lock()

    def __len__(self) -> int:
        return len(self._requests)

    @property
    def running(self) -> int:
        """Rows on the device now, padding included."""
        return self._pace.running

    def check_room(self, rows: int = 1, timeout: float | None = None) -> None:
        """Raise what `put` would raise, without reserving room.

        Raises:
            Overloaded: the queue is full, or so long that the deadline would pass in it.
        """
        self.check_open()
        pieces = self._pieces(rows)
        # Without the lock, so that refusing is cheap under overload. While a batch is taken, the queue looks shorter
        # than it is, never longer.
        if len(self._requests) + self._reserved >= self._max_queue:
            raise self._full(self._retry_after)
        with self.changed:
            self._check_room(rows, pieces, timeout)

    def reserve(self, rows: int = 1, timeout: float | None = None) -> Reservation:
        """`check_room`, and hold the room: `put(…, reservation)` does not refuse."""
        reservation = Reservation(self, rows, self._pieces(rows))
        with self.changed:
            self._check_room(reservation.rows, reservation.pieces, timeout)
            self._reservations.add(reservation)
            self._reserved += reservation.pieces
            self._update_retry_after()
        return reservation

    def release(self, reservation: Reservation) -> bool:
        """Return False if it was used or released before, or belongs to another queue."""
        with self.changed:
            if reservation not in self._reservations:
                return False
            self._reservations.remove(reservation)
            self._reserved -= reservation.pieces
            return True

    def put(self, pieces: Sequence[Request], reservation: Reservation | None = None) -> None:
        """Accept all pieces of one request, or none.

        Raises:
            Overloaded: as `check_room`; never if `reservation` holds enough room.
        """
        rows, timeout = sum(map(len, pieces)), pieces[0].timeout
        for piece in pieces:
            # A method of the queue, not of the piece: a reference cycle would keep its tensors until a collection.
            piece.future.add_done_callback(self._forget_cancelled)
        with self.changed:
            held = reservation is not None and self.release(reservation)
            if held and reservation is not None and reservation.rows >= rows and reservation.pieces >= len(pieces):
                self.check_open()
            else:
                self._check_room(rows, len(pieces), timeout)
            self._requests.extend(pieces)
            self.counts["accepted"] += len(pieces)
            self._update_retry_after()
            self.changed.notify()

    def take(self) -> list[Request]:
        """Return the next batch: the oldest request and those behind it that may run with it, in order. Call with
        `changed` held. Empty if all that waited were cancelled or expired."""
        if self._window and self.closed is None:
            self._wait_for_more()
        chosen: list[Request] = []
        kept: deque[Request] = deque()
        rows = 0
        while self._requests:
            request = self._requests.popleft()
            if request.expired:
                self._expire(request)
            elif not chosen or (request.key == chosen[0].key and rows + len(request) <= self.max_rows):
                if not request.future.set_running_or_notify_cancel():
                    self.counts["cancelled"] += 1
                    continue
                rows += len(request)
                chosen.append(request)
            else:
                kept.append(request)
        self._requests = kept
        return chosen

    def drop_all(self) -> list[Request]:
        """Empty the queue and return the requests that were not cancelled; they are now running."""
        with self.changed:
            waiting, self._requests = list(self._requests), deque()
            running = [request for request in waiting if request.future.set_running_or_notify_cancel()]
            self.counts["cancelled"] += len(waiting) - len(running)
        return running

    def close(self, why: RagTurboError) -> None:
        with self.changed:
            self.closed = self.closed or why
            self.changed.notify()

    def batch_started(self, bucket: int, queued_at: float) -> None:
        with self.changed:
            self._pace.started(bucket, queued_at)

    def batch_ended(self, *, counts: bool) -> None:
        with self.changed:
            self._pace.ended(counts=counts)
            self._update_retry_after()

    def expected_wait(self, rows: int = 1) -> float:
        """Seconds until `rows` more would be done, by the pace of the last batches; 0 if that is not known yet."""
        with self.changed:
            return self._expected_wait(rows)

    def forget_pace(self) -> None:
        """Drop the pace of warm-up batches, which include loading, compiling and capturing."""
        with self.changed:
            self._pace.forget()

    def _pieces(self, rows: int) -> int:
        return -(-rows // self.max_rows)

    def check_open(self) -> None:
        if self.closed is not None:
            raise fresh(self.closed)

    def _check_room(self, rows: int, pieces: int, timeout: float | None) -> None:
        self.check_open()
        taken = len(self._requests) + self._reserved
        if taken + pieces > self._max_queue:
            raise self._full(self._expected_wait(0))
        # An empty queue always accepts: otherwise one slow batch could make every later request refused.
        if timeout is not None and taken and (expected := self._expected_wait(rows)) > timeout:
            self._count_rejected()
            raise Overloaded(
                f"{taken} requests wait: about {expected:.2f} s, more than timeout={timeout:g}; retry later",
                reason="deadline",
                retry_after=expected - timeout,
            )

    def _full(self, retry_after: float) -> Overloaded:
        self._count_rejected()
        return Overloaded(
            f"{len(self._requests) + self._reserved} requests wait and max_queue is {self._max_queue}; retry later or "
            "raise it",
            retry_after=retry_after,
        )

    def _update_retry_after(self) -> None:
        if len(self._requests) + self._reserved >= self._max_queue:
            self._retry_after = self._expected_wait(0)

    def _count_rejected(self) -> None:
        # Called from any thread, with or without `changed` held.
        with self._counting:
            self.counts["rejected"] += 1

    def _forget_cancelled(self, future: Future[Result]) -> None:
        """Free a cancelled request's room at once, instead of when the device thread takes the next batch."""
        if future.cancelled():
            with self.changed:
                for request in self._requests:
                    if request.future is future:
                        self._requests.remove(request)
                        self.counts["cancelled"] += 1
                        break

    def _expected_wait(self, rows: int) -> float:
        reserved = sum(reservation.rows for reservation in self._reservations)
        return self._pace.expected(rows + reserved + sum(map(len, self._requests)))

    def _wait_for_more(self) -> None:
        until = time.monotonic() + self._window
        while sum(map(len, self._requests)) < self.max_rows and (left := until - time.monotonic()) > 0:
            self.changed.wait(left)

    def _expire(self, request: Request) -> None:
        if request.future.set_running_or_notify_cancel():
            self.counts["expired"] += 1
            waited = time.monotonic() - request.queued_at
            request.future.set_exception(DeadlineExceeded(f"the deadline passed after {waited:.3f} s in the queue"))
        else:
            self.counts["cancelled"] += 1
