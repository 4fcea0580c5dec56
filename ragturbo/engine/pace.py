"""How fast batches run, and so how long a new request would wait."""

from __future__ import annotations

import time
from collections import deque

# A bucket's pace is the 75th percentile of its last 9 batches: safe for deadlines, robust to two slow captures.
KEPT = 9


class Pace:
    """Not thread-safe: the request queue calls it with its lock held."""

    def __init__(self, largest: int) -> None:
        """largest: rows of the largest bucket."""
        self._largest = largest
        self._seconds: dict[int, deque[float]] = {}
        self._since = self._ended = 0.0
        self.running = 0
        """Rows of the batch on the device, padding included."""

    def started(self, bucket: int, queued_at: float) -> None:
        """queued_at: when the batch's oldest request was queued. Under load a batch's time counts from the end of the
        previous one, so that it includes the host's work between batches."""
        self._since, self.running = max(queued_at, self._ended), bucket

    def ended(self, *, counts: bool) -> None:
        self._ended = time.monotonic()
        if counts:
            seconds = self._ended - self._since
            self._seconds.setdefault(self.running, deque(maxlen=KEPT)).append(seconds)
        self.running = 0

    def forget(self) -> None:
        """Drop all times: warm-up batches include loading, compiling and capturing."""
        self._seconds.clear()

    def expected(self, rows: int) -> float:
        """Seconds until `rows` waiting rows would be done; 0 if no batch has run yet."""
        known = {bucket: sorted(seconds)[3 * len(seconds) // 4] for bucket, seconds in self._seconds.items()}
        if not known:
            return 0.0
        # Before any full batch has run, scale the largest one seen: a larger batch takes at most proportionally longer.
        most = max(known)
        full = known[most] * self._largest / most
        left = 0.0
        if self.running:
            left = max(0.0, known.get(self.running, full) - (time.monotonic() - self._since))
        return left + full * -(-rows // self._largest)
