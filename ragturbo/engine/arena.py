"""Small tensors packed into one buffer on the host and one on the device, so that one copy moves all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

# What torch's allocator and cuDNN align to as well.
_ALIGN = 256

Layout = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


class Arena:
    """`host[name]` and `device[name]` are views of the same layout. Their addresses never change: a captured copy reads
    the host buffer at every replay, so a request only writes its values there."""

    def __init__(self, layout: Layout, device: torch.device, *, page_locked: bool) -> None:
        offsets, size = {}, 0
        for name, (shape, dtype) in layout.items():
            offsets[name] = size
            size += -(-math.prod(shape) * dtype.itemsize // _ALIGN) * _ALIGN
        self.bytes = size
        self._places = {name: (offsets[name], *spec) for name, spec in layout.items()}
        # Zeroed, because kernels also read unused elements, which must be finite.
        self._host = torch.zeros(size, dtype=torch.uint8, pin_memory=page_locked)
        self._device = torch.zeros(size, dtype=torch.uint8, device=device)
        self.host = {name: _view(self._host, *place) for name, place in self._places.items()}
        self.device = {name: _view(self._device, *place) for name, place in self._places.items()}

    def copy_of_host(self) -> tuple[Callable[[], Any], dict[str, Tensor]]:
        """Return views of new memory, and a function that copies the host buffer there. Call it while the device is
        busy, so that memory is allocated, and its pages are touched, before the host waits for the copy."""
        own = torch.zeros(self.bytes, dtype=torch.uint8)
        return lambda: own.copy_(self._host), {name: _view(own, *place) for name, place in self._places.items()}

    def upload(self) -> None:
        if self.bytes:
            self._device.copy_(self._host, non_blocking=True)

    def download(self) -> None:
        if self.bytes:
            self._host.copy_(self._device, non_blocking=True)


def _view(buffer: Tensor, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return buffer[offset : offset + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
