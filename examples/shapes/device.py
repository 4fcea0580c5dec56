"""The device of the recipe: a GPU if there is one, else the CPU. Random numbers always come from the CPU."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The shapes are the same in every step.
torch.backends.cudnn.benchmark = True
torch.backends.cuda.matmul.allow_tf32 = True


def autocast() -> torch.autocast:
    return torch.autocast(DEVICE.type, torch.bfloat16)


def attention() -> AbstractContextManager:
    """With 16 tokens on a CPU, the fused kernel's backward pass takes three times as long as matrix products."""
    return nullcontext() if DEVICE.type == "cuda" else sdpa_kernel(SDPBackend.MATH)


class Table:
    """Rows of a .npy file as tensors on the device; the whole table is on the GPU if there is one."""

    def __init__(self, path: Path, count: int | None = None) -> None:
        # "c" is copy on write; torch warns about read-only arrays.
        self.rows = torch.from_numpy(np.load(path, mmap_mode="c")[:count])
        if DEVICE.type == "cuda":
            self.rows = self.rows.to(DEVICE)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Tensor) -> Tensor:
        return self.rows[index.to(self.rows.device)].to(DEVICE)
