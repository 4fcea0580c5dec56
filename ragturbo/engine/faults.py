"""Classify an engine's error: either the request failed, or the device is lost."""

from __future__ import annotations

import torch

from ragturbo.errors import DeviceLost, GenerationError, OutOfDeviceMemory, RagTurboError


def typed(error: BaseException) -> BaseException:
    """Return the error as a RagTurboError, with the original as its cause."""
    if isinstance(error, RagTurboError):
        return error
    if _out_of_memory(error):
        reason: RagTurboError = OutOfDeviceMemory(f"the device has no room for this request: {error}")
    elif _lost(error):
        reason = DeviceLost(f"the device is lost ({error}); this Generator cannot be used again: restart the process")
    else:
        reason = GenerationError(f"the step failed: {type(error).__name__}: {error}")
    reason.__cause__ = error
    return reason


def fresh(error: RagTurboError) -> RagTurboError:
    """Return a copy to raise. One exception raised by several callers would collect the tracebacks of all of them."""
    copy = type(error)(str(error))
    copy.__cause__ = error.__cause__
    return copy


def _out_of_memory(error: BaseException) -> bool:
    """Out of memory, also as reported by the driver, cuBLAS and page-locked allocations. The device stays usable."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    words = ("out of memory", "alloc_failed", "defaultcpuallocator")
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)


def _lost(error: BaseException) -> bool:
    accelerator_error = getattr(torch, "AcceleratorError", None)
    if accelerator_error is not None and isinstance(error, accelerator_error):
        return True
    # Triton and direct driver calls raise plain RuntimeErrors.
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("cuda error" in text or "illegal memory access" in text)
