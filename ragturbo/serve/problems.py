"""Every refusal in OpenAI's error form, and which exception becomes which status."""

from __future__ import annotations

import json
import logging
import math
import traceback
from collections.abc import Mapping

from fastapi.responses import Response
from pydantic import BaseModel, ValidationError

from ragturbo.errors import (
    DeadlineExceeded,
    DeviceLost,
    InvalidRequest,
    NonFiniteOutput,
    OutOfDeviceMemory,
    Overloaded,
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

    def response(self) -> Response:
        body = json.dumps({"error": dict(self.detail)})
        return Response(body, status_code=self.status, headers=self.headers, media_type="application/json")


def unavailable(message: str, code: str, retry_after: float, *, status: int = 503, type: str = "overloaded") -> Problem:
    # Whole seconds, at least one: what the header can say.
    return Problem(status, message, code=code, type=type, headers={"Retry-After": str(max(1, math.ceil(retry_after)))})


def problem_of(error: BaseException, *, quote: bool = False) -> Problem:
    """What was raised while an image was made, as its client sees it. quote: whether the log may say it in the error's
    own words, which may quote the prompt."""
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
    log.error("a request failed: %s", _told(error, quote))
    # Fixed texts: what failed inside is not for strangers.
    if isinstance(error, NonFiniteOutput):
        return _failed("the model gave NaN or infinity", "non_finite_output")
    if isinstance(error, OutOfDeviceMemory):
        return _failed("the device's memory did not suffice for this request", "out_of_device_memory")
    return _failed("the server failed to answer this request", "server_error")


def _failed(message: str, code: str) -> Problem:
    return Problem(500, message, code=code, type="server_error")


def _told(error: BaseException, quote: bool) -> str:
    """An error and what caused it, for the log: the lines of code it passed, and its own words where `quote`, or where
    they are the device's."""
    told = ""
    cause: BaseException | None = error
    while cause is not None:
        said = f": {cause}" if quote or isinstance(error, (NonFiniteOutput, OutOfDeviceMemory)) else ""
        told += f"{type(cause).__name__}{said}\n" + "".join(traceback.format_tb(cause.__traceback__))
        cause = cause.__cause__
    return told.rstrip()


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
