"""What every request passes first: keys, size and time limits of its body, and the count of what was answered."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ragturbo.serve.problems import Problem, problem_of

if TYPE_CHECKING:
    from starlette.responses import Response
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from ragturbo.serve.service import Service

IMAGES = "/v1/images/generations"
PATHS = (IMAGES, "/v1/models", "/health/live", "/health/ready", "/metrics", "/admin/database")


class Keys:
    """A set of keys, compared so that the time taken says nothing about them."""

    def __init__(self, keys: Iterable[str]) -> None:
        # Digests are of one length, whatever was sent.
        self._digests = [_digest(key.encode()) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def admit(self, authorization: bytes) -> bool:
        scheme, _, given = authorization.partition(b" ")
        digest, found = _digest(given.strip()), False
        for key in self._digests:
            found |= hmac.compare_digest(digest, key)
        return found and scheme.lower() == b"bearer"


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class Border:
    """Pure ASGI: a client that leaves is seen by the endpoint itself."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service
        self._clients, self._admins = Keys(service.config.api_keys), Keys(service.config.admin_keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        asked = _path(scope)
        # Paths are a label: one that a stranger made up must not become a time series.
        path = asked if asked in PATHS else "other"
        metrics, quote = self._service.metrics, self._service.config.log_prompts
        begun = False

        async def counted(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                metrics.requests.labels(path, str(message["status"])).inc()
            await send(message)

        try:
            headers = dict(scope["headers"])
            self._check_key(asked, headers)
            limited = self._limited(receive, headers)
            if asked == IMAGES and scope["method"] == "POST":
                # Under load most requests end here: before their body is read, and past no framework.
                self._service.check_room()
            await self._app(scope, limited, counted)
        except Exception as error:
            answer = self._answer(problem_of(error, quote=quote))
            if not begun:
                await answer(scope, receive, counted)

    def _answer(self, problem: Problem) -> Response:
        # Apart: an exception that is kept by a frame it went through is a cycle.
        self._service.metrics.rejections.labels(problem.code).inc()
        return problem.response()

    def _check_key(self, path: str, headers: dict[bytes, bytes]) -> None:
        if path.startswith("/v1/"):
            keys = self._clients
        elif path.startswith("/admin/"):
            keys = self._admins
        else:
            return
        if keys and not keys.admit(headers.get(b"authorization", b"")):
            raise Problem(
                401,
                "the API key is missing or wrong: send it as 'Authorization: Bearer …'",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _limited(self, receive: Receive, headers: dict[bytes, bytes]) -> Receive:
        most, config = self._service.config.max_body, self._service.config
        announced = headers.get(b"content-length", b"0")
        if not announced.isdigit() or int(announced[:20]) > most:
            raise _too_large(most)
        loop = asyncio.get_running_loop()
        until = loop.time() + config.body_timeout
        taken, whole = 0, False

        async def limited() -> Message:
            nonlocal taken, whole
            if whole:
                # From here on the only news is that the client has left, and that may take as long as it likes.
                return await receive()
            try:
                message: Any = await _by(until, receive, loop)
            except asyncio.TimeoutError:
                raise Problem(
                    408,
                    f"the request took more than {config.body_timeout:g} s to arrive",
                    code="request_timeout",
                    headers={"Connection": "close"},
                ) from None
            taken += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if taken > most:
                raise _too_large(most)
            return message

        return limited


async def _by(until: float, receive: Receive, loop: asyncio.AbstractEventLoop) -> Message:
    if sys.version_info >= (3, 11):
        # A timer alone, where wait_for makes a task for every body.
        async with asyncio.timeout_at(until):
            return await receive()
    return await asyncio.wait_for(receive(), max(0.0, until - loop.time()))


def _path(scope: Scope) -> str:
    """Within this application: where another one has mounted it, keys are asked for too."""
    path, root = str(scope["path"]), str(scope.get("root_path", "")).rstrip("/")
    return path[len(root) :] if root and path.startswith(f"{root}/") else path


def _too_large(most: int) -> Problem:
    return Problem(
        413, f"the body is larger than {most} bytes", code="request_too_large", headers={"Connection": "close"}
    )
