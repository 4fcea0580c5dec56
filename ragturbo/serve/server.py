"""The server process: listening sockets, and the handling of SIGTERM and SIGHUP."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import signal
import socket
import sys
import threading
from types import FrameType

import uvicorn

from ragturbo.errors import InvalidRequest
from ragturbo.serve.app import create_app
from ragturbo.serve.config import ServeConfig
from ragturbo.serve.protocol import HTTPProtocol
from ragturbo.serve.service import Service

log = logging.getLogger("ragturbo")
# Seconds. Load balancers close idle connections after 60 s. If the server closed them first, requests could be lost.
KEEP_ALIVE = 65
# Seconds. Python's default is 5 ms, and a refusal, which needs the GIL several times, has a budget of 20 ms.
SWITCH_INTERVAL = 0.001


class Server(uvicorn.Server):
    """Uvicorn with draining on SIGTERM and SIGINT, and reopening the database on SIGHUP."""

    def __init__(self, config: ServeConfig) -> None:
        app = create_app(config, on_failure=self._stop)
        self._loop: asyncio.AbstractEventLoop | None = None
        self.service: Service = app.state.service
        settings = uvicorn.Config(
            app,
            host=config.host,
            port=config.port,
            access_log=config.access_log,
            log_config=None,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE,
            timeout_graceful_shutdown=int(config.timeout) + 5,
            ws="none",
            http=HTTPProtocol,
        )
        super().__init__(settings)

    def _stop(self) -> None:
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        if threading.current_thread() is threading.main_thread():
            self._loop.add_signal_handler(signal.SIGHUP, self._reopen_database)
        await super().startup(sockets)
        for server in self.servers:
            for listening in server.sockets:
                log.info("listening on %s port %d", *listening.getsockname()[:2])

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        service = self.service
        if service.draining and sig == signal.SIGINT:
            # The second Ctrl-C stops at once.
            self.force_exit = self.should_exit = True
            return
        service.draining = True
        log.info("%s: draining", signal.Signals(sig).name)
        if service.config.drain_delay and service.warm and self._loop is not None:
            self._loop.call_soon_threadsafe(self._loop.call_later, service.config.drain_delay, self._stop)
        else:
            self._stop()

    def _reopen_database(self) -> None:
        async def swap() -> None:
            try:
                await asyncio.to_thread(self.service.swap)
            except Exception as error:
                log.error("keeping the current database: %s", error)

        self._swapping = asyncio.ensure_future(swap())


def serve(config: ServeConfig) -> None:
    """Serve until a signal stops the process. Raises InvalidRequest before loading if the port is taken."""
    if config.public and not config.api_keys:
        log.warning("listening on %s without API keys: anyone who can reach it can use it", config.host)
    sys.setswitchinterval(SWITCH_INTERVAL)
    sockets = bind(config.host, config.port)
    server = Server(config)
    server.run(sockets)
    if server.service.error is not None:
        raise server.service.error
    if server.service.status == "draining" and not server.service.warm:
        # Stopped while loading: the interpreter cannot exit cleanly while a thread runs inside torch.
        logging.shutdown()
        os._exit(0)


def bind(host: str, port: int) -> list[socket.socket]:
    """Bind a socket for each address of the host, all on one port."""
    sockets: list[socket.socket] = []
    try:
        found = list(dict.fromkeys(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)))
        for i, (family, _, _, _, address) in enumerate(found):
            try:
                sockets.append(socket.create_server((address[0], port, *address[2:]), family=family))
            except OSError as error:
                # A host name can resolve to an IPv6 address on a machine without IPv6.
                last = i == len(found) - 1 and not sockets
                if last or error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
            else:
                # "localhost" is two addresses; port 0 is chosen once for both.
                port = sockets[-1].getsockname()[1]
    except OSError as error:
        for one in sockets:
            one.close()
        raise InvalidRequest(f"cannot listen on {host} port {port}: {error.strerror or error}") from error
    return sockets
