"""Compile the kernels without a GPU and read their resource usage from the machine code.

`python -m benchmarks.compile_offline` compiles every kernel at its main shapes for sm_80, sm_89 and sm_90 and prints
registers, shared memory and spills. The launchers run on meta tensors, so tiles, constants and alignment are the same
as on a GPU.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from benchmarks.kernel_cases import CASES, FIXED_DTYPE
from ragturbo.kernels.launch import INTERPRET, replaced

# Maximum shared memory of a block in bytes, by compute capability.
SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}


class AbsentGPU(DriverBase):
    """A Triton driver for one target that can only compile."""

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
        raise NotImplementedError("there is no GPU to launch on")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("there is no GPU to time on")


@dataclass(frozen=True)
class Compiled:
    """Resource usage of one kernel for one target. Spilled registers count as stack or local.

    Args:
        load_bytes: the widest load from global memory.
        matrix: the matrix instruction, if any.
        inexact: division and square root instructions that PTX does not round correctly.
    """

    kernel: str
    capability: int
    dtype: str
    cases: tuple[str, ...]
    warps: int
    registers: int
    shared: int
    stack: int
    local: int
    load_bytes: int
    matrix: str
    inexact: tuple[str, ...]

    @property
    def spills(self) -> bool:
        return self.stack + self.local > 0

    @property
    def fits(self) -> bool:
        return self.shared <= SHARED_LIMIT[self.capability]


def cuobjdump() -> Path:
    """Return the path of the cuobjdump in Triton's wheel."""
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def resources(cubin: bytes) -> dict[str, int]:
    """Return cuobjdump's resource usage of a cubin: REG, STACK, LOCAL, SHARED and more."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(cuobjdump()), "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", text)}
    if "REG" not in found:
        raise RuntimeError(f"cuobjdump printed no register count:\n{text}")
    return found


def _widest_load(ptx: str) -> int:
    """Return the widest plain load or asynchronous copy to shared memory, in bytes."""
    plain = re.findall(r"ld\.global\S*?(?:\.v(\d))?\.b(\d+)", ptx)
    copied = re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*, (0x[0-9a-f]+|\d+)\s*,", ptx)
    widths = [int(count or 1) * int(bits) // 8 for count, bits in plain] + [int(count, 0) for count in copied]
    return max(widths, default=0)


def compile_op(op: str, dtype: torch.dtype, capability: int) -> list[Compiled]:
    """Compile every case of one op for one target; a kernel that several cases share appears once."""
    if INTERPRET:
        raise RuntimeError("TRITON_INTERPRET=1 disables compilation: unset it before Python starts")
    # This replaces the driver of the whole process.
    triton.runtime.driver.set_active(AbsentGPU(capability))
    found: dict[str, tuple[Any, list[str]]] = {}
    label = ""

    def compile_only(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]) -> None:
        compiled = kernel.warmup(*args, grid=grid, **options)
        labels = found.setdefault(compiled.hash, (compiled, []))[1]
        if label not in labels:
            labels.append(label)

    with replaced(compile_only):
        for case in CASES:
            if case.op == op:
                label = case.label
                case.make("meta", dtype)()
    return [_read(compiled, labels, dtype, capability) for compiled, labels in found.values()]


def _read(compiled: Any, labels: list[str], dtype: torch.dtype, capability: int) -> Compiled:
    used = resources(compiled.asm["cubin"])
    meta = compiled.metadata
    return Compiled(
        kernel=meta.name,
        capability=capability,
        dtype=str(dtype).removeprefix("torch."),
        cases=tuple(labels),
        warps=meta.num_warps,
        registers=used["REG"],
        shared=meta.shared,
        stack=used.get("STACK", 0),
        local=used.get("LOCAL", 0),
        load_bytes=_widest_load(compiled.asm["ptx"]),
        matrix=next((name for name in ("wgmma", "mma.sync") if name in compiled.asm["ptx"]), ""),
        inexact=tuple(
            sorted(set(re.findall(r"\b(?:div\.(?:full|approx)|r?sqrt\.approx|rcp\.approx)", compiled.asm["ptx"])))
        ),
    )


def compile_all(
    capabilities: Sequence[int], dtypes: Sequence[torch.dtype], ops: Sequence[str] = (), jobs: int | None = None
) -> list[Compiled]:
    """Compile every op (or those named) for every dtype and capability, in parallel processes."""
    names = list(dict.fromkeys(case.op for case in CASES if not ops or case.op in ops))
    tasks = [
        (op, dtype, capability)
        for op in names
        for dtype in (dtypes if op not in FIXED_DTYPE else [FIXED_DTYPE[op]])
        for capability in capabilities
    ]
    workers = min(jobs or os.cpu_count() or 1, len(tasks))
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        results = pool.map(compile_op, *zip(*tasks, strict=True))
        return [row for rows in results for row in rows]


def table(rows: Sequence[Compiled]) -> str:
    heads = "kernel", "sm", "type", "warps", "regs", "shared", "stack", "local", "load", "matrix", "cases"
    layout = "{:<26}{:>4} {:<9}{:>5}{:>5}{:>8}{:>6}{:>6}{:>5} {:<9}{}"
    lines = [layout.format(*heads)]
    for r in rows:
        mark = "".join((" SPILLS" if r.spills else "", "" if r.fits else " TOO MUCH SHARED"))
        numbers = r.warps, r.registers, r.shared, r.stack, r.local, r.load_bytes, r.matrix
        lines.append(layout.format(r.kernel, r.capability, r.dtype, *numbers, ", ".join(r.cases) + mark))
    return "\n".join(lines)


def record(rows: Sequence[Compiled]) -> dict[str, Any]:
    """Return the rows with a description of the machine and software."""
    from ragturbo.machine import describe, now

    return {"kind": "offline-compile", "datetime": now(), "context": describe(), "rows": [asdict(row) for row in rows]}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compile_offline", description=__doc__)
    parser.add_argument("--sm", type=int, nargs="+", default=[80, 89, 90], choices=sorted(SHARED_LIMIT))
    parser.add_argument("--dtype", nargs="+", default=["float16", "bfloat16", "float32"])
    parser.add_argument("--op", nargs="+", default=[], help="only these ops")
    parser.add_argument("--jobs", type=int, help="processes, by default one per core")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args(argv)
    rows = compile_all(options.sm, [getattr(torch, name) for name in options.dtype], options.op, options.jobs)
    if options.json:
        options.json.write_text(json.dumps(record(rows), indent=1, ensure_ascii=False) + "\n")
    print(table(rows))
    return 1 if any(row.spills or not row.fits for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
