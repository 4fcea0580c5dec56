"""Error responses in OpenAI's format, and the mapping from exceptions to HTTP statuses."""

from __future__ import annotations

import json
import logging
import math
import traceback
from collections.abc import Mapping

from fastapi.responses import Response
from pydantic import BaseModel

from ragturbo.errors import DeadlineExceeded, DeviceLost, InvalidRequest, NonFiniteOutput, OutOfDeviceMemory, Overloaded
from ragturbo.serve.schema import FIELD_OF_OPTION

log = logging.getLogger("ragturbo")


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorDetail


class APIError(Exception):
    """An error response: status, headers and OpenAI's error object."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        type: str = "invalid_request_error",
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.headers = status, code, dict(headers or {})
        self.detail = ErrorDetail(message=message, type=type, param=param, code=code)

    def response(self) -> Response:
        # Readable in a terminal. Nothing that cannot be encoded is expected in a message, but it must not raise.
        body = json.dumps({"error": dict(self.detail)}, ensure_ascii=False).encode(errors="replace")
        return Response(body, status_code=self.status, headers=self.headers, media_type="application/json")


def retry_later(message: str, code: str, retry_after: float, status: int = 503) -> APIError:
    """Return an error with a Retry-After header: whole seconds, at least 1."""
    headers = {"Retry-After": str(max(1, math.ceil(retry_after)))}
    return APIError(status, message, code=code, type="overloaded", headers=headers)


def to_api_error(error: BaseException, *, log_messages: bool = False) -> APIError:
    """Map an exception to a response. Unexpected ones are logged, with their messages only if `log_messages`."""
    if isinstance(error, APIError):
        return error
    if isinstance(error, Overloaded):
        return retry_later(str(error), error.reason, error.retry_after, status=429)
    if isinstance(error, DeadlineExceeded):
        return retry_later(str(error), "deadline_exceeded", 1)
    if isinstance(error, DeviceLost):
        return retry_later("the device is lost; this server has to be restarted", "device_lost", 5)
    # What the server's own hook returns is not the client's mistake.
    if isinstance(error, InvalidRequest) and error.option != "postprocess":
        return APIError(400, str(error), code="invalid_value", param=FIELD_OF_OPTION.get(error.option or ""))
    # Clients get a fixed text: the exception's message may contain internals.
    if isinstance(error, NonFiniteOutput):
        message, code, log_messages = "the model produced NaN or infinity", "non_finite_output", True
    elif isinstance(error, OutOfDeviceMemory):
        message, code, log_messages = "the request did not fit in device memory", "out_of_device_memory", True
    else:
        message, code = "the server failed to process this request", "server_error"
    log.error("a request failed: %s", _format_chain(error, log_messages))
    return APIError(500, message, code=code, type="server_error")


def _format_chain(error: BaseException, with_messages: bool) -> str:
    """Format an exception and its causes: types and tracebacks, and their messages only if requested."""
    text = ""
    cause: BaseException | None = error
    while cause is not None:
        message = f": {cause}" if with_messages else ""
        text += f"{type(cause).__name__}{message}\n" + "".join(traceback.format_tb(cause.__traceback__))
        cause = cause.__cause__
    return text.rstrip()
