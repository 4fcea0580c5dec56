"""Weights of a derived model, such as a folded UNet, that follow the model it was derived from.

A derived model shares the original's tensors if it can and owns a tensor if it must: several weights in one, a constant
added to a bias, a merged LoRA. Each owned tensor comes with a function that computes it, so that `refresh` can copy new
weights into the same memory: captured CUDA graphs read fixed addresses.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ragturbo.model.onednn import PackedWeight

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Replaced:
    """A module that a derived model replaces: its path, and what it was and is."""

    path: str
    was: str
    now: str


@dataclass
class Ties:
    """The weights of the original model `root` by module path, as a derived model uses them.

    dtype: of the derived model's products, if it is not the original's.
    packs: whether convolutions and linear layers keep their weights in oneDNN's layout (`onednn.py`).
    """

    root: nn.Module
    dtype: torch.dtype | None = None
    packs: bool = False
    owned: list[tuple[Tensor, Callable[[], Tensor]]] = field(default_factory=list)
    shared: list[tuple[str, Tensor]] = field(default_factory=list)
    packed: list[PackedWeight] = field(default_factory=list)

    def weight(self, path: str, *, cast: bool = True) -> Tensor:
        """A module's weight: shared, or owned if a LoRA has to be merged into it or its dtype is another."""
        module = self.root.get_submodule(path)
        tensor = _weight_of(module)
        if _is_peft_layer(module) or (cast and self._casts(tensor)):
            return self.own(lambda: self.current(path, cast=cast))
        self.shared.append((path, tensor))
        return tensor

    def bias(self, path: str, *, cast: bool = True) -> Tensor | None:
        """A module's bias: shared, or owned in another dtype."""
        bias: Tensor | None = base_layer(self.root.get_submodule(path)).bias
        if bias is None or not cast or not self._casts(bias):
            return bias
        return self.own(lambda: base_layer(self.root.get_submodule(path)).bias.to(self.dtype))

    def current(self, path: str, *, cast: bool = True) -> Tensor:
        """A module's present weight, for the function of an owned tensor."""
        weight = _weight_of(self.root.get_submodule(path))
        return weight.to(self.dtype) if cast and self._casts(weight) else weight

    def norm(self, module: M) -> M:
        """A norm of the original, or a copy in another dtype. LoRAs do not change norms."""
        if not self._casts(next(module.parameters(), torch.empty(0, dtype=self.dtype))):
            return module
        return copy.deepcopy(module).to(self.dtype)

    def concatenated(self, *paths: str) -> Tensor:
        """The weights of several linear layers with the same input as one."""
        return self.own(lambda: torch.cat([self.current(path) for path in paths]))

    def own(self, compute: Callable[[], Tensor]) -> Tensor:
        """A tensor of the derived model's own, which `refresh` computes again."""
        value = compute().detach().clone(memory_format=torch.preserve_format)
        self.owned.append((value, compute))
        return value

    @property
    def packed_bytes(self) -> int:
        return sum(weight.nbytes for weight in self.packed)

    @torch.no_grad()
    def refresh(self) -> bool:
        """Copy changed weights into the owned tensors.

        Returns:
            False if that is not enough and the derived model has to be made again: a LoRA was added to a shared layer,
            a shared tensor was replaced, or a shape has changed. Nothing is copied then.
        """
        for path, tensor in self.shared:
            module = self.root.get_submodule(path)
            if _is_peft_layer(module) or _weight_of(module).data_ptr() != tensor.data_ptr():
                return False
        values = [compute() for _, compute in self.owned]
        if any(own.shape != value.shape for (own, _), value in zip(self.owned, values, strict=True)):
            return False
        for (own, _), value in zip(self.owned, values, strict=True):
            own.copy_(value)
        for weight in self.packed:
            weight.clear()
        return True

    def _casts(self, tensor: Tensor) -> bool:
        return self.dtype is not None and tensor.dtype != self.dtype

    @property
    def owned_bytes(self) -> int:
        return sum(own.numel() * own.element_size() for own, _ in self.owned)


def base_layer(module: Any) -> Any:
    """The layer below a LoRA of peft or of `model/lora.py`; without a LoRA the module itself."""
    return getattr(module, "base_layer", module)


def _is_peft_layer(module: nn.Module) -> bool:
    return hasattr(module, "base_layer") and hasattr(module, "get_delta_weight")


def _weight_of(layer: Any) -> Tensor:
    """The weight that a layer computes with. A LoRA of peft is merged in fp32 into a copy."""
    if not _is_peft_layer(layer):
        return layer.weight
    base = layer.base_layer.weight
    names = [] if layer.merged or layer.disable_adapters else [n for n in layer.active_adapters if n in layer.lora_A]
    if not names:
        return base
    delta = sum(layer.get_delta_weight(name).float() for name in names)
    merged = (base.float() + delta).to(base.dtype)
    if base.ndim != 4 or base.is_contiguous() or not base.is_contiguous(memory_format=torch.channels_last):
        return merged
    return merged.contiguous(memory_format=torch.channels_last)


def sharing_copy(module: nn.Module, kept: tuple[str, ...] = ()) -> Any:
    """Copy the modules but not their tensors, so that parts of the copy can be replaced.

    kept: class names of modules that are not copied, because the caller replaces them in the copy.
    """
    memo: dict[int, Any] = {id(t): t for t in [*module.parameters(), *module.buffers()]}
    memo |= {id(m): m for m in module.modules() if type(m).__name__ in kept}
    return copy.deepcopy(module, memo)
