"""Every refusal in OpenAI's error form, and which exception becomes which status."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError

from ragturbo.errors import (
    DeadlineExceeded,
    DeviceLost,
    InvalidRequest,
    NonFiniteOutput,
    OutOfDeviceMemory,
    Overloaded,
    RagTurboError,
)

log = logging.getLogger("ragturbo")


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorDetail


class Problem(Exception):
    """A request that gets no image, and what its client is told."""

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

    def response(self) -> JSONResponse:
        body = ErrorBody(error=self.detail).model_dump()
        return JSONResponse(body, status_code=self.status, headers=self.headers)


def unavailable(message: str, code: str, retry_after: float, *, status: int = 503, type: str = "overloaded") -> Problem:
    # Whole seconds, at least one: what the header can say.
    return Problem(status, message, code=code, type=type, headers={"Retry-After": str(max(1, math.ceil(retry_after)))})


def problem_of(error: BaseException) -> Problem:
    """What was raised while an image was made, as its client sees it."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, Overloaded):
        return unavailable(str(error), error.reason, error.retry_after, status=429)
    if isinstance(error, DeadlineExceeded):
        return unavailable(str(error), "deadline_exceeded", 1)
    if isinstance(error, DeviceLost):
        return unavailable("the device is lost; this server is about to be replaced", "device_lost", 5)
    if isinstance(error, InvalidRequest):
        return Problem(400, str(error), code="invalid_value")
    code = "server_error"
    if isinstance(error, NonFiniteOutput):
        code = "non_finite_output"
    elif isinstance(error, OutOfDeviceMemory):
        code = "out_of_device_memory"
    # A prompt is in none of these messages; what else failed is not for strangers.
    log.error("a request failed: %s: %s", type(error).__name__, error, exc_info=error)
    message = str(error) if isinstance(error, RagTurboError) else "the server failed to make this image"
    return Problem(500, message, code=code, type="server_error")


def invalid(error: ValidationError, known: list[str]) -> Problem:
    """The first thing wrong with a body, in words. What the client sent is not repeated: it may be megabytes."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    param = ".".join(map(str, first["loc"])) or None
    if first["type"] == "extra_forbidden":
        message = f"{param!r} is not a field of this endpoint, which takes: {', '.join(known)}"
        return Problem(400, message, code="unknown_parameter", param=param)
    if first["type"] == "missing":
        return Problem(400, f"{param!r} is missing", code="missing_required_parameter", param=param)
    if first["type"] == "json_invalid":
        return Problem(400, f"the body is not JSON: {first['msg']}", code="invalid_json")
    where = f"{param!r}: " if param else ""
    return Problem(400, where + first["msg"], code="invalid_value", param=param)
