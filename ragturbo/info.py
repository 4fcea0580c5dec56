"""What `ragturbo info` says: what is installed, which fast paths are on, and why one is off.

Light to import. `collect` really imports what it reports on: being found on disk is not the same as working.
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

PACKAGES = (
    "torch",
    "triton",
    "diffusers",
    "transformers",
    "safetensors",
    "numpy",
    "pillow",
    "pyarrow",
    "scann",
    "bm25s",
    "peft",
    "accelerate",
    "open_clip_torch",
    "xformers",
)


def collect() -> dict[str, Any]:
    """Everything `ragturbo info` prints, as plain values that json can write."""
    from ragturbo import __version__

    return {
        "ragturbo": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "devices": _devices(),
        "fast_paths": {
            name: {"on": on, "detail": detail}
            for name, (on, detail) in {
                "CUDA": _cuda(),
                "native module": _native(),
                "native CUDA kernels": _native_cuda(),
                "page-locked memory": _page_locked(),
                "Triton kernels": _triton(),
                "ScaNN search": _module("scann", "`auto` takes exact search, which reads every key"),
                "xformers attention": _xformers(),
            }.items()
        },
        "ops": _ops(),
        "environment": _environment(),
    }


def lines(facts: dict[str, Any]) -> Iterator[str]:
    """The same for people."""
    yield f"ragturbo {facts['ragturbo']}, Python {facts['python']}, {facts['platform']}"
    yield ""
    width = max(map(len, facts["packages"]))
    for name, version in facts["packages"].items():
        yield f"  {name:<{width}}  {version or 'not installed'}"
    yield ""
    for device in facts["devices"] or [{"name": "none", "memory_gib": 0}]:
        memory = f", {device['memory_gib']} GiB" if device["memory_gib"] else ""
        yield f"GPU: {device['name']}{memory}"
    yield ""
    yield "Fast paths"
    width = max(map(len, facts["fast_paths"]))
    for name, path in facts["fast_paths"].items():
        yield f"  {name:<{width}}  {'on ' if path['on'] else 'off'}  {path['detail']}".rstrip()
    if facts["ops"]:
        yield ""
        yield 'Ops: what impl="auto" takes here'
        for choice, names in _same_choice(facts["ops"]).items():
            impl, reason, *unavailable = choice
            yield f"  {', '.join(names)}"
            yield f"    {impl}: {reason}"
            for why_not in unavailable:
                yield f"    not {why_not}"
    if facts["environment"]:
        yield ""
        yield "Environment variables set"
        for name, value in facts["environment"].items():
            yield f"  {name}={value}"


def _same_choice(ops: list[dict[str, Any]]) -> dict[tuple[str, ...], list[str]]:
    """Ops by what is said of them: most have the same reasons."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for op in ops:
        unavailable = (f"{impl}: {why}" for impl, why in op["unavailable"].items())
        groups.setdefault((op["impl"], op["reason"], *unavailable), []).append(op["op"])
    return groups


def native_reason() -> str:
    """Why there is no ragturbo._native: what the installation noted down, or what importing it says."""
    note = Path(__file__).with_name("_native_off.txt")
    if note.exists():
        return note.read_text().strip()
    try:
        importlib.import_module("ragturbo._native")
    except ImportError as error:
        return f"{error}; reinstall with RAGTURBO_NATIVE=require to see why it does not build"
    return ""


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _failure(module: str) -> str:
    """Why a module cannot be imported; empty if it can."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(module)
    except Exception as error:
        # A broken build can raise anything (OSError from the loader, RuntimeError from a version check).
        return f"{type(error).__name__}: {error}"
    return ""


def _module(name: str, without: str) -> tuple[bool, str]:
    why_not = _failure(name)
    return (False, f"{why_not}; {without}") if why_not else (True, f"{name} {_version(name) or ''}".strip())


def _devices() -> list[dict[str, Any]]:
    if _failure("torch"):
        return []
    import torch

    if not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [
        {"name": p.name, "memory_gib": round(p.total_memory / 2**30, 1), "compute": f"{p.major}.{p.minor}"}
        for p in found
    ]


def _cuda() -> tuple[bool, str]:
    if why_not := _failure("torch"):
        return False, why_not
    import torch

    if torch.cuda.is_available():
        return True, f"torch {torch.__version__}, CUDA {torch.version.cuda}"
    if torch.version.cuda is None:
        return False, f"torch {torch.__version__} was built without CUDA"
    return False, f"torch {torch.__version__} (CUDA {torch.version.cuda}) sees no GPU"


def _native() -> tuple[bool, str]:
    if _failure("ragturbo._native"):
        return False, f"{native_reason()}; reads, checksums and page-locked memory take the Python paths"
    from ragturbo import _native

    build = _native.build_info()
    return True, f"built by {build['compiler']}, CRC-32 by {build['crc32']}"


def _native_cuda() -> tuple[bool, str]:
    if _failure("ragturbo._native"):
        return False, "the native module is off"
    from ragturbo import _native

    build = _native.build_info()
    if not build["cuda"]:
        return False, build["cuda_off"]
    built = f"built by CUDA {build['cuda']} for {build['archs']}"
    return (True, built) if _devices() else (False, f"{built}; no GPU to run them on")


def _page_locked() -> tuple[bool, str]:
    if _failure("ragturbo._native"):
        return False, "the native module is off"
    from ragturbo import _native

    arena = _native.PinnedArena(4096)
    return arena.page_locked, "through the CUDA driver" if arena.page_locked else arena.reason


def _triton() -> tuple[bool, str]:
    on, detail = _module("triton", "the torch references run instead")
    if on and not _devices():
        return False, f"{detail} is installed, but there is no GPU; the torch references run instead"
    return on, detail


def _xformers() -> tuple[bool, str]:
    on, detail = _module("xformers.ops", "not needed: an attention backend asked for by name")
    if not on:
        return on, detail
    detail = f"xformers {_version('xformers')}"
    return (True, detail) if _devices() else (False, f"{detail} is installed, but there is no GPU")


def _ops() -> list[dict[str, Any]]:
    if _failure("torch"):
        return []
    from ragturbo.ops.dispatch import explain

    return [asdict(row) for row in explain()]


def _environment() -> dict[str, str]:
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith("RAGTURBO_")}
