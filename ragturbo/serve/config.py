"""The server's configuration, validated when it is created, and API keys from files and the environment."""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ragturbo.config import GeneratorConfig
from ragturbo.errors import InvalidRequest


@dataclass(frozen=True)
class ServeConfig:
    # Arguments of Generator.from_pretrained.
    model: str = "shapes"
    database: str | bool | None = None
    adapter: str | bool | None = None
    device: str | None = None
    dtype: str | None = None
    local_files_only: bool = False
    revision: str | None = None
    cache_dir: str | None = None
    distilled: bool | None = None
    """Whether the model was distilled to few steps. None: as Generator.from_pretrained decides."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Fields of GeneratorConfig: batch_sizes, batch_window, max_queue, retriever, host_cache …"""
    name: str | None = None
    """The model id clients see. None: `model`, or the folder's name if it is a path."""
    postprocess: str | None = None
    """"module:function", called on every uint8 batch, for example a safety filter."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    """Empty: no key is required."""
    admin_keys: tuple[str, ...] = field(default=(), repr=False)
    """Empty: there are no admin routes."""

    timeout: float = 10.0
    """Seconds from a request's arrival in the queue to its image."""
    max_images: int = 10
    """Images per request; the default is OpenAI's limit."""
    max_prompt: int = 4000
    """Characters."""
    max_body: int = 64 * 1024
    """Bytes."""
    body_timeout: float = 10.0
    """Seconds in which a request has to arrive."""
    max_side: int | None = None
    """Pixels. None: twice the model's native size."""
    lenient: bool = False
    """Ignore and report unknown fields instead of refusing them."""

    log_prompts: bool = False
    access_log: bool = False
    drain_delay: float = 0.0
    """Seconds to keep serving after SIGTERM, so that a load balancer notices that readiness is off."""

    def __post_init__(self) -> None:
        for name in ("timeout", "body_timeout"):
            if not 0 < getattr(self, name) < math.inf:
                raise InvalidRequest(f"{name}={getattr(self, name)!r} must be a finite number of seconds above 0")
        if not 0 <= self.drain_delay < math.inf:
            raise InvalidRequest(f"drain_delay={self.drain_delay!r} must be a finite number of seconds, 0 or more")
        for name in ("max_images", "max_prompt", "max_body", "max_side"):
            if (limit := getattr(self, name)) is not None and not limit >= 1:
                raise InvalidRequest(f"{name}={limit!r} must be at least 1")
        if not 0 <= self.port <= 65535:
            raise InvalidRequest(f"port={self.port!r} must be from 0 (any free port) to 65535")
        for name in ("api_keys", "admin_keys"):
            keys = getattr(self, name)
            if isinstance(keys, str):
                raise InvalidRequest(f"{name} must be a list of keys, not a string")
            if any(not key or key != key.strip() for key in keys):
                raise InvalidRequest(f"{name} contains a key that is empty or has spaces around it")
            object.__setattr__(self, name, tuple(keys))
        if shared := set(self.api_keys) & set(self.admin_keys):
            raise InvalidRequest(f"{len(shared)} keys are in both api_keys and admin_keys; they must differ")
        if unknown := sorted(set(self.options) - set(GeneratorConfig.__dataclass_fields__)):
            raise InvalidRequest(f"unknown option {unknown[0]!r}; options are the fields of GeneratorConfig")
        GeneratorConfig(**self.options)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ServeConfig:
        """Create a configuration from a config file's mapping."""
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise InvalidRequest(f"unknown setting {unknown[0]!r}; known settings: {', '.join(sorted(known))}")
        return cls(**values)

    @property
    def model_id(self) -> str:
        # Clients must not see the server's paths.
        return self.name or (Path(self.model).name if Path(self.model).exists() else self.model)

    @property
    def public(self) -> bool:
        return self.host not in ("127.0.0.1", "::1", "localhost")

    def load_postprocess(self) -> Callable[[Any], Any] | None:
        """Import the postprocess function."""
        if self.postprocess is None:
            return None
        module, _, name = self.postprocess.partition(":")
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise InvalidRequest(f'postprocess={self.postprocess!r} is not a "module:function": {error}') from error


def keys_from_environment() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the client and admin keys of the environment, where they are separated by commas."""
    clients, admins = (
        tuple(key.strip() for key in os.environ.get(name, "").split(",") if key.strip())
        for name in ("RAGTURBO_API_KEYS", "RAGTURBO_ADMIN_KEYS")
    )
    return clients, admins


def read_keys(path: Path) -> tuple[str, ...]:
    """Read a file with one key per line; empty lines and lines that start with # are ignored."""
    try:
        lines = [line.strip() for line in path.read_text("utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"cannot read keys from {path}: {getattr(error, 'strerror', None) or error}") from error
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        # Without this check an empty file would turn authentication off.
        raise InvalidRequest(f"{path} contains no keys")
    return keys
