"""Latent adversarial diffusion distillation of the H-space adapter, and of one-step students."""

from __future__ import annotations

from typing import Any

__all__ = ["LADDConfig", "LADDTrainer", "load_config"]

_WHERE = {"LADDConfig": "config", "load_config": "config", "LADDTrainer": "ladd"}


def __getattr__(name: str) -> Any:
    # peft, accelerate and torch are imported when a trainer is, not before.
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
