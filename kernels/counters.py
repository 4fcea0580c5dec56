"""Counters in device memory that kernels find at zero and leave at zero, for split-K.

A kernel recorded in a CUDA graph gets counters of its own, which nothing else uses: no launch has to zero them before
each run, because the last program to arrive resets them, and a graph never runs beside itself. Eager calls may overlap
on several streams, so each gets new ones.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

# Counters per device for all recordings of a process: 80 for each adapter at SD 2.1's width.
RECORDED = 1 << 14

_lock = threading.Lock()
_memory: dict[torch.device, Tensor] = {}
_used: dict[torch.device, int] = {}


def zeros(n: int, device: torch.device) -> Tensor:
    """n int32 zeros on `device`. The kernel has to leave them at zero."""
    if device.type != "cuda":
        return torch.zeros(n, dtype=torch.int32, device=device)
    capturing = torch.cuda.is_current_stream_capturing()
    with _lock:
        if not capturing and device not in _memory:
            # Outside of a capture, so that it is not part of a graph's memory. Graphs are recorded after a warm-up.
            _memory[device] = torch.zeros(RECORDED, dtype=torch.int32, device=device)
            torch.cuda.current_stream(device).synchronize()
        first = _used.get(device, 0)
        if capturing and device in _memory and first + n <= RECORDED:
            _used[device] = first + n
            return _memory[device][first : first + n]
    return torch.zeros(n, dtype=torch.int32, device=device)
