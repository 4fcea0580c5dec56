"""Submit the same rows to an executor many times."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import replace

from ragturbo.engine.executor import Executor
from ragturbo.engine.request import Request
from ragturbo.engine.request_queue import Reservation
from ragturbo.engine.result import Result


def submit(
    executor: Executor, request: Request, *, timeout: float | None = None, reservation: Reservation | None = None
) -> Future[Result]:
    """Submit a copy of the request, which has a future of its own, and return that."""
    own = replace(request, timeout=timeout)
    executor.submit(own, reservation)
    return own.future
