"""Latent adversarial diffusion distillation of H-space adapters and one-step students."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__all__ = ["LADDConfig", "LADDTrainer", "load_config"]

_MODULES = {"LADDConfig": "config", "load_config": "config", "LADDTrainer": "ladd"}


def __getattr__(name: str) -> Any:
    # Lazy, so that torch, peft and accelerate are imported only for training.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def require(name: str) -> Any:
    """Return the module `name` of the train extra, or raise ModelError with the command that installs it."""
    from ragturbo.errors import ModelError

    try:
        return import_module(name)
    except ImportError as error:
        raise ModelError(f"training needs {name.partition('.')[0]}: pip install 'ragturbo[train]'") from error
