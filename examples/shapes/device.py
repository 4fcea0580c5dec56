"""Where the recipe computes: the GPU if there is one, else the CPU. Random numbers come from the CPU on both."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Every step has the same shapes: measuring the convolutions once pays. What is not under autocast may use TF32.
torch.backends.cudnn.benchmark = True
torch.backends.cuda.matmul.allow_tf32 = True


def autocast() -> torch.autocast:
    return torch.autocast(DEVICE.type, torch.bfloat16)


def attention() -> AbstractContextManager:
    """Sixteen tokens: on a CPU the fused kernel's backward takes three times as long as plain matrix products."""
    return nullcontext() if DEVICE.type == "cuda" else sdpa_kernel(SDPBackend.MATH)


class Table:
    """Rows of a .npy file by index, as tensors on the device: kept there on a GPU, read from the file on a CPU."""

    def __init__(self, path: Path, count: int | None = None) -> None:
        # Copy on write: torch warns of arrays it may not write to.
        self.rows = torch.from_numpy(np.load(path, mmap_mode="c")[:count])
        if DEVICE.type == "cuda":
            self.rows = self.rows.to(DEVICE)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Tensor) -> Tensor:
        return self.rows[index.to(self.rows.device)].to(DEVICE)
