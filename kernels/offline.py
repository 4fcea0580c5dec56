"""Compiling kernels for a GPU that is not there, and reading from the machine code what they will use of it.

`python -m ragturbo.kernels.offline` compiles every kernel at its main shapes for sm_80, sm_89 and sm_90 and prints
registers, shared memory and spills. The launchers run on tensors without memory, so that what is compiled is what a GPU
would be given: the same tiles, constants and alignment.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

# Bytes of shared memory one block may ask for, by compute capability.
SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}


class AbsentGPU(DriverBase):
    """Answers what Triton's compiler asks of a driver, for one target."""

    def __init__(self, capability: int) -> None:
        super().__init__()
        self.target = GPUTarget("cuda", capability, 32)

    @staticmethod
    def is_active() -> bool:
        return False

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError("nothing is launched on a GPU that is not there")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("nothing is timed on a GPU that is not there")


@dataclass(frozen=True)
class Compiled:
    """What one kernel, compiled for one target, uses of a multiprocessor."""

    kernel: str
    capability: int
    registers: int
    shared: int
    stack: int
    spill_stores: int
    spill_loads: int
    warps: int
    constants: str

    @property
    def spills(self) -> bool:
        return self.spill_stores > 0 or self.spill_loads > 0 or self.stack > 0
