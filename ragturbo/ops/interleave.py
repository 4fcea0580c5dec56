"""Interleave the four phases of an upsampled image, as one convolution of the small image computes them."""

from __future__ import annotations

import torch
from torch import Tensor

from ragturbo.errors import InvalidRequest
from ragturbo.ops import dispatch


def interleave(phases: Tensor, impl: str = "auto") -> Tensor:
    """phases: (B, 4C, H + 1, W + 1) -> (B, C, 2H, 2W), the same bits.

    Pixel (2i + y, 2j + x) of the output, y and x in {0, 1}, is phases[:, (2y + x)·C :][:, :C, i + y, j + x]. The kernel
    reads and writes channels_last. Forward only.
    """
    if phases.ndim != 4 or phases.shape[1] % 4 or min(phases.shape[2:]) < 2:
        raise InvalidRequest(f"interleave takes phases (B, 4C, H + 1, W + 1), got {tuple(phases.shape)}")
    name = dispatch.choose("interleave", impl, phases.device.type, phases.dtype, phases)
    if name == "triton":
        return _triton(phases)
    if name == "native":
        return _native(phases)
    return reference(phases)


def reference(phases: Tensor) -> Tensor:
    """The same in plain torch."""
    h, w = phases.shape[2] - 1, phases.shape[3] - 1
    parts = phases.unflatten(1, (2, 2, -1))
    rows = [torch.stack([parts[:, y, x, :, y : y + h, x : x + w] for x in (0, 1)], dim=-1).flatten(-2) for y in (0, 1)]
    return torch.stack(rows, dim=3).flatten(2, 3)


def _native(phases: Tensor) -> Tensor:
    phases = phases.contiguous(memory_format=torch.channels_last)
    batch, channels, h, w = phases.shape
    shape = batch, channels // 4, 2 * (h - 1), 2 * (w - 1)
    out = torch.empty(shape, dtype=phases.dtype, memory_format=torch.channels_last)
    dispatch.native().interleave(
        phases=phases.data_ptr(), out=out.data_ptr(), batch=batch, h=h - 1, w=w - 1,
        bytes=channels // 4 * phases.element_size(), threads=torch.get_num_threads(),
    )  # fmt: skip
    return out


@torch.library.custom_op("ragturbo::interleave", mutates_args=())
def _triton(phases: Tensor) -> Tensor:
    from ragturbo.kernels import interleave as kernels

    return kernels.forward(phases)


@_triton.register_fake
def _(phases: Tensor) -> Tensor:
    batch, c, h, w = phases.shape
    return phases.new_empty(batch, c // 4, 2 * (h - 1), 2 * (w - 1)).contiguous(memory_format=torch.channels_last)
