"""How fast batches run, and so how long a request that comes now would wait."""

from __future__ import annotations

import time
from collections import deque

# The slower quarter of so many batches of a bucket is its pace: cautious, for a deadline is promised by it, and yet two
# slow captures among them change nothing.
KEPT = 9


class Pace:
    """Not safe from several threads: the executor calls it under its own lock."""

    def __init__(self, largest: int) -> None:
        """largest: rows of the largest bucket."""
        self._largest = largest
        self._seconds: dict[int, deque[float]] = {}
        self._since = self._ended = 0.0
        self.running = 0
        """Rows of the batch on the device, padding included."""

    def started(self, bucket: int, queued_at: float) -> None:
        """queued_at: when its oldest request came. Between two batches lies what the host has to do: under load it is
        part of the pace, and nobody's request alone would show it."""
        self._since, self.running = max(queued_at, self._ended), bucket

    def ended(self, *, counts: bool) -> None:
        self._ended = time.monotonic()
        if counts:
            seconds = self._ended - self._since
            self._seconds.setdefault(self.running, deque(maxlen=KEPT)).append(seconds)
        self.running = 0

    def forget(self) -> None:
        """What ran so far loaded, compiled and captured."""
        self._seconds.clear()

    def expected(self, rows: int) -> float:
        """Seconds until `rows` rows that wait are done; 0 where no batch has been seen yet."""
        known = {bucket: sorted(seconds)[3 * len(seconds) // 4] for bucket, seconds in self._seconds.items()}
        if not known:
            return 0.0
        # Before any full batch has run, by the largest there was: a larger one takes at most in proportion.
        most = max(known)
        full = known[most] * self._largest / most
        left = 0.0
        if self.running:
            left = max(0.0, known.get(self.running, full) - (time.monotonic() - self._since))
        return left + full * -(-rows // self._largest)
