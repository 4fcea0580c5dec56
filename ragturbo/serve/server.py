"""The process: sockets, and what SIGTERM and SIGHUP mean."""

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
from ragturbo.serve.service import Service

log = logging.getLogger("ragturbo")
# Longer than the 60 s after which balancers close idle connections: whoever closes first must not be the server.
KEEP_ALIVE = 65
# A thread may keep Python's lock for 5 ms otherwise, and a refusal, which needs it several times, has 20 in all.
SWITCH_INTERVAL = 0.001


class Server(uvicorn.Server):
    """SIGTERM and SIGINT: readiness goes off, what was accepted is finished, exit 0. SIGHUP: the database anew."""

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
        )
        super().__init__(settings)

    def _stop(self) -> None:
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        if threading.current_thread() is threading.main_thread():
            self._loop.add_signal_handler(signal.SIGHUP, self._reload)
        await super().startup(sockets)
        for server in self.servers:
            for listening in server.sockets:
                log.info("listening on %s port %d", *listening.getsockname()[:2])

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.service.draining and sig == signal.SIGINT:
            # A second Ctrl-C is meant.
            self.force_exit = self.should_exit = True
            return
        self.service.draining = True
        log.info("%s: draining", signal.Signals(sig).name)
        if self.service.config.drain_delay and self.service.warm and self._loop is not None:
            self._loop.call_soon_threadsafe(self._loop.call_later, self.service.config.drain_delay, self._stop)
        else:
            self._stop()

    def _reload(self) -> None:
        self._reloading = asyncio.ensure_future(self._swap())

    async def _swap(self) -> None:
        try:
            await asyncio.to_thread(self.service.swap)
        except Exception as error:
            log.error("the database stays as it was: %s", error)


def serve(config: ServeConfig) -> None:
    """Serves until told to stop. Raises what loading the model raised, and at once where the port is taken."""
    if config.public and not config.api_keys:
        log.warning("listening on %s without API keys: everybody who reaches it may ask", config.host)
    sys.setswitchinterval(SWITCH_INTERVAL)
    sockets = bind(config.host, config.port)
    server = Server(config)
    server.run(sockets)
    if server.service.error is not None:
        raise server.service.error
    if server.service.status == "draining" and not server.service.warm:
        # Stopped while it loaded: the interpreter cannot end around a thread that is inside torch.
        logging.shutdown()
        os._exit(0)


def bind(host: str, port: int) -> list[socket.socket]:
    """A socket for each address of the host, before anything is loaded for a port that cannot be had."""
    sockets: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for i, (family, _, _, _, address) in enumerate(dict.fromkeys(found)):
            # "localhost" is two addresses, and one port for both.
            same = sockets[0].getsockname()[1] if sockets else port
            try:
                sockets.append(socket.create_server((address[0], same, *address[2:]), family=family))
            except OSError as error:
                # Without IPv6 the name has an address more than the machine.
                last = i == len(found) - 1 and not sockets
                if last or error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
    except OSError as error:
        for one in sockets:
            one.close()
        raise InvalidRequest(f"cannot listen on {host} port {port}: {error.strerror or error}") from error
    return sockets
