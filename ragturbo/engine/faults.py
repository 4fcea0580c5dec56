"""What a failed step means: for its request alone, or for the device."""

from __future__ import annotations

import torch

from ragturbo.errors import DeviceLost, GenerationError, OutOfDeviceMemory, RagTurboError


def typed(error: BaseException) -> BaseException:
    """As one of ours, with the first as its cause."""
    if isinstance(error, RagTurboError):
        return error
    if _no_room(error):
        reason: RagTurboError = OutOfDeviceMemory(f"the device has no room for this request: {error}")
    elif _lost(error):
        reason = DeviceLost(f"the device is lost ({error}); this Generator is dead: restart the process")
    else:
        reason = GenerationError(f"the step failed: {type(error).__name__}: {error}")
    reason.__cause__ = error
    return reason


def _no_room(error: BaseException) -> bool:
    """Not torch's allocator alone: page-locked memory, the driver and cuBLAS say it in words of their own. The device
    lives on."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    words = ("out of memory", "alloc_failed", "defaultcpuallocator")
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)


def _lost(error: BaseException) -> bool:
    accelerator_error = getattr(torch, "AcceleratorError", None)
    if accelerator_error is not None and isinstance(error, accelerator_error):
        return True
    # Triton and the driver's own entries raise plain RuntimeErrors.
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("cuda error" in text or "illegal memory access" in text)
