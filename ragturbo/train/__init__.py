"""Latent adversarial diffusion distillation of H-space adapters and one-step students."""

from __future__ import annotations

from typing import Any

__all__ = ["LADDConfig", "LADDTrainer", "load_config"]

_MODULES = {"LADDConfig": "config", "load_config": "config", "LADDTrainer": "ladd"}


def __getattr__(name: str) -> Any:
    # Lazy, so that torch, peft and accelerate are imported only for training.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
