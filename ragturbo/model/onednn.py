"""Weights of convolutions and linear layers in oneDNN's own layouts, for CPUs.

torch hands a layer's weight to oneDNN as it is, which reorders it at every call, or it runs a small convolution by
another, slower way. With a weight that was reordered once, oneDNN also adds bias and residual before it writes the
result. torch has these calls for the C++ code that torch.compile generates.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

# Below this many weights the longer call costs more than the layout gains.
_SMALL_LINEAR = 1 << 18
# Sizes of the input whose packed weight a layer finds at once, and cases whose layout is known.
_SIZES, _LAYOUTS = 64, 16384


@functools.cache
def why_not() -> str | None:
    """Why packed weights cannot be used on this machine; None if they can. Tries a layer of each kind once."""
    if not torch.backends.mkldnn.is_available():
        return "this build of torch has no oneDNN"
    try:
        with torch.no_grad():
            # Not random: torch's global generator is the user's.
            x, weight, bias = (torch.linspace(-1, 1, n).cos() for n in (200, 576, 8))
            x, weight = x.view(1, 8, 5, 5), weight.view(8, 8, 3, 3)
            ours = PackedConv2d(lambda: weight, weight.shape, weight.dtype, (1, 1), (1, 1))(x, bias, x)
            theirs = F.conv2d(x, weight, bias, padding=1) + x
            row, matrix = torch.linspace(-1, 1, 64).view(4, 16), torch.linspace(-2, 1, 256).sin().view(16, 16)
            linear = PackedLinear(lambda: matrix, (16, 16), matrix.dtype)(row, bias.repeat(2), row)
            agree = torch.allclose(ours, theirs, atol=1e-3) and torch.allclose(
                linear, F.linear(row, matrix, bias.repeat(2)) + row, atol=1e-3
            )
    # Missing or changed operations raise AttributeError, RuntimeError or TypeError.
    except Exception as error:
        return f"torch {torch.__version__} has no packed layers for this CPU: {str(error).splitlines()[0][:200]}"
    return None if agree else f"torch {torch.__version__} computes packed layers differently"


def bf16_reason() -> tuple[bool, str]:
    """Whether this CPU multiplies bf16 numbers faster than fp32 ones, and why."""
    known: Any = torch.cpu
    for name, query in (("AMX", "_is_amx_tile_supported"), ("AVX512_BF16", "_is_avx512_bf16_supported")):
        if getattr(known, query, lambda: False)():
            return True, f"this CPU has {name}"
    return False, "this CPU has neither AVX512_BF16 nor AMX"


class PackedWeight:
    """A weight in the layout that oneDNN chooses for each size of the input, packed at the first call with that size.

    In another layout than it expects, oneDNN reorders the weight at every call, which can take a hundred times as long
    as the layer. Sizes with the same layout share one packed weight.
    """

    # oneDNN's description of the layout, by all that it depends on: equal layers need not be packed to know it.
    _layouts: ClassVar[dict[Hashable, bytes]] = {}

    def __init__(
        self, weight: Callable[[], Tensor], pack: Callable[[Tensor, torch.Size], Tensor], settings: Hashable
    ) -> None:
        """settings: all that the layout depends on besides the size of the input."""
        self._compute, self._pack, self._settings = weight, pack, settings
        self._by_size: dict[torch.Size, Tensor] = {}
        self._by_layout: dict[bytes, Tensor] = {}

    def of(self, size: torch.Size) -> Tensor:
        if (found := self._by_size.get(size)) is None:
            if len(self._by_size) >= _SIZES:
                # The layouts stay, so that coming back to a size packs nothing.
                self._by_size.clear()
            found = self._by_size[size] = self._packed(size)
        return found

    @property
    def nbytes(self) -> int:
        return sum(int(torch.ops.mkldnn._nbytes(weight)) for weight in self._by_layout.values())

    def _packed(self, size: torch.Size) -> Tensor:
        case = self._settings, size, torch.get_num_threads()
        if len(self._layouts) >= _LAYOUTS:
            self._layouts.clear()
        if (known := self._layouts.get(case)) in self._by_layout:
            return self._by_layout[known]
        packed = self._pack(self._compute().detach(), size)
        layout = self._layouts[case] = bytes(torch.ops.mkldnn._get_mkldnn_serialized_md(packed).tolist())
        return self._by_layout.setdefault(layout, packed)

    def clear(self) -> None:
        """After the weight has changed."""
        self._by_size.clear()
        self._by_layout.clear()


class PackedConv2d:
    def __init__(
        self, weight: Callable[[], Tensor], shape: torch.Size, dtype: torch.dtype, stride: tuple[int, int],
        padding: tuple[int, int],
    ) -> None:  # fmt: skip
        """weight: computes it, of `shape` and `dtype`."""
        self.dtype = dtype
        self._place = list(padding), list(stride), [1, 1], 1
        self.weight = PackedWeight(weight, self._pack, (shape, dtype, stride, padding))

    def _pack(self, weight: Tensor, size: torch.Size) -> Tensor:
        return torch.ops.mkldnn._reorder_convolution_weight(weight.contiguous(), *self._place, list(size))

    def __call__(
        self, x: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, *, overwrite: bool = False
    ) -> Tensor:
        """(B, C, H, W) in any layout -> channels_last. overwrite: the result may take the residual's memory."""
        x = x.contiguous(memory_format=torch.channels_last)
        weight = self.weight.of(x.shape)
        if residual is None:
            run = torch.ops.mkldnn._convolution_pointwise.default
            return run(x, weight, bias, *self._place, "none", [], "")
        residual = residual.contiguous(memory_format=torch.channels_last)
        if overwrite:
            add = torch.ops.mkldnn._convolution_pointwise_.binary
            return add(residual, x, weight, bias, *self._place, "add", 1.0, None, [], None)
        run = torch.ops.mkldnn._convolution_pointwise.binary
        return run(x, residual, weight, bias, *self._place, "add", None, None, [], None)


class PackedLinear:
    def __init__(self, weight: Callable[[], Tensor], shape: tuple[int, int], dtype: torch.dtype) -> None:
        """weight: computes it, of `shape` and `dtype`."""
        self.weight = PackedWeight(weight, _pack_linear, (shape, dtype))

    def __call__(self, x: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        """(…, K) -> (…, N)"""
        weight = self.weight.of(torch.Size((x.numel() // x.shape[-1], x.shape[-1])))
        if residual is None:
            return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, weight, bias, "add")


def packs_linear(weights: int) -> bool:
    """Whether a linear layer of so many weights is faster packed."""
    return weights >= _SMALL_LINEAR


def _pack_linear(weight: Tensor, size: torch.Size) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight, size[0])
