"""The body of a request: from bytes to checked fields. Nothing in it is ignored without a word."""

from __future__ import annotations

import json
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError

from ragturbo.messages import short
from ragturbo.serve.api_errors import APIError
from ragturbo.serve.field_errors import describe, validation_error
from ragturbo.serve.schema import LENIENT

M = TypeVar("M", bound=BaseModel)
JSON = "application/json"


async def read_body(request: Request, model: type[M], *, lenient: bool = False) -> tuple[M, list[str]]:
    """Return the checked fields, and the names of those that a lenient server ignored.

    Raises:
        APIError: with status 400 or 415, for anything that is not a JSON object with known fields.
    """
    ignored = read_query(request, lenient=lenient)
    # Requiring JSON also prevents cross-site requests: browsers send it to another origin only after a preflight.
    given = request.headers.get("content-type", "")
    if given.partition(";")[0].strip().lower() != JSON:
        what = f"is {short(given)}" if given else "is missing"
        message = f"the header Content-Type {what}; send the body as JSON with 'Content-Type: {JSON}'"
        raise APIError(415, message, code="unsupported_media_type")
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    if coding != "identity":
        message = f"the header Content-Encoding is {short(coding)}; send the body without compression"
        raise APIError(415, message, code="unsupported_media_type")
    values = parse_json(await request.body(), model)
    try:
        return model.model_validate(values), ignored
    except ValidationError as error:
        if not lenient:
            raise validation_error(error, model) from None
        wrong = {str(e["loc"][0]): e["type"] for e in error.errors(include_url=False, include_input=False)}
    unused = [name for name in values if wrong.get(name) == "extra_forbidden" or (name in wrong and name in LENIENT)]
    try:
        return model.model_validate({n: v for n, v in values.items() if n not in unused}), ignored + unused
    except ValidationError as error:
        # A misspelled field may be the reason why another one is missing.
        raise validation_error(error, model, ignored=unused) from None


def read_query(request: Request, *, lenient: bool = False) -> list[str]:
    """Return the names of the query parameters, all of which are ignored, or refuse them."""
    names = list(dict.fromkeys(request.query_params))
    if request.scope["query_string"] and not lenient:
        message = f"query parameters ({short(request.url.query)}) are not supported; send fields in the body"
        raise APIError(400, message, code="unknown_parameter", param=names[0][:80] if names else "query")
    return names


def parse_json(body: bytes, model: type[BaseModel]) -> dict[str, Any]:
    """Parse a JSON object. Raises APIError for what Python's parser would accept or lose without a word."""
    example = '{"prompt": "a red circle"}' if "prompt" in model.model_fields else "{}"
    if not body.strip():
        raise _invalid(f"the body is empty; send a JSON object such as {example}")
    if body.startswith(b"\xef\xbb\xbf"):
        raise _invalid("the body starts with a byte order mark; save it as UTF-8 without BOM")
    try:
        values = json.loads(body.decode(), object_pairs_hook=_no_duplicates, parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise _invalid(f"the body is not UTF-8: byte {error.start} is 0x{body[error.start]:02x}") from None
    except json.JSONDecodeError as error:
        reason = f"{error.msg[0].lower()}{error.msg[1:]}"
        raise _invalid(f"the body is not valid JSON: {reason} at line {error.lineno}, column {error.colno}") from None
    except RecursionError:
        raise _invalid("the body is nested too deeply") from None
    except ValueError:
        # Python converts no integer of more than 4,300 digits.
        raise _invalid("the body contains a number with too many digits") from None
    if not isinstance(values, dict):
        raise _invalid(f"the body is {describe(values)}; send a JSON object such as {example}")
    if b"\\u" in body:
        _refuse_surrogates(values)
    return values


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise APIError(400, f"the field {short(name)} is given twice", code="invalid_json", param=_param(name))
        values[name] = value
    return values


def _refuse_surrogates(values: dict[str, Any]) -> None:
    """Python's parser accepts half of a surrogate pair, such as "\\ud800", which cannot be encoded later."""
    for name, value in values.items():
        try:
            json.dumps([name, value], ensure_ascii=False).encode()
        except UnicodeEncodeError:
            message = f"{short(name)} contains half of a surrogate pair (\\ud800 to \\udfff), which is not Unicode text"
            raise APIError(400, message, code="invalid_value", param=_param(name)) from None


def _param(name: str) -> str:
    """Return a name that a client sent, cut off, without what JSON cannot encode."""
    return name[:80].encode(errors="replace").decode()


def _refuse_constant(name: str) -> Any:
    raise _invalid(f"the body is not valid JSON: {name} is not a JSON number")


def _invalid(message: str) -> APIError:
    return APIError(400, message, code="invalid_json")
