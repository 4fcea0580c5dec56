"""Convolutions and linear layers of a derived model, with the additions that follow them.

On a CPU the weight is packed and oneDNN adds bias and residual. On a GPU torch adds a convolution's bias in a launch of
its own, so `bias_residual` adds bias and residual in one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ragturbo.model.onednn import PackedConv2d, PackedLinear, packs_linear
from ragturbo.model.ties import Replaced, Ties, base_layer
from ragturbo.ops import bias_residual, layer_norm, layer_norm_and_sum


class TiedConv2d:
    def __init__(
        self, ties: Ties, path: str, *, stride: tuple[int, int] = (1, 1), padding: tuple[int, int] = (1, 1),
        weight: Callable[[], Tensor] | None = None, shape: torch.Size | None = None, cast: bool = True,
    ) -> None:  # fmt: skip
        """
        Args:
            weight: computes the weight, if it is not the one at `path`; of `shape`.
            cast: False: in the dtype of the original model.
        """
        self._stride, self._padding = stride, padding
        self._packed: PackedConv2d | None = None
        if ties.packs:
            own = ties.current(path, cast=False)
            shape, dtype = shape or own.shape, ties.dtype if cast and ties.dtype else own.dtype
            compute = weight or (lambda: ties.current(path, cast=cast))
            self._packed = PackedConv2d(compute, shape, dtype, stride, padding)
            ties.packed.append(self._packed.weight)
        else:
            self.weight = ties.weight(path, cast=cast) if weight is None else ties.own(weight)

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype if self._packed is None else self._packed.dtype

    def __call__(
        self, x: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, *, overwrite: bool = False
    ) -> Tensor:
        """overwrite: the result may take the residual's memory."""
        if self._packed is not None:
            return self._packed(x, bias, residual, overwrite=overwrite)
        if residual is None:
            return F.conv2d(x, self.weight, bias, self._stride, self._padding)
        return bias_residual(F.conv2d(x, self.weight, None, self._stride, self._padding), bias, residual)


class TiedLinear:
    def __init__(self, ties: Ties, *paths: str) -> None:
        """paths: of one layer, or of several with the same input, whose results are concatenated. A 1x1 convolution is
        a linear layer on tokens."""
        self._packed: PackedLinear | None = None
        weights = [ties.current(path, cast=False) for path in paths]
        if ties.packs and packs_linear(sum(w.numel() for w in weights)):
            width = sum(w.shape[0] for w in weights)
            self._packed = PackedLinear(
                lambda: torch.cat([ties.current(path).flatten(1) for path in paths]),
                (width, weights[0].numel() // weights[0].shape[0]),
                ties.dtype or weights[0].dtype,
            )
            ties.packed.append(self._packed.weight)
        else:
            self.weight = ties.weight(paths[0]).flatten(1) if len(paths) == 1 else ties.concatenated(*paths)
        self.width = sum(w.shape[0] for w in weights)
        self._adds = ties.packs

    def onto(self, x: Tensor, h: Tensor, bias: Tensor | None) -> Sum:
        """x + W·h + bias. On a GPU the norm that follows adds it up."""
        return Sum(self(h, bias, x)) if self._adds else Sum(x, self(h), bias)

    def add_to(self, x: Tensor, h: Tensor, bias: Tensor | None) -> Tensor:
        """x + W·h. On a GPU in the memory of x, which saves a launch, and without the bias."""
        if self._adds:
            return self(h, bias, x)
        x.flatten(0, -2).addmm_(h.flatten(0, -2), self.weight.t())
        return x

    def __call__(self, x: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        if self._packed is not None:
            return self._packed(x, bias, residual)
        out = F.linear(x, self.weight, bias)
        return out if residual is None else residual + out


@dataclass(frozen=True)
class Sum:
    """x + add + bias. On a GPU the norm that reads a residual stream also adds to it, which saves a launch."""

    x: Tensor
    add: Tensor | None = None
    bias: Tensor | None = None

    def normed(self, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
        """The LayerNorm of the sum, and the sum."""
        if self.add is None:
            return layer_norm(self.x, norm.weight, norm.bias, norm.eps), self.x
        return layer_norm_and_sum(self.x, norm.weight, norm.bias, norm.eps, add=self.add, add_bias=self.bias)


class ConvLayer(nn.Module):
    """A convolution outside the fused layers.

    dtype: of the result; None: of the convolution.
    """

    def __init__(
        self, ties: Ties, path: str, *, biased: bool = True, cast: bool = True, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        conv = base_layer(ties.root.get_submodule(path))
        self._conv = TiedConv2d(ties, path, stride=conv.stride, padding=conv.padding, cast=cast)
        self._bias, self._dtype = ties.bias(path, cast=cast) if biased else None, dtype

    def forward(self, x: Tensor) -> Tensor:
        out = self._conv(x.to(self._conv.dtype), self._bias)
        return out if self._dtype is None else out.to(self._dtype)


def pack_rest(
    ties: Ties, view: Any, *, below: tuple[str, ...] = ("",), unbiased: set[str] | None = None
) -> list[Replaced]:
    """Replace, in a derived copy, the convolutions that no fused layer has replaced.

    Args:
        ties: of the original, with packs.
        view: the copy, which may share whole modules with the original: they are not changed.
        below: the parts of it to look at.
        unbiased: paths of convolutions whose bias is added elsewhere.
    """
    replaced: list[Replaced] = []
    shared = {id(module) for module in ties.root.modules()}
    for path, module in list(view.named_modules()):
        # A LoRA's own convolutions went with the layer it is on.
        gone = any(path.startswith(f"{done.path}.") for done in replaced)
        if gone or not path.startswith(below) or id(module) in shared or not _can_pack(module):
            continue
        view.set_submodule(path, ConvLayer(ties, path, biased=path not in (unbiased or ())))
        replaced.append(Replaced(path, type(module).__name__, ConvLayer.__name__))
    return replaced


def _can_pack(module: Any) -> bool:
    """Whether `ConvLayer` computes what this module does."""
    conv = base_layer(module)
    plain = type(conv) is nn.Conv2d and conv.groups == 1 and conv.dilation == (1, 1)
    return plain and conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
