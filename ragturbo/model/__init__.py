"""The model's parts: text encoder, H-space UNet, adapter, injection, VAE, steps, and the bundle that holds them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ragturbo.model.adapter import HSpaceAdapter
    from ragturbo.model.bundle import Bundle
    from ragturbo.model.unet import HSpaceUNet

_HOMES = {"HSpaceUNet": "unet", "HSpaceAdapter": "adapter", "Bundle": "bundle"}

__all__ = ["Bundle", "HSpaceAdapter", "HSpaceUNet"]


# Late, so that reading a bundle's description or converting a file does not load diffusers.
def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"ragturbo.model.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
