"""What a measurement was made on: machine, software, commit, and whether the GPU was held back while it ran."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# What a result depends on. Docs and results may change without making a measurement stale.
SOURCES = ("ragturbo", "kernels", "csrc", "benchmarks", "setup.py", "pyproject.toml")
PACKAGES = ("torch", "triton", "diffusers", "transformers", "numpy", "scann", "faiss-cpu", "xformers", "peft")
# NVML's clock event reasons: bit, name, and whether it means less speed than the card could give.
REASONS = (
    (0x1, "idle", False),
    (0x2, "application clocks", False),
    (0x4, "power cap", True),
    (0x8, "hardware slowdown", True),
    (0x10, "sync boost", False),
    (0x20, "thermal slowdown", True),
    (0x40, "hardware thermal slowdown", True),
    (0x80, "power brake", True),
    (0x100, "display clocks", False),
)
NOISE_LIMIT = 0.02
ENVIRONMENT = ("OMP_NUM_THREADS", "RAGTURBO_BENCH_THREADS")
# A path that starts anywhere but here: at the root, at home or above the working folder.
_OUTSIDE = re.compile(r"(?<![\w./-])(?:~?/|\.\./)[^:,;='\"]*")


@lru_cache(maxsize=1)
def context() -> dict[str, Any]:
    """Everything about this machine and checkout that a number needs beside it."""
    import torch

    return {
        "ragturbo": _version("ragturbo"),
        "command": command(),
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        **checkout(),
        "machine": machine(),
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": _memory(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "packages": {name: v for name in PACKAGES if (v := _version(name)) is not None},
        "cuda": torch.version.cuda,
        "gpu": gpu(),
    }


def command() -> str:
    """What was typed, without where this checkout lies: paths from the working folder, of any other the name."""
    module = getattr(sys.modules["__main__"], "__spec__", None)
    if module is not None:
        program = ["python", "-m", module.name.removesuffix(".__main__")]
    elif sys.argv[0].endswith(".py"):
        program = ["python", _relative(sys.argv[0])]
    else:
        program = [Path(sys.argv[0]).name]
    return shlex.join([*program, *map(_relative, sys.argv[1:])])


def _relative(argument: str) -> str:
    def shown(match: re.Match[str]) -> str:
        path = Path(os.path.normpath(Path(match[0]).expanduser().absolute()))
        return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else path.name

    return _OUTSIDE.sub(shown, argument)


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def machine() -> str:
    """A folder's name for the kind of machine: "nvidia-h200" or "cpu-2core"."""
    found = gpu()
    if found is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        return f"cpu-{cores}core"
    return "-".join("".join(c if c.isalnum() else " " for c in found["name"].lower()).split())


def checkout() -> dict[str, Any]:
    """commit, dirty, and a digest of the sources, which also names a copy that has no .git."""
    commit, dirty = os.environ.get("RAGTURBO_COMMIT"), None
    # Whoever copies a tree to another machine knows its commit; a .git that came along may be older.
    if commit is None and (ROOT / ".git").exists():
        commit = _git("rev-parse", "HEAD")
        # Results and notes are written while measuring: only what is measured counts.
        status = _git("status", "--porcelain", "--", *SOURCES, ":!benchmarks/results")
        dirty = None if status is None else bool(status)
    return {"commit": commit, "dirty": dirty, "sources": sources_digest()}


@lru_cache(maxsize=1)
def sources_digest() -> str:
    """12 hex digits over the code that runs: equal for equal sources, wherever they lie."""
    digest = hashlib.sha256()
    for top in ("ragturbo", "kernels", "csrc"):
        for path in sorted((ROOT / top).rglob("*")):
            if path.suffix in (".py", ".cpp", ".hpp", ".cu") and path.is_file():
                digest.update(f"{path.relative_to(ROOT)}\0".encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "Model")):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def no_gpu_reason() -> str | None:
    """Why nothing here can run on a GPU; None where it can."""
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return "torch sees no CUDA GPU here"
    return None


def gpu() -> dict[str, Any] | None:
    """The first GPU as torch and the driver describe it; None without one."""
    if no_gpu_reason() is not None:
        return None
    import torch

    properties = torch.cuda.get_device_properties(0)
    out: dict[str, Any] = {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": getattr(properties, "L2_cache_size", None),
        "count": torch.cuda.device_count(),
    }
    with _nvml() as nvml:
        if nvml is not None:
            handle = _handle(nvml)
            out["driver"] = _text(nvml.nvmlSystemGetDriverVersion())
            out["power_limit_w"] = _ask(lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1e3)
            out["max_sm_mhz"] = _ask(lambda: nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM))
            out["max_memory_mhz"] = _ask(lambda: nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_MEM))
    return out


def gpu_state() -> dict[str, Any] | None:
    """Clocks, power, temperature and clock event reasons at this moment; None where NVML cannot say."""
    with _nvml() as nvml:
        if nvml is None:
            return None
        handle = _handle(nvml)
        ask = getattr(nvml, "nvmlDeviceGetCurrentClocksEventReasons", None)
        mask = _ask(lambda: (ask or nvml.nvmlDeviceGetCurrentClocksThrottleReasons)(handle))
        return {
            "sm_mhz": _ask(lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)),
            "memory_mhz": _ask(lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM)),
            "power_w": _ask(lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1e3),
            "temperature_c": _ask(lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
            "reasons": None if mask is None else reason_names(mask),
        }


def reason_names(mask: int) -> list[str]:
    return [name for bit, name, _ in REASONS if mask & bit]


def throttled(states: list[dict[str, Any] | None]) -> list[str]:
    """The reasons, over all states seen, for which the card ran slower than it could."""
    slow = {name for _, name, held_back in REASONS if held_back}
    return sorted({name for state in states if state for name in state["reasons"] or () if name in slow})


class _nvml:
    """`with _nvml() as nvml`: the library between init and shutdown, or None where there is none."""

    def __enter__(self) -> Any:
        self._open: Any = None
        try:
            import pynvml

            pynvml.nvmlInit()
        except Exception:  # no package, no driver, or a driver that refuses: each has its own error
            return None
        self._open = pynvml
        return pynvml

    def __exit__(self, *exception: object) -> None:
        if self._open is not None:
            self._open.nvmlShutdown()


def _handle(nvml: Any) -> Any:
    """torch's first GPU. CUDA_VISIBLE_DEVICES may hide others from torch, never from NVML."""
    import torch

    uuid = getattr(torch.cuda.get_device_properties(0), "uuid", None)
    if uuid is not None:
        found = _ask(lambda: nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}"))
        if found is not None:
            return found
    return nvml.nvmlDeviceGetHandleByIndex(0)


def _ask(question: Any) -> Any:
    """Virtual machines and older cards answer only some of NVML's questions."""
    try:
        return question()
    except Exception:
        return None


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
