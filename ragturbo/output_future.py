"""The future that `Generator.submit` returns."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ragturbo.output import Output

if TYPE_CHECKING:
    from ragturbo.engine.request import Request


@lru_cache(maxsize=1)
def _finishers() -> ThreadPoolExecutor:
    """Outputs are made here, so that neither the device thread nor an event loop is blocked."""
    return ThreadPoolExecutor(max_workers=4, thread_name_prefix="ragturbo-finish")


class OutputFuture(Future[Output]):
    """Done when all pieces of a request are. Cancelling it cancels the pieces still in the queue."""

    def __init__(self, request: Request) -> None:
        super().__init__()
        self._request: Request | None = request
        pieces = request.pieces or (request,)
        left, lock = len(pieces), threading.Lock()
        # Emptied by the last callback: otherwise the pieces' futures and this one would form a reference cycle.
        waiting = [self]

        def one_done(_: Future[Any]) -> None:
            nonlocal left
            with lock:
                left -= 1
                last = left == 0
            if last:
                _finishers().submit(waiting.pop()._finish)

        for piece in pieces:
            piece.future.add_done_callback(one_done)

    def cancel(self) -> bool:
        request, cancelled = self._request, super().cancel()
        if cancelled and request is not None:
            request.cancel()
        return cancelled

    def _finish(self) -> None:
        # Dropped first, so that a caller that keeps this future keeps only its output.
        request, self._request = self._request, None
        if request is None or not self.set_running_or_notify_cancel():
            return
        try:
            self.set_result(Output.make(request, request.wait()))
        except BaseException as error:
            self.set_exception(error)
            # The error's traceback references this frame.
            del self, request
