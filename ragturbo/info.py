"""Data of `ragturbo info`: installed packages, available fast paths, and why a path is off.

`collect` imports what it reports on, because an installed package may still fail to import.
"""

from __future__ import annotations

import importlib
import os
import platform
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from ragturbo.machine import no_gpu_reason

PACKAGES = (
    *("torch", "triton", "diffusers", "transformers", "safetensors", "numpy", "pillow", "pyarrow"),
    *("scann", "peft", "accelerate", "open_clip_torch", "xformers"),
)


def collect() -> dict[str, Any]:
    """Return everything that `ragturbo info` prints, as JSON types."""
    from ragturbo.version import __version__

    devices = _devices()
    fast_paths = {
        "CUDA": _cuda(),
        **_native(bool(devices)),
        "Triton kernels": _on_gpu("triton", "the torch references run instead", bool(devices)),
        "ScaNN search": _importable("scann", "`auto` uses exact search, which reads every key"),
        "xformers attention": _on_gpu("xformers.ops", 'only needed for attention="xformers"', bool(devices)),
    }
    return {
        "ragturbo": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "devices": devices,
        "fast_paths": {name: {"on": on, "detail": detail} for name, (on, detail) in fast_paths.items()},
        "ops": _ops(),
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith("RAGTURBO_")},
    }


def lines(facts: dict[str, Any]) -> Iterator[str]:
    """Format the result of `collect` as text."""
    yield f"ragturbo {facts['ragturbo']}, Python {facts['python']}, {facts['platform']}"
    yield ""
    width = max(map(len, facts["packages"]))
    for name, version in facts["packages"].items():
        yield f"  {name:<{width}}  {version or 'not installed'}"
    yield ""
    for device in facts["devices"]:
        yield f"GPU: {device['name']}, {device['memory_gib']} GiB"
    if not facts["devices"]:
        yield "GPU: none"
    yield ""
    yield "Fast paths"
    width = max(map(len, facts["fast_paths"]))
    for name, path in facts["fast_paths"].items():
        yield f"  {name:<{width}}  {'on ' if path['on'] else 'off'}  {path['detail']}".rstrip()
    if facts["ops"]:
        yield ""
        yield 'Ops: what impl="auto" uses here'
        for (impl, reason, *unavailable), names in _group_by_choice(facts["ops"]).items():
            yield f"  {', '.join(names)}"
            yield f"    {impl}: {reason}"
            for why_not in unavailable:
                yield f"    not {why_not}"
    if facts["environment"]:
        yield ""
        yield "Environment variables"
        for name, value in facts["environment"].items():
            yield f"  {name}={value}"


def _group_by_choice(ops: list[dict[str, Any]]) -> dict[tuple[str, ...], list[str]]:
    """Group the ops that have the same implementation for the same reasons."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for op in ops:
        unavailable = (f"{impl}: {why}" for impl, why in op["unavailable"].items())
        groups.setdefault((op["impl"], op["reason"], *unavailable), []).append(op["op"])
    return groups


def native_reason() -> str:
    """Return why ragturbo._native is missing, as setup.py noted it or as the import fails; empty if it works."""
    note = Path(__file__).with_name("_native_off.txt")
    if note.exists():
        return note.read_text().strip()
    why_not = _import_error("ragturbo._native")
    return why_not and f"{why_not}; reinstall with RAGTURBO_NATIVE=require to see the build error"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _import_error(module: str) -> str:
    """Return why a module cannot be imported; empty if it can."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(module)
    except Exception as error:
        # A broken build can raise anything: OSError from the loader, RuntimeError from a version check.
        return f"{type(error).__name__}: {error}"
    return ""


def _importable(module: str, without: str) -> tuple[bool, str]:
    package = module.partition(".")[0]
    why_not = _import_error(module)
    return (False, f"{why_not}; {without}") if why_not else (True, f"{package} {_version(package)}")


def _on_gpu(module: str, without: str, has_gpu: bool) -> tuple[bool, str]:
    on, detail = _importable(module, without)
    return (False, f"{detail} is installed, but there is no GPU; {without}") if on and not has_gpu else (on, detail)


def _devices() -> list[dict[str, Any]]:
    if _import_error("torch"):
        return []
    import torch

    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [
        {"name": p.name, "memory_gib": round(p.total_memory / 2**30, 1), "compute": f"{p.major}.{p.minor}"}
        for p in found
    ]


def _cuda() -> tuple[bool, str]:
    if why_not := _import_error("torch") or no_gpu_reason():
        return False, why_not
    import torch

    return True, f"torch {torch.__version__}, CUDA {torch.version.cuda}"


def _native(has_gpu: bool) -> dict[str, tuple[bool, str]]:
    """Return the fast paths of the native module."""
    kernels, page_locked = "native CUDA kernels", "page-locked memory"
    if _import_error("ragturbo._native"):
        detail = f"{native_reason()}; Python code does reads, checksums and page-locked memory"
        off = (False, "the native module is off")
        return {"native module": (False, detail), kernels: off, page_locked: off}
    from ragturbo import _native

    build, arena = _native.build_info(), _native.PinnedArena(4096)
    cuda = f"built by CUDA {build['cuda']} for {build['archs']}" if build["cuda"] else build["cuda_off"]
    no_gpu = "; there is no GPU" if build["cuda"] and not has_gpu else ""
    return {
        "native module": (True, f"built by {build['compiler']}, CRC-32 by {build['crc32']}"),
        kernels: (bool(build["cuda"]) and has_gpu, cuda + no_gpu),
        page_locked: (arena.page_locked, "by the CUDA driver" if arena.page_locked else arena.reason),
    }


def _ops() -> list[dict[str, Any]]:
    if _import_error("torch"):
        return []
    from ragturbo.ops.dispatch import explain

    return [asdict(row) for row in explain()]
