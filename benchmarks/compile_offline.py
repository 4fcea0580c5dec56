"""Compile the kernels without a GPU and read their resource usage from the machine code.

`python -m benchmarks.compile_offline` compiles every kernel at its main shapes for sm_80, sm_89 and sm_90 and prints
registers, shared memory, spills, resident programs and the widths of loads. The launchers run on meta tensors, so
tiles, constants and alignment are the same as on a GPU.
"""

from __future__ import annotations

import argparse
import json
import math
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

from benchmarks import machine_code
from benchmarks.kernel_cases import CASES, FIXED_DTYPE
from ragturbo.kernels.launch import INTERPRET, programmatic, replaced

# Maximum shared memory of a block in bytes, by compute capability. A multiprocessor has 1 KB more, and reserves 1 KB
# for each block.
SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# Warps and blocks of a multiprocessor. All have 65,536 registers.
WARPS = {80: 64, 86: 48, 89: 48, 90: 64, 100: 64}
BLOCKS = {80: 32, 86: 16, 89: 24, 90: 32, 100: 32}


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
        programs: of each case.
        resident: programs that fit on a multiprocessor at once.
        load_bytes: the widest load from global memory.
        code: the widths of all loads, those inside loops, and PDL instructions, from the machine code.
        matrix: the matrix instruction, if any.
        inexact: division and square root instructions that PTX does not round correctly.
    """

    kernel: str
    capability: int
    dtype: str
    cases: tuple[str, ...]
    programs: tuple[int, ...]
    warps: int
    registers: int
    shared: int
    stack: int
    local: int
    load_bytes: int
    matrix: str
    inexact: tuple[str, ...]
    resident: int
    code: machine_code.MachineCode

    @property
    def spills(self) -> bool:
        return self.stack + self.local > 0

    @property
    def fits(self) -> bool:
        return self.shared <= SHARED_LIMIT[self.capability]


def cuobjdump() -> Path:
    """Return the path of the cuobjdump in Triton's wheel."""
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def resources(cubin: bytes) -> tuple[dict[str, int], str]:
    """Return cuobjdump's resource usage of a cubin (REG, STACK, LOCAL, SHARED and more) and its machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(cuobjdump()), "--dump-resource-usage", "--dump-sass", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", text)}
    if "REG" not in found:
        raise RuntimeError(f"cuobjdump printed no register count:\n{text}")
    return found, text


def resident(capability: int, registers: int, warps: int, shared: int) -> int:
    """Return how many programs fit on a multiprocessor at once."""
    # A warp's registers are allocated in units of 256, to each of four partitions.
    per_warp = -(-registers * 32 // 256) * 256
    by_registers = 4 * (65536 // 4 // per_warp) // warps
    by_shared = (SHARED_LIMIT[capability] + 1024) // (shared + 1024)
    return min(BLOCKS[capability], WARPS[capability] // warps, by_registers, by_shared)


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
    found: dict[str, tuple[Any, dict[str, int]]] = {}
    label = ""

    def compile_only(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]) -> None:
        compiled = kernel.warmup(*args, grid=grid, **options, **programmatic(kernel, capability))
        found.setdefault(compiled.hash, (compiled, {}))[1][label] = math.prod(grid)

    with replaced(compile_only):
        for case in CASES:
            if case.op == op:
                label = case.label
                case.make("meta", dtype)()
    return [_read(compiled, programs, dtype, capability) for compiled, programs in found.values()]


def _read(compiled: Any, programs: dict[str, int], dtype: torch.dtype, capability: int) -> Compiled:
    used, sass = resources(compiled.asm["cubin"])
    meta = compiled.metadata
    return Compiled(
        kernel=meta.name,
        capability=capability,
        dtype=str(dtype).removeprefix("torch."),
        cases=tuple(programs),
        programs=tuple(programs.values()),
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
        resident=resident(capability, used["REG"], meta.num_warps, meta.shared),
        code=machine_code.read(sass),
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


def _histogram(widths: dict[int, int]) -> str:
    return " ".join(f"{count}×{width}" for width, count in widths.items()) or "-"


def table(rows: Sequence[Compiled]) -> str:
    """Return one line a variant. "a SM": resident programs; loads as count×bytes; PDL as waits/triggers/prefetches."""
    heads = "kernel", "sm", "type", "warps", "regs", "shared", "spill", "a SM", "programs", "loads", "in loops"
    layout = "{:<24}{:>3} {:<9}{:>5}{:>5}{:>8}{:>6}{:>5} {:<13}{:<18}{:<16}{:<7}{:<9}{}"
    lines = [layout.format(*heads, "PDL", "matrix", "cases")]
    for r in rows:
        mark = "".join((" SPILLS" if r.spills else "", "" if r.fits else " TOO MUCH SHARED"))
        programs = "–".join(map(str, sorted({min(r.programs), max(r.programs)})))
        numbers = r.warps, r.registers, r.shared, r.stack + r.local, r.resident, programs
        loops = "+".join(_histogram(widths) for widths in (r.code.loop_loads, r.code.outer_loads) if widths) or "-"
        pdl = f"{r.code.waits}/{r.code.triggers}/{r.code.prefetches}"
        texts = _histogram(r.code.loads), loops, pdl, r.matrix, ", ".join(r.cases) + mark
        lines.append(layout.format(r.kernel, r.capability, r.dtype, *numbers, *texts))
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
        found = record(rows)
        # One variant a line.
        lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in found.pop("rows"))
        head = json.dumps(found, indent=1, ensure_ascii=False).removesuffix("\n}")
        options.json.write_text(f'{head},\n "rows": [\n{lines}\n]\n}}\n', "utf-8")
    print(table(rows))
    return 1 if any(row.spills or not row.fits for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
