"""Weights of a derived model that follow the model it was derived from.

A folded or packed model shares the original's tensors where it can and owns a tensor where it must: two weights in one,
a constant added to a bias, a LoRA merged. What it owns is tied to a rule that computes it, so that new weights are
copied into the same memory: a captured CUDA graph reads addresses, and a tensor in another place would be ignored.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Replaced:
    """A row of the table of what stands where in a derived model."""

    path: str
    was: str
    now: str


@dataclass
class Ties:
    """The original model's weights by module path, as a derived model takes them."""

    root: nn.Module
    owned: list[tuple[Tensor, Callable[[], Tensor]]] = field(default_factory=list)
    shared: list[tuple[str, Tensor]] = field(default_factory=list)

    def weight(self, path: str) -> Tensor:
        """Shared where the module is plain, owned where a LoRA has to be merged into it."""
        module = self.root.get_submodule(path)
        if lora_of(module) is not None:
            return self.own(lambda: weight_of(self.root.get_submodule(path)))
        tensor = weight_of(module)
        self.shared.append((path, tensor))
        return tensor

    def bias(self, path: str) -> Tensor | None:
        return bias_of(self.root.get_submodule(path))

    def now(self, path: str) -> tuple[Tensor, Tensor | None]:
        """The present weight and bias, for the rule of an owned tensor."""
        module = self.root.get_submodule(path)
        return weight_of(module), bias_of(module)

    def packed(self, *paths: str) -> Tensor:
        """The weights of several linear layers of one input, below each other."""
        return self.own(lambda: torch.cat([weight_of(self.root.get_submodule(p)) for p in paths]))

    def own(self, rule: Callable[[], Tensor]) -> Tensor:
        value = rule().detach().clone(memory_format=torch.preserve_format)
        self.owned.append((value, rule))
        return value

    @torch.no_grad()
    def refresh(self) -> bool:
        """Copies what has changed into place. False where that is not enough: a shared layer is no longer plain (or is
        another tensor), or a shape has changed, and the derived model has to be made anew."""
        for path, tensor in self.shared:
            module = self.root.get_submodule(path)
            if lora_of(module) is not None or weight_of(module).data_ptr() != tensor.data_ptr():
                return False
        values = [rule() for _, rule in self.owned]
        if any(own.shape != value.shape for (own, _), value in zip(self.owned, values, strict=True)):
            return False
        for (own, _), value in zip(self.owned, values, strict=True):
            own.copy_(value)
        return True

    @property
    def owned_bytes(self) -> int:
        return sum(own.numel() * own.element_size() for own, _ in self.owned)


def lora_of(module: nn.Module) -> Any | None:
    """The module as peft's tuner layer, if it is one."""
    return module if hasattr(module, "get_base_layer") and hasattr(module, "get_delta_weight") else None


def weight_of(module: nn.Module) -> Tensor:
    """The weight a layer computes with: a LoRA's contribution is merged, in fp32, into a copy."""
    layer = lora_of(module)
    if layer is None:
        return module.weight  # type: ignore[return-value]
    base = layer.get_base_layer().weight
    names = [] if layer.merged or layer.disable_adapters else [n for n in layer.active_adapters if n in layer.lora_A]
    if not names:
        return base
    delta = sum(layer.get_delta_weight(name).float() for name in names)
    merged = (base.float() + delta).to(base.dtype)
    return merged.contiguous(memory_format=torch.channels_last) if _is_channels_last(base) else merged


def bias_of(module: nn.Module) -> Tensor | None:
    layer = lora_of(module)
    return (module if layer is None else layer.get_base_layer()).bias  # type: ignore[return-value]


def sharing_copy(module: nn.Module, kept: tuple[str, ...] = ()) -> Any:
    """A copy of the modules over the same tensors: to be taken apart without the original noticing.

    kept: names of classes whose modules are not copied but used as they are, being replaced in the copy anyway.
    """
    memo: dict[int, Any] = {id(t): t for t in [*module.parameters(), *module.buffers()]}
    memo |= {id(m): m for m in module.modules() if type(m).__name__ in kept}
    return copy.deepcopy(module, memo)


def _is_channels_last(tensor: Tensor) -> bool:
    return tensor.ndim == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)
