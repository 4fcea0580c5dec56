"""The single entry point for launching Triton kernels, which can also count them or only compile them."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

# Triton's decorators read this when the kernels are imported; it cannot change later.
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"

# Programmatic dependent launch, where the GPU has it: see pdl.py.
PDL = os.environ.get("RAGTURBO_PDL") != "0"

Runner = Callable[[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]], None]


def programmatic(kernel: Any, capability: int) -> dict[str, bool]:
    """The options of programmatic dependent launch for `kernel` on sm_<capability>; 0 in the interpreter."""
    if "PDL" not in kernel.arg_names:
        return {}
    # The attribute alone would allow an early launch of a kernel that does not wait.
    return {"PDL": True, "launch_pdl": True} if PDL and capability >= 90 else {"PDL": False}


@functools.cache
def _capability(device: int) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _run(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]) -> None:
    # Triton launches on the current device, whatever device the tensors are on.
    device = args[0].device
    options = {**options, **programmatic(kernel, _capability(device.index) if device.type == "cuda" else 0)}
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*args, **options)
    else:
        kernel[grid](*args, **options)


_runner: ContextVar[Runner] = ContextVar("ragturbo_kernel_runner", default=_run)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, fuse_multiply_add: bool = True, **options: Any) -> None:
    """Launch `kernel` over `grid`.

    Args:
        args: the kernel's arguments; the first is a tensor.
        fuse_multiply_add: contract a·b + c to an FMA: faster and more accurate, but not bit-identical to a library that
            rounds twice. Set explicitly because Triton's default changes between releases.
        options: the kernel's constexprs except PDL, num_warps, num_stages.
    """
    _runner.get()(kernel, grid, args, {**options, "enable_fp_fusion": fuse_multiply_add})


@contextmanager
def counted() -> Iterator[list[str]]:
    """The names of the kernels launched inside the block, in order."""
    names: list[str] = []
    inner = _runner.get()

    def count(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]) -> None:
        names.append(kernel.__name__)
        inner(kernel, grid, args, options)

    with replaced(count):
        yield names


@contextmanager
def replaced(runner: Runner) -> Iterator[None]:
    """Call `runner` for every launch inside the block, instead of launching."""
    token = _runner.set(runner)
    try:
        yield
    finally:
        _runner.reset(token)
