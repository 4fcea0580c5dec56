"""The endpoint's paths, and the answers to requests for any other path or method."""

from __future__ import annotations

import difflib
import re
from typing import TYPE_CHECKING

from ragturbo.messages import short
from ragturbo.serve.api_errors import APIError

if TYPE_CHECKING:
    from starlette.types import Scope

IMAGES = "/v1/images/generations"
MODELS = "/v1/models"
MODEL = f"{MODELS}/{{model}}"
DATABASE = "/admin/database"
DOCS = "/docs"
KNOWN = (IMAGES, MODELS, "/health/live", "/health/ready", "/metrics", DATABASE, DOCS, "/openapi.json")
NOT_SUPPORTED = {"/v1/images/edits": "image edits are", "/v1/images/variations": "image variations are"}
ONLY = f"this server only generates images from text, at POST {IMAGES}"


def inside(scope: Scope) -> str:
    """Return the path within this application, which may be mounted below another one."""
    path, root = str(scope["path"]), str(scope.get("root_path", "")).rstrip("/")
    return path[len(root) :] if root and path.startswith(f"{root}/") else path


def label(path: str) -> str:
    """Return the path's label in the metrics. Each value is a time series, so unknown paths share "other"."""
    if path.startswith(f"{MODELS}/"):
        return MODEL
    return path if path in KNOWN else "other"


def not_found(path: str) -> APIError:
    """Return the 404 for a path without a route. OpenAI's client does not retry a 404, but it retries a 501."""
    what, short_path = NOT_SUPPORTED.get(path), short(path)
    if what is not None:
        return APIError(404, f"{what} not supported: {ONLY}", code="not_supported")
    if path == DATABASE:
        return APIError(404, f"{DATABASE} exists only if the server has --admin-keys", code="not_found")
    if path.endswith("/images/generations"):
        message = f"there is nothing at {short_path}; images are at {IMAGES}: a client's base URL ends in /v1"
    elif near := difflib.get_close_matches(re.sub("//+", "/", path[:80]), KNOWN, 1, cutoff=0.85):
        message = f"there is nothing at {short_path}; did you mean {near[0]}?"
    elif path.startswith("/v1/"):
        return APIError(404, f"{short_path} is not supported: {ONLY}", code="not_supported")
    else:
        message = f"there is nothing at {short_path}; see {DOCS}"
    return APIError(404, message, code="not_found")


def not_allowed(method: str, path: str, allowed: str) -> APIError:
    """Return the 405 for a path that has only other methods."""
    message = f"{short(method)} is not possible at {short(path)}; use {allowed}"
    return APIError(405, message, code="method_not_allowed", headers={"Allow": allowed})
