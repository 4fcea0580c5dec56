"""Choice of an op's implementation.

A named implementation runs or raises; only "auto" chooses. No decision touches the GPU, so that it is the same under
torch.compile, under FakeTensorMode and during CUDA graph capture.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ragturbo.errors import InvalidRequest

# Every environment variable the ops and kernels read, once, at import.
ENVIRONMENT: dict[str, str] = {
    "RAGTURBO_IMPL": "what impl='auto' uses: one name for all ops, or 'slerp=reference,cross_attention=sdpa'",
    "RAGTURBO_KERNEL_CONFIGS": "a folder of <gpu>.json tile choices, searched before those installed with ragturbo",
    "RAGTURBO_PDL": "0 turns off programmatic dependent launch, which overlaps kernels' launches on sm_90 and newer",
    "TRITON_INTERPRET": "1 runs the Triton kernels in Triton's CPU interpreter: for tests, thousands of times slower",
}

IMPLEMENTATIONS: dict[str, tuple[str, ...]] = {
    "slerp": ("reference", "triton"),
    "scaled_residual": ("reference", "triton"),
    "linear": ("reference", "triton"),
    "project_attention": ("reference", "triton"),
    "cross_attention": ("reference", "triton", "sdpa", "xformers", "compile"),
    **dict.fromkeys(("layer_norm", "bias_residual", "upsample", "softmax", "to_uint8"), ("reference", "triton")),
    **dict.fromkeys(("group_norm", "geglu", "interleave"), ("reference", "triton", "native")),
    "gather_rows": ("reference", "triton", "cuda"),
    "topk": ("reference", "triton", "cuda"),
}
# Ops whose kernels have no backward. If a gradient is needed, "auto" uses the reference.
FORWARD_ONLY = frozenset(IMPLEMENTATIONS) - {"slerp", "scaled_residual", "cross_attention"}


def installed(module: str) -> bool:
    """Whether a module can be found, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


# Storage types of the kernels, and of the native code for CPUs; they accumulate in fp32.
STORAGE = (torch.float32, torch.float16, torch.bfloat16)
NATIVE_STORAGE = (torch.float32, torch.bfloat16)

HAS_TRITON = installed("triton")
HAS_XFORMERS = installed("xformers")
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def native() -> Any:
    """ragturbo._native, or None if it was not built."""
    try:
        return importlib.import_module("ragturbo._native")
    except ImportError:
        return None


def _forced(text: str) -> dict[str, str]:
    """RAGTURBO_IMPL as op -> implementation; the op "" means all."""
    table: dict[str, str] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        op, _, name = item.rpartition("=")
        if op and name not in IMPLEMENTATIONS.get(op, ()):
            raise InvalidRequest(f"RAGTURBO_IMPL={text!r}: unknown {item!r}; known: {IMPLEMENTATIONS}")
        table[op] = name
    return table


FORCED = _forced(os.environ.get("RAGTURBO_IMPL", ""))


def refusal(op: str, impl: str, device: str, dtype: torch.dtype = torch.float16) -> str | None:
    """Why `impl` of `op` cannot run on `device` ("cpu", "cuda") in `dtype`; None if it can."""
    known = IMPLEMENTATIONS[op]
    if impl not in known:
        return f"{op} has no implementation {impl!r}; known: {', '.join(('auto', *known))}"
    if impl == "triton":
        if not HAS_TRITON:
            return "triton is not installed"
        if device != "cuda" and not INTERPRET:
            return f"Triton kernels run on a GPU, the tensors are on {device!r} (TRITON_INTERPRET=1 interprets them)"
        if dtype not in STORAGE:
            return f"the Triton kernels store fp32, fp16 and bf16, not {dtype}"
    if impl == "native":
        if not hasattr(native(), op):
            return "ragturbo._native was not built"
        if device != "cpu":
            return f"the native code is for CPUs, the tensors are on {device!r}"
        if dtype not in NATIVE_STORAGE:
            return f"the native code stores fp32 and bf16, not {dtype}"
    if impl == "cuda":
        if not hasattr(native(), "gather_rows"):
            return "ragturbo._native was built without its CUDA part (nvcc was not found)"
        if device != "cuda":
            return f"CUDA kernels run on a GPU, the tensors are on {device!r}"
    if impl == "xformers":
        if not HAS_XFORMERS:
            return "xformers is not installed"
        if device != "cuda":
            return f"xformers' kernels run on a GPU, the tensors are on {device!r}"
    return None


