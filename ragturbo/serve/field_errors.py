"""What is wrong with a field of a body, in words."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from ragturbo.config import MAX_SEED
from ragturbo.messages import short
from ragturbo.serve.api_errors import APIError

_GENERATOR = "belongs to Generator.__call__ and is not available over HTTP"
_FIXED = "it cannot be set over HTTP; the server uses the model's own value"
_EDIT = "images cannot be edited: this server only generates them from text"
# Names that people know from diffusers, from other servers or from Generator.__call__, and what to say of each.
HINTS = {
    **dict.fromkeys(("num_images_per_prompt", "num_images", "num_outputs", "batch_size", "count"), "use 'n'"),
    **dict.fromkeys(("width", "height", "resolution", "aspect_ratio"), "use 'size', such as \"512x512\""),
    **dict.fromkeys(("output_type", "format", "image_format"), "use 'output_format'"),
    **dict.fromkeys(("text", "input", "inputs", "messages", "caption"), "use 'prompt'"),
    **dict.fromkeys(("k", "top_k", "num_neighbours"), "use 'num_neighbors'"),
    **dict.fromkeys(("generator", "random_seed", "manual_seed"), "use 'seed'"),
    **dict.fromkeys(("num_inference_steps", "inference_steps", "num_steps", "steps"), _FIXED),
    **dict.fromkeys(("guidance_scale", "guidance", "cfg_scale", "cfg"), _FIXED),
    **dict.fromkeys(("negative_prompt", "lam", "per", "query", "neighbors", "latents", "prompt_embeds"), _GENERATOR),
    **dict.fromkeys(("negative_prompt_embeds", "postprocess", "timeout", "reservation"), _GENERATOR),
    **dict.fromkeys(("image", "images", "mask", "markup", "input_fidelity", "strength"), _EDIT),
}
KINDS = {bool: "true or false", str: "a text", list: "a list", dict: "an object"}


def validation_error(error: ValidationError, model: type[BaseModel], ignored: Sequence[str] = ()) -> APIError:
    """Describe the first error; unknown fields come first, because a misspelled field is often also a missing one."""
    errors = error.errors(include_url=False)
    first = min(errors, key=lambda e: e["type"] != "extra_forbidden")
    name = str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        return APIError(400, unknown_field(name, model), code="unknown_parameter", param=name[:80])
    field = _properties(model)[name]
    if first["type"] == "missing":
        message = f"{name!r} is missing: {_lower(field['description'])}"
        if ignored:
            message += f"; ignored: {', '.join(map(short, ignored))}"
        return APIError(400, message, code="missing_required_parameter", param=name)
    return APIError(400, _wrong_value(name, field, first), code="invalid_value", param=name)


@lru_cache
def _properties(model: type[BaseModel]) -> dict[str, Any]:
    return model.model_json_schema()["properties"]


def unknown_field(name: str, model: type[BaseModel]) -> str:
    """Say that there is no such field, and which one may be meant."""
    known = model.model_fields
    plain = name[:80].strip().lower().replace("-", "_")
    hint = HINTS.get(plain) if "prompt" in known else None
    if hint is None:
        squeezed = {field.replace("_", ""): field for field in known}
        near = difflib.get_close_matches(plain.replace("_", ""), squeezed, 1, cutoff=0.7)
        hint = f"did you mean {squeezed[near[0]]!r}?" if near else "the fields are " + ", ".join(_usable(model))
    return f"unknown field {short(name)}: {hint}"


def _usable(model: type[BaseModel]) -> list[str]:
    return [name for name, field in model.model_fields.items() if field.annotation is not type(None)]


def _wrong_value(name: str, field: dict[str, Any], error: ErrorDetails) -> str:
    """Say what the field must be and what it was. Prompts are not quoted: they may be long."""
    value, wanted = error["input"], allowed(field)
    if wanted == "null":
        return f"{name!r} is not supported; leave it out. {field['description']}"
    if error["type"] == "string_too_long":
        return f"{name!r} must be {wanted}; this one has {len(value)}"
    if error["type"] == "string_too_short":
        return f"{name!r} is empty; it must be {wanted}"
    if name == "prompt" and isinstance(value, list):
        return f"{name!r} must be {wanted}, not a list; send one request for each prompt"
    choices = _choices(field)
    message = f"{name!r} must be {wanted}, not {describe(value, text=not choices)}"
    if choices and isinstance(value, str):
        near = difflib.get_close_matches(value.strip().lower(), choices, 1)
        if near:
            return f"{message}; did you mean {near[0]!r}?"
    # Of a field with a single choice, the description says why there is no other.
    only_one = wanted in ("false", "0") or name in ("quality", "background", "moderation", "response_format")
    return f"{message}. {field['description']}" if only_one else message


def allowed(field: dict[str, Any]) -> str:
    """Say which values a field's JSON schema allows, besides null."""
    field = _not_null(field)
    if choices := _choices(field):
        return _either([repr(choice) for choice in choices])
    if "const" in field:
        return str(field["const"]).lower()
    least, most = field.get("minimum"), field.get("maximum")
    if field["type"] == "integer":
        return "0" if least == most == 0 else f"a whole number{_range(least, most)}"
    if field["type"] == "number":
        return f"a number{_range(least, most)}"
    if "pattern" in field:
        return "'auto' or a text such as '512x512'"
    if field["type"] == "string":
        longest = field.get("maxLength")
        return "a text" if longest is None else f"a text of 1 to {longest} characters"
    kinds = {"boolean": "true or false", "array": "a list", "object": "an object"}
    return kinds.get(field["type"], field["type"])


def _not_null(field: dict[str, Any]) -> dict[str, Any]:
    kinds = [kind for kind in field.get("anyOf", ()) if kind.get("type") != "null"]
    return kinds[0] if kinds else field


def _choices(field: dict[str, Any]) -> list[str]:
    field = _not_null(field)
    return field.get("enum") or ([field["const"]] if isinstance(field.get("const"), str) else [])


def _range(least: float | None, most: float | None) -> str:
    if least is None or most is None:
        return ""
    # FastAPI's schema has floats, which cannot hold the largest seed.
    largest = "2**64 - 1" if float(most) == float(MAX_SEED) else f"{most:g}"
    return f" from {least:g} to {largest}"


def _either(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def describe(value: Any, *, text: bool = True) -> str:
    """Describe a JSON value; text: whether a text needs to be called so, because another kind was wanted."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f"the text {short(value)}" if text else short(value)
    return KINDS[type(value)] if type(value) in KINDS else short(value)


def _lower(sentence: str) -> str:
    return sentence[0].lower() + sentence[1:].rstrip(".")
