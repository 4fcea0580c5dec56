"""Networks that become diffusers' or transformers' own class where something asks for more than a forward pass."""

from __future__ import annotations

import re
import threading
from importlib import import_module
from typing import Any, ClassVar

import torch
from torch import nn

from ragturbo.model.networks.config import Config
from ragturbo.model.networks.skeleton import Skeleton
from ragturbo.model.ties import sharing_copy

_PACKAGE = __name__.rpartition(".")[0]
# Methods and attributes of the libraries' classes that are not implemented here. A pattern instead of a look at the
# class: importing it takes seconds, and much of this package and of torch asks modules for attributes they lack.
_OF_THE_LIBRARY = re.compile(
    r"(enable|disable|save|load|unload|set|reset|add|delete|fuse|unfuse|from|register|extract|push|to_json|tiled|blend"
    r"|scale|unscale|gradient_checkpointing|activation_checkpointing|get_config|get_input|get_output|get_memory|resize"
    r"|tie|compile_repeated|init)_\w+|attn_processors|active_adapters|num_parameters|dequantize"
    r"|is_gradient_checkpointing|use_slicing|use_tiling|base_model|dummy_inputs"
)
_lock = threading.Lock()


class Network(nn.Module):
    """The base class of this package's networks: what ModelMixin has that this library uses."""

    LIBRARY: ClassVar[str]
    """Of the class of the same name."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def __getattr__(self, name: str) -> Any:
        if _OF_THE_LIBRARY.fullmatch(name):
            return getattr(become_library_class(self), name)
        return super().__getattr__(name)


def is_one_of(module: Any, *names: str) -> bool:
    """Whether a module is of a class of one of these names, here or in diffusers, which is not imported for it."""
    return any(kind.__name__ in names for kind in type(module).__mro__)


def become_library_class(network: nn.Module) -> Any:
    """Change a network, in place, into the library's class of its name, with the same layers and tensors.

    In place, because the engines hold references to it. A module that is one already is returned as it is.
    """
    with _lock:
        if not isinstance(network, Network):
            return network
        theirs = _library_model(network)
        theirs.train(network.training)
        _move(network, theirs)
        # Buffers that are not saved, such as positions.
        nn.Module.to(theirs, network.device)
        own = {name: value for name, value in network.__dict__.items() if name not in theirs.__dict__}
        own.pop("config", None)
        # One assignment each, so that another thread's forward pass finds all layers at any time.
        object.__setattr__(network, "__dict__", {**theirs.__dict__, **own})
        object.__setattr__(network, "__class__", type(theirs))
    return network


def library_copy(network: Any) -> Any:
    """A copy of a network, over the same tensors, in the library's class; one of the library is returned as it is."""
    return become_library_class(sharing_copy(network)) if isinstance(network, Network) else network


def _library_model(network: Network) -> Any:
    """The library's model of the same configuration, without weights."""
    kind: Any = getattr(import_module(network.LIBRARY), type(network).__name__)
    with Skeleton():
        if network.LIBRARY == "diffusers":
            return kind.from_config(network.config)
        options = {name: value for name, value in network.config.items() if not name.startswith("_")}
        return kind(kind.config_class(**options))


def _move(ours: nn.Module, theirs: nn.Module) -> None:
    """Move the layers of one network, or part of one, into another of the same structure."""
    theirs.training = ours.training
    for name, value in ours.__dict__.items():
        # The dictionary itself, which the handles of registered hooks refer to.
        if name.endswith("_hooks"):
            theirs.__dict__[name] = value
    for name, child in ours._modules.items():
        if child is not None and _is_structure(child):
            _move(child, getattr(theirs, name))
        else:
            # Torch's layers, also with a LoRA around them.
            theirs._modules[name] = child


def _is_structure(module: nn.Module) -> bool:
    return isinstance(module, (nn.ModuleList, nn.Sequential)) or type(module).__module__.startswith(_PACKAGE)
