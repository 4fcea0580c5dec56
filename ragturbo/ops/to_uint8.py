"""Decoded images to bytes, bit for bit as diffusers' image processor."""

from __future__ import annotations

import torch
from torch import Tensor

from ragturbo.errors import InvalidRequest
from ragturbo.ops import dispatch


def to_uint8(images: Tensor, *, signed: bool = True, impl: str = "auto") -> Tensor:
    """images: (B, C, H, W) of any strides, in [-1, 1] if signed, else in [0, 1] -> (B, H, W, C) uint8, contiguous.

    As in diffusers, x/2 + 1/2 and the clamp are computed in the images' type and 255·y in fp32, rounded half to even.
    NaN becomes 0.
    """
    if images.ndim != 4 or not images.is_floating_point():
        raise InvalidRequest(f"to_uint8 takes float images (B, C, H, W), got {images.dtype} of {tuple(images.shape)}")
    if dispatch.choose("to_uint8", impl, images.device.type, images.dtype, images) == "triton":
        return _triton(images, signed)
    return reference(images, signed)


def reference(images: Tensor, signed: bool) -> Tensor:
    """The same in plain torch."""
    y = images * 0.5 + 0.5 if signed else images
    y = y.nan_to_num(nan=0.0).clamp(0, 1).float()
    return (y * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


@torch.library.custom_op("ragturbo::to_uint8", mutates_args=())
def _triton(images: Tensor, signed: bool) -> Tensor:
    from ragturbo.kernels import to_uint8 as kernels

    return kernels.forward(images, signed)


@_triton.register_fake
def _(images: Tensor, signed: bool) -> Tensor:
    batch, channels, height, width = images.shape
    return images.new_empty(batch, height, width, channels, dtype=torch.uint8)
