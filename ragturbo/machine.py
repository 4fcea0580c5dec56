"""Describe the machine, software and checkout that a measurement ran on, and report GPU throttling."""

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

ROOT = Path(__file__).resolve().parents[1]
# Measured sources. A change elsewhere (docs, results) does not make a measurement stale.
SOURCES = ("ragturbo", "kernels", "csrc", "benchmarks", "setup.py", "pyproject.toml")
PACKAGES = ("torch", "triton", "diffusers", "transformers", "numpy", "scann", "faiss-cpu", "xformers", "peft")
# NVML clock event reasons: bit, name, and whether the GPU runs below its full speed.
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
# A path that starts at the root, at home or above the working folder.
_OUTSIDE = re.compile(r"(?<![\w./-])(?:~?/|\.\./)[^:,;='\"]*")


@lru_cache(maxsize=1)
def describe() -> dict[str, Any]:
    """Return what has to be stored beside a measured number: versions, checkout, CPU, GPU and memory."""
    import torch

    return {
        "ragturbo": _version("ragturbo"),
        "command": command(),
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        **checkout(),
        "machine": kind(),
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
    """Return the command line with paths relative to the working folder; paths outside of it lose their folders."""
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
    """Return the UTC time in ISO 8601 format."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def kind() -> str:
    """Return the name of this kind of machine, usable as a folder name: "nvidia-h200" or "cpu-2core"."""
    found = gpu()
    if found is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        return f"cpu-{cores}core"
    return "-".join("".join(c if c.isalnum() else " " for c in found["name"].lower()).split())


def checkout() -> dict[str, Any]:
    """Return commit, dirty flag and a digest of the sources; the digest also identifies a copy without .git."""
    commit, dirty = os.environ.get("RAGTURBO_COMMIT"), None
    # Set by the caller when a tree was copied to another machine; a copied .git may be older.
    if commit is None and (ROOT / ".git").exists():
        commit = _git("rev-parse", "HEAD")
        # Results are written while measuring, so only the measured sources count.
        status = _git("status", "--porcelain", "--", *SOURCES, ":!benchmarks/results")
        dirty = None if status is None else bool(status)
    return {"commit": commit, "dirty": dirty, "sources": sources_digest()}


@lru_cache(maxsize=1)
def sources_digest() -> str:
    """Return 12 hex digits over the sources; equal sources give the same digest in any folder."""
    digest = hashlib.sha256()
    for top in ("ragturbo", "kernels", "csrc"):
        for path in sorted((ROOT / top).rglob("*")):
            if path.suffix in (".py", ".cpp", ".hpp", ".cu") and path.is_file():
                digest.update(f"{path.relative_to(ROOT)}\0".encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def cpu_model() -> str:
    """Return the CPU's model name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "Model")):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def no_gpu_reason() -> str | None:
    """Return why torch cannot use a GPU, or None if it can."""
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    if not torch.cuda.is_available():
        return "torch found no CUDA GPU"
    return None


def gpu() -> dict[str, Any] | None:
    """Describe the first GPU as torch and the driver report it; None without a GPU."""
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
            out["power_limit_w"] = _query(lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1e3)
            out["max_sm_mhz"] = _query(lambda: nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM))
            out["max_memory_mhz"] = _query(lambda: nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_MEM))
    return out


def gpu_state() -> dict[str, Any] | None:
    """Return the current clocks, power, temperature and clock event reasons; None without NVML."""
    with _nvml() as nvml:
        if nvml is None:
            return None
        handle = _handle(nvml)
        ask = getattr(nvml, "nvmlDeviceGetCurrentClocksEventReasons", None)
        mask = _query(lambda: (ask or nvml.nvmlDeviceGetCurrentClocksThrottleReasons)(handle))
        return {
            "sm_mhz": _query(lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)),
            "memory_mhz": _query(lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM)),
            "power_w": _query(lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1e3),
            "temperature_c": _query(lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
            "reasons": None if mask is None else reason_names(mask),
        }


def reason_names(mask: int) -> list[str]:
    """Return the names of the clock event reasons set in an NVML bit mask."""
    return [name for bit, name, _ in REASONS if mask & bit]


def throttled(states: list[dict[str, Any] | None]) -> list[str]:
    """Return the reasons, over all states, for which the GPU ran below its full speed."""
    slow = {name for _, name, held_back in REASONS if held_back}
    return sorted({name for state in states if state for name in state["reasons"] or () if name in slow})


class _nvml:
    """Context manager: the initialised pynvml module, or None if NVML is not usable."""

    def __enter__(self) -> Any:
        self._open: Any = None
        try:
            import pynvml

            pynvml.nvmlInit()
        except Exception:  # no package, no driver, or a driver error: each raises its own type
            return None
        self._open = pynvml
        return pynvml

    def __exit__(self, *exception: object) -> None:
        if self._open is not None:
            self._open.nvmlShutdown()


def _handle(nvml: Any) -> Any:
    """NVML handle of torch's first GPU. NVML ignores CUDA_VISIBLE_DEVICES, so match by UUID."""
    import torch

    uuid = getattr(torch.cuda.get_device_properties(0), "uuid", None)
    if uuid is not None:
        found = _query(lambda: nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}"))
        if found is not None:
            return found
    return nvml.nvmlDeviceGetHandleByIndex(0)


def _query(query: Any) -> Any:
    """Call an NVML query; None if it is not supported (virtual machines, older GPUs)."""
    try:
        return query()
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
