"""Which implementation an op runs, and why.

A named implementation runs or raises; only `auto` chooses. Everything here is decided without touching a GPU, so that
the same answer holds under torch.compile, under FakeTensorMode and while a CUDA graph is captured.
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

# Every environment variable the ops and kernels read. Each is read once, at import.
ENVIRONMENT: dict[str, str] = {
    "RAGTURBO_IMPL": "what impl='auto' takes: one name for all ops, or 'slerp=reference,cross_attention=sdpa'",
    "RAGTURBO_KERNEL_CONFIGS": "a folder of <gpu>.json tile choices, read before the ones installed with ragturbo",
    "TRITON_INTERPRET": "1 runs the Triton kernels in Triton's CPU interpreter: for tests, thousands of times slower",
}

IMPLEMENTATIONS: dict[str, tuple[str, ...]] = {
    "slerp": ("reference", "triton"),
    "scaled_residual": ("reference", "triton"),
    "linear": ("reference", "triton"),
    "project_attention": ("reference", "triton"),
    "cross_attention": ("reference", "triton", "sdpa", "xformers", "compile"),
    "group_norm": ("reference", "triton"),
    "layer_norm": ("reference", "triton"),
    "geglu": ("reference", "triton"),
    "bias_residual": ("reference", "triton"),
    "upsample": ("reference", "triton"),
    "interleave": ("reference", "triton"),
    "softmax": ("reference", "triton"),
    "to_uint8": ("reference", "triton"),
    "gather_rows": ("reference", "triton", "cuda"),
    "topk": ("reference", "triton", "cuda"),
}


# Kernels without a backward. Where a gradient is wanted, `auto` takes the reference.
FORWARD_ONLY = frozenset(IMPLEMENTATIONS) - {"slerp", "scaled_residual", "cross_attention"}


def installed(module: str) -> bool:
    """Whether a module can be found. Finding is not importing: this stays cheap and has no side effects."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


# What the kernels read and write; they accumulate in fp32.
STORAGE = (torch.float32, torch.float16, torch.bfloat16)

HAS_TRITON = installed("triton")
HAS_XFORMERS = installed("xformers")
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def native() -> Any:
    """ragturbo._native, or None where it was not built."""
    try:
        return importlib.import_module("ragturbo._native")
    except ImportError:
        return None


def _forced(text: str) -> dict[str, str]:
    """RAGTURBO_IMPL as a table op -> implementation; the op "" stands for all."""
    table: dict[str, str] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        op, _, name = item.rpartition("=")
        if op and name not in IMPLEMENTATIONS.get(op, ()):
            raise InvalidRequest(f"RAGTURBO_IMPL={text!r}: there is no {item!r}; known: {IMPLEMENTATIONS}")
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
    if impl == "cuda":
        if not hasattr(native(), "gather_rows"):
            return "ragturbo._native was built without its CUDA part (nvcc was not there)"
        if device != "cuda":
            return f"CUDA kernels run on a GPU, the tensors are on {device!r}"
    if impl == "xformers":
        if not HAS_XFORMERS:
            return "xformers is not installed"
        if device != "cuda":
            return f"xformers' kernels run on a GPU, the tensors are on {device!r}"
    return None


def _auto(op: str, device: str, dtype: torch.dtype = torch.float16) -> tuple[str, str]:
    """What `auto` takes for `op` on `device`, and the reason."""
    name = FORCED.get(op, FORCED.get("", ""))
    if name and name in IMPLEMENTATIONS[op]:
        return name, f"RAGTURBO_IMPL={os.environ['RAGTURBO_IMPL']}"
    if device != "cuda":
        return "reference", f"the tensors are on {device!r}, and the fused kernels are for GPUs"
    why_not = refusal(op, "triton", device, dtype)
    if why_not is not None:
        return ("sdpa" if "sdpa" in IMPLEMENTATIONS[op] else "reference"), why_not
    fastest = _fastest().get(op, "triton")
    if fastest != "triton" and refusal(op, fastest, device, dtype) is None:
        return fastest, "the fastest measured on this GPU: kernels/configs"
    return "triton", "a GPU and triton are there"


_measured: dict[str, str] | None = None


def _fastest() -> dict[str, str]:
    """op -> implementation, as `python -m ragturbo.bench.fastest` noted for this GPU; empty where nothing is known."""
    global _measured
    # A compiler that traces this finds what was read before it came, and reads no file.
    if _measured is None and not torch.compiler.is_compiling():
        from ragturbo.kernels import tiles

        _measured = tiles.fastest(torch.cuda.current_device()) if torch.cuda.is_available() else {}
    return _measured or {}


def choose(
    op: str,
    impl: str,
    device: str,
    dtype: torch.dtype,
    *inputs: Tensor | None,
    limits: Mapping[str, str | None] | None = None,
) -> str:
    """The implementation that runs. Raises InvalidRequest if the one named cannot. inputs: what may want a gradient.

    limits: why an implementation cannot take these sizes, by its name. One so limited is passed over by `auto`.
    """
    limits = limits or {}
    name = _auto(op, device, dtype)[0] if impl == "auto" else impl
    if impl == "auto" and limits.get(name):
        able = [n for n in IMPLEMENTATIONS[op] if not limits.get(n) and refusal(op, n, device, dtype) is None]
        # The reference is the last resort: on a GPU it is slow, or cannot read what lies there.
        name = next((n for n in able if n != "reference"), "reference")
    if op in FORWARD_ONLY and name != "reference" and wants_grad(*inputs):
        if impl != "auto":
            raise InvalidRequest(f"{op}(impl={impl!r}) has no backward: take 'reference', or torch.no_grad()")
        return "reference"
    why_not = refusal(op, name, device, dtype) or limits.get(name)
    if why_not is not None:
        raise InvalidRequest(f"{op}(impl={impl!r}): {why_not}")
    return name


@dataclass(frozen=True)
class Explanation:
    """One line of `ragturbo info`: what `auto` takes for an op on this machine, why, and why not the others."""

    op: str
    impl: str
    reason: str
    unavailable: dict[str, str]


def explain(device: str | None = None) -> list[Explanation]:
    """What `auto` takes for every op on `device`; by default a GPU if torch sees one, else the CPU."""
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for op, names in IMPLEMENTATIONS.items():
        impl, reason = _auto(op, where)
        unavailable = {name: why for name in names if (why := refusal(op, name, where)) is not None}
        rows.append(Explanation(op, impl, reason, unavailable))
    return rows


def wants_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd would record an op on these."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The references compute in fp32 whatever the storage; fp64 stays fp64, for gradcheck."""
    return torch.float64 if dtype == torch.float64 else torch.float32
