"""What a server is started with, as one frozen dataclass that refuses nonsense when it is made."""

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

API_KEYS, ADMIN_KEYS = "RAGTURBO_API_KEYS", "RAGTURBO_ADMIN_KEYS"
LOOPBACK = ("127.0.0.1", "::1", "localhost")
# OpenAI's own limit on images a request.
MAX_IMAGES = 10


@dataclass(frozen=True)
class ServeConfig:
    # What is served: the arguments of Generator.from_pretrained.
    model: str = "shapes"
    database: str | bool | None = None
    adapter: str | bool | None = None
    device: str | None = None
    dtype: str | None = None
    local_files_only: bool = False
    revision: str | None = None
    cache_dir: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    """Fields of GeneratorConfig: batch_sizes, batch_window, max_queue, retriever, host_cache …"""
    name: str | None = None
    """The model's id for clients; None: `model` itself, or where that is a folder, the folder's name."""
    postprocess: str | None = None
    """"module:function", a hook on every uint8 batch: the place for a safety filter."""

    # Where, and for whom.
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    """Empty: everybody who can reach the port may ask."""
    admin_keys: tuple[str, ...] = field(default=(), repr=False)
    """Empty: there is no admin command."""

    # Limits.
    timeout: float = 10.0
    """Seconds from a request's arrival in the queue to its image; what cannot make it is refused."""
    max_images: int = MAX_IMAGES
    max_prompt: int = 4000
    """Characters."""
    max_body: int = 64 * 1024
    """Bytes."""
    body_timeout: float = 10.0
    """Seconds a client may take to send its request."""
    max_side: int | None = None
    """Pixels; None: twice the model's own."""

    log_prompts: bool = False
    access_log: bool = False
    drain_delay: float = 0.0
    """Seconds to go on serving after SIGTERM, so that a balancer can see that readiness is off."""

    def __post_init__(self) -> None:
        for name in ("timeout", "body_timeout"):
            if not 0 < getattr(self, name) < math.inf:
                raise InvalidRequest(f"{name}={getattr(self, name)!r} must be more than 0 seconds, and finite")
        if not 0 <= self.drain_delay < math.inf:
            raise InvalidRequest(f"drain_delay={self.drain_delay!r} must be 0 or more seconds, and finite")
        for name in ("max_images", "max_prompt", "max_body"):
            if not getattr(self, name) >= 1:
                raise InvalidRequest(f"{name}={getattr(self, name)!r} must be at least 1")
        if self.max_side is not None and not self.max_side >= 1:
            raise InvalidRequest(f"max_side={self.max_side!r} must be at least 1 pixel; None: twice the model's own")
        if not 0 <= self.port <= 65535:
            raise InvalidRequest(f"port={self.port!r} must be between 0, any that is free, and 65535")
        for name in ("api_keys", "admin_keys"):
            keys = getattr(self, name)
            if isinstance(keys, str):
                raise InvalidRequest(f"{name} is a list of keys, not one text")
            if any(not key or key != key.strip() for key in keys):
                raise InvalidRequest(f"{name} holds an empty key, or one with spaces around it")
            object.__setattr__(self, name, tuple(keys))
        if shared := set(self.api_keys) & set(self.admin_keys):
            raise InvalidRequest(f"{len(shared)} keys are both in api_keys and in admin_keys; clients are no admins")
        if unknown := sorted(set(self.options) - set(GeneratorConfig.__dataclass_fields__)):
            raise InvalidRequest(f"unknown option {unknown[0]!r}; options are the fields of GeneratorConfig")
        GeneratorConfig(**self.options)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> ServeConfig:
        """From a config file's mapping."""
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise InvalidRequest(f"unknown setting {unknown[0]!r}; there are: {', '.join(sorted(known))}")
        return cls(**values)

    @property
    def model_id(self) -> str:
        # A client has no business with the server's folders.
        return self.name or (Path(self.model).name if Path(self.model).exists() else self.model)

    @property
    def public(self) -> bool:
        return self.host not in LOOPBACK

    def hook(self) -> Callable[[Any], Any] | None:
        """The postprocess function itself."""
        if self.postprocess is None:
            return None
        module, _, name = self.postprocess.partition(":")
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise InvalidRequest(f'postprocess={self.postprocess!r} is no "module:function": {error}') from error


def keys_from_environment() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Clients' and admins' keys, separated by commas."""
    clients, admins = (
        tuple(key.strip() for key in os.environ.get(name, "").split(",") if key.strip())
        for name in (API_KEYS, ADMIN_KEYS)
    )
    return clients, admins


def read_keys(path: Path) -> tuple[str, ...]:
    """One key a line; empty lines and # comments do not count."""
    try:
        lines = [line.strip() for line in path.read_text("utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"cannot read keys from {path}: {error}") from error
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        # Served without keys because the file was empty: nobody means that.
        raise InvalidRequest(f"{path} holds no keys")
    return keys
