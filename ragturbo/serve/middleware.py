"""ASGI middleware: API keys, limits on the size and duration of a body, early refusal under load, request counts."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import anyio
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from ragturbo.serve import paths
from ragturbo.serve.api_errors import APIError, to_api_error

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from ragturbo.serve.service import Service

# nginx's status for a client that closed the connection; used in the metrics only.
CLIENT_CLOSED_REQUEST = 499


class RequestMiddleware:
    """Pure ASGI: Starlette's BaseHTTPMiddleware would hide a client's disconnect from the endpoint."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service
        self._client_keys = [_digest(key.encode()) for key in service.config.api_keys]
        self._admin_keys = [_digest(key.encode()) for key in service.config.admin_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope, is_head = _normalized(scope)
        path = paths.inside(scope)
        label = paths.label(path)
        metrics, log_messages = self._service.metrics, self._service.config.log_prompts
        started = False

        async def counted(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                metrics.requests.labels(label, str(message["status"])).inc()
            elif is_head:
                message = {**message, "body": b""}
            await send(message)

        try:
            headers = dict(scope["headers"])
            self._check_key(path, headers)
            limited = self._limited(receive, headers)
            if path == paths.IMAGES and scope["method"] == "POST":
                # Under load most requests are refused here, before the body is read.
                self._service.check_room()
            await self._app(scope, limited, counted)
        except asyncio.CancelledError:
            # Ray Serve cancels the request's task if the client disconnects.
            metrics.cancellations.inc()
            raise
        except ClientDisconnect:
            metrics.cancellations.inc()
            await Response(status_code=CLIENT_CLOSED_REQUEST)(scope, receive, counted)
        except Exception as error:
            response = self._refuse(to_api_error(error, log_messages=log_messages))
            if not started:
                await response(scope, receive, counted)

    def _refuse(self, error: APIError) -> Response:
        # A separate function: an exception stored in a local of a frame in its traceback is a reference cycle.
        self._service.metrics.rejections.labels(error.code).inc()
        return error.response()

    def _check_key(self, path: str, headers: dict[bytes, bytes]) -> None:
        keys = self._client_keys if path.startswith("/v1/") else self._admin_keys if path.startswith("/admin/") else []
        if keys and not _authorized(headers.get(b"authorization", b""), keys):
            raise APIError(
                401,
                "missing or invalid API key; send it as 'Authorization: Bearer …'",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _limited(self, receive: Receive, headers: dict[bytes, bytes]) -> Receive:
        """Wrap `receive` with the limits on a body's size and on the time it takes to arrive."""
        limit, timeout = self._service.config.max_body, self._service.config.body_timeout
        length = headers.get(b"content-length", b"0")
        oversized = not length.isdigit() or int(length[:20]) > limit
        deadline = anyio.current_time() + timeout
        received, complete = 0, False

        async def limited() -> Message:
            nonlocal received, complete
            if oversized:
                # Not earlier: routes that read no body, such as a 404, answer for themselves.
                raise _too_large(limit)
            if complete:
                # The only message left is the client's disconnect, which has no deadline.
                return await receive()
            try:
                # Only a timer: asyncio.wait_for creates a task for every message.
                with anyio.fail_after(deadline - anyio.current_time()):
                    message: Any = await receive()
            except TimeoutError:
                raise APIError(
                    408,
                    f"the request took more than {timeout:g} s to arrive",
                    code="request_timeout",
                    headers={"Connection": "close"},
                ) from None
            received += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if received > limit:
                raise _too_large(limit)
            return message

        return limited


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _authorized(authorization: bytes, keys: Iterable[bytes]) -> bool:
    """Compare the given key with every known one by digests of equal length, so that timing reveals nothing."""
    scheme, _, given = authorization.partition(b" ")
    digest = _digest(given.strip())
    matches = [hmac.compare_digest(digest, key) for key in keys]
    return any(matches) and scheme.lower() == b"bearer"


def _normalized(scope: Scope) -> tuple[Scope, bool]:
    """Return the scope without the path's trailing slashes and with GET for HEAD, and whether it was HEAD.

    A redirect would make some clients drop the body or the API key.
    """
    is_head = scope["method"] == "HEAD"
    path = paths.inside(scope)
    root = scope["path"][: len(scope["path"]) - len(path)]
    return {**scope, "path": root + (path.rstrip("/") or "/"), "method": "GET" if is_head else scope["method"]}, is_head


def _too_large(limit: int) -> APIError:
    message = f"the body is larger than {limit} bytes"
    return APIError(413, message, code="request_too_large", headers={"Connection": "close"})
