"""Servers with real sockets in threads of this process. They share one Generator with the included model."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import uvicorn

from ragturbo import Generator
from ragturbo.serve.app import create_app
from ragturbo.serve.config import ServeConfig

PATH = "/v1/images/generations"


@pytest.fixture(scope="session")
def gen() -> Iterator[Generator]:
    with Generator.from_pretrained("shapes", device="cpu", max_queue=8, log_prompts=False) as generator:
        generator.warmup()
        yield generator


def until(true: Callable[[], bool], what: str, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"timed out after {seconds} s: {what}"
        time.sleep(0.01)


@contextlib.contextmanager
def listening(app: Any) -> Iterator[str]:
    """Run a server for `app` on a free port and yield its URL."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, timeout_graceful_shutdown=20))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until(lambda: server.started or not thread.is_alive(), "server listening")
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def metrics(url: str) -> dict[str, float]:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}


@contextlib.contextmanager
def served(generator: Generator, **settings: Any) -> Iterator[SimpleNamespace]:
    """Run a server until it is ready, and yield its URL, an HTTP client, its service and its metrics."""
    app = create_app(ServeConfig(**settings), generator=generator)
    with listening(app) as url, httpx.Client(base_url=url, timeout=60) as http:
        until(lambda: http.get("/health/ready").status_code == 200, "server ready")
        yield SimpleNamespace(
            url=url,
            http=http,
            service=app.state.service,
            post=lambda **body: http.post(PATH, json=body),
            metrics=lambda: metrics(url),
        )


@contextlib.contextmanager
def occupied(generator: Generator) -> Iterator[None]:
    """Block the device's thread until the block ends, so that requests have to queue."""
    entered, leave = threading.Event(), threading.Event()

    def occupy() -> None:
        entered.set()
        assert leave.wait(60)

    thread = threading.Thread(target=generator.call, args=(occupy,))
    thread.start()
    assert entered.wait(60)
    try:
        yield
    finally:
        leave.set()
        thread.join()


@pytest.fixture(scope="session")
def kit() -> SimpleNamespace:
    return SimpleNamespace(served=served, listening=listening, occupied=occupied, until=until, metrics=metrics)


@pytest.fixture(scope="module")
def server(gen: Generator) -> Iterator[SimpleNamespace]:
    # A long timeout: only the tests of deadlines should refuse requests, also on a busy machine.
    with served(gen, timeout=300) as server:
        yield server
