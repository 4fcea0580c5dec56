"""Choose packed weights for a CPU."""

from __future__ import annotations

import torch

from ragturbo.model import onednn


def choose(device: torch.device, dtype: torch.dtype, compiled: bool) -> tuple[bool, str]:
    """Whether weights are kept in oneDNN's layout, and why."""
    if device.type != "cpu":
        return False, "packed weights are for CPUs"
    if compiled:
        return False, "torch.compile chooses the layouts"
    if dtype not in (torch.float32, torch.bfloat16):
        return False, f"oneDNN's packed layers take float32 and bfloat16, not {dtype}"
    why_not = onednn.why_not()
    return (True, "convolutions and large linear layers in oneDNN's layout") if why_not is None else (False, why_not)