def _auto(op: str, device: str, dtype: torch.dtype = torch.float16) -> tuple[str, str]:
    """What "auto" uses for `op` on `device`, and why."""
    name = FORCED.get(op, FORCED.get("", ""))
    if name and name in IMPLEMENTATIONS[op]:
        return name, f"RAGTURBO_IMPL={os.environ['RAGTURBO_IMPL']}"
    if device != "cuda":
        if "native" in IMPLEMENTATIONS[op] and device == "cpu" and dtype in NATIVE_STORAGE and hasattr(native(), op):
            return "native", "fused for CPUs in ragturbo._native"
        return "reference", f"the tensors are on {device!r}, and the fused kernels are for GPUs"
    why_not = refusal(op, "triton", device, dtype)
    if why_not is not None:
        return ("sdpa" if "sdpa" in IMPLEMENTATIONS[op] else "reference"), why_not
    fastest = _fastest().get(op, "triton")
    if fastest != "triton" and refusal(op, fastest, device, dtype) is None:
        return fastest, "the fastest measured on this GPU: kernels/configs"
    return "triton", "a GPU and triton are available"


_measured: dict[str, str] | None = None


def _fastest() -> dict[str, str]:
    """op -> implementation, as measured on this GPU by `python -m benchmarks.fastest`; empty if it was not."""
    global _measured
    # torch.compile must not trace the file access; it sees what was read before.
    if _measured is None and not torch.compiler.is_compiling():
        from ragturbo.kernels import tiles

        _measured = tiles.fastest(torch.cuda.current_device()) if torch.cuda.is_available() else {}
    return _measured or {}


def choose(
    op: str, impl: str, device: str, dtype: torch.dtype,
    *inputs: Tensor | None, limits: Mapping[str, str | None] | None = None,
) -> str:  # fmt: skip
    """The implementation that runs.

    Args:
        impl: "auto" or the name of an implementation.
        device: "cpu" or "cuda".
        inputs: tensors that may require a gradient.
        limits: implementation -> why it cannot take these sizes, or None. "auto" skips those that cannot.

    Raises:
        InvalidRequest: the named implementation cannot run.
    """
    name = _auto(op, device, dtype)[0] if impl == "auto" else impl
    if name == "native" and not (FORCED or limits or impl != "auto" or wants_grad(*inputs) or _unreadable(inputs)):
        # Every layer on a CPU comes here; the checks below take as long as a small layer.
        return name
    limits = limits or {}
    if impl == "auto" and limits.get(name):
        able = [n for n in IMPLEMENTATIONS[op] if not limits.get(n) and refusal(op, n, device, dtype) is None]
        # The reference comes last on a GPU, where it is slow or cannot read device memory at all.
        name = next((n for n in able if n != "reference" and device == "cuda"), "reference")
    if name == "native" and _unreadable(inputs):
        if impl != "auto":
            raise InvalidRequest(
                f"{op}(impl='native') reads tensors with data on the CPU, not compiled, fake or watched"
            )
        return "reference"
    if op in FORWARD_ONLY and name != "reference" and wants_grad(*inputs):
        if impl != "auto":
            raise InvalidRequest(f"{op}(impl={impl!r}) has no backward: use 'reference' or torch.no_grad()")
        return "reference"
    why_not = refusal(op, name, device, dtype) or limits.get(name)
    if why_not is not None:
        raise InvalidRequest(f"{op}(impl={impl!r}): {why_not}")
    return name


@dataclass(frozen=True)
class Explanation:
    """A line of `ragturbo info`: what "auto" uses for an op, why, and why other implementations cannot run."""

    op: str
    impl: str
    reason: str
    unavailable: dict[str, str]


def explain(device: str | None = None) -> list[Explanation]:
    """What "auto" uses for every op on `device`; by default a GPU if torch sees one, else the CPU."""
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    dtype = torch.float32 if where == "cpu" else torch.float16
    for op, names in IMPLEMENTATIONS.items():
        impl, reason = _auto(op, where, dtype)
        unavailable = {name: why for name in names if (why := refusal(op, name, where, dtype)) is not None}
        rows.append(Explanation(op, impl, reason, unavailable))
    return rows


_WITH_DATA = frozenset({Tensor, torch.nn.Parameter})


def _unreadable(inputs: tuple[Tensor | None, ...]) -> bool:
    """Whether native code cannot or must not read the inputs: they are not on the CPU, torch.compile and FakeTensorMode
    pass tensors without data, and other dispatch modes see torch's operations only."""
    # is_compiling() first: torch.compile cannot trace the second call.
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return True
    return any(x is not None and (type(x) not in _WITH_DATA or not x.is_cpu) for x in inputs)


def wants_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd would record an op on these."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32 for the references, whatever the storage; fp64 for fp64, for gradcheck."""
    return torch.float64 if dtype == torch.float64 else torch.float32
