"""What this machine reaches at best: copy bandwidth, matrix rates by dtype, host time a launch. Measured, never quoted.

Floors are computed from these. Random data throughout: matrices of zeros run faster than any real ones.

With RAGTURBO_CEILINGS=file, processes that run one after another measure once: the first writes the file, the others
read it if it was measured on this GPU (or CPU, with as many threads) and with this torch.
"""

from __future__ import annotations

import json
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from ragturbo.bench.timing import percentiles, sample, synchronized
from ragturbo.machine import cpu_model


@lru_cache(maxsize=4)
def ceilings(device: str, quick: bool = False) -> dict[str, Any]:
    """bytes_per_s (read and written both counted), flops_per_s by dtype, launch_s. `quick`: sizes for a rehearsal."""
    path = os.environ.get("RAGTURBO_CEILINGS")
    # A rehearsal's sizes are too small for anybody else's floors.
    if not path or quick:
        return measured(device, quick)
    made_on = _made_on(device)
    stored = _read(Path(path))
    if stored.get(device, {}).get("made_on") != made_on:
        stored[device] = {"made_on": made_on, "ceilings": measured(device)}
        _write(Path(path), stored)
    found: dict[str, Any] = stored[device]["ceilings"]
    return found


def _made_on(device: str) -> dict[str, Any]:
    """What the rates belong to."""
    if torch.device(device).type == "cuda":
        return {"gpu": torch.cuda.get_device_name(device), "torch": torch.__version__}
    return {"cpu": cpu_model(), "threads": torch.get_num_threads(), "torch": torch.__version__}


def _read(path: Path) -> dict[str, Any]:
    """Device -> what it was measured on, and its ceilings; empty where the file is missing or damaged."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(path: Path, stored: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Replaced whole: another process may be reading.
    half = path.with_name(f"{path.name}.{os.getpid()}")
    half.write_text(json.dumps(stored, indent=1) + "\n", "utf-8")
    os.replace(half, path)


def measured(device: str, quick: bool = False) -> dict[str, Any]:
    """As `ceilings`, measured now: under four seconds on a GPU."""
    cuda = torch.device(device).type == "cuda"
    seconds = 0.05 if quick else 0.2 if cuda else 0.3
    rates = {}
    for name, dtype, tf32 in _types(cuda):
        rates[name] = matmul_rate(device, dtype, size=_matmul_size(cuda, quick), seconds=seconds, tf32=tf32)
    return {
        "bytes_per_s": copy_rate(device, nbytes=_copy_bytes(cuda, quick), seconds=seconds),
        "flops_per_s": rates,
        "launch_s": launch_time(device),
        # What rows in page-locked memory come over.
        "link_bytes_per_s": link_rate(nbytes=_copy_bytes(cuda, quick) // 16, seconds=seconds) if cuda else None,
    }


def copy_rate(device: str, *, nbytes: int, seconds: float) -> float:
    source = torch.randint(0, 255, (nbytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)

    return 2 * nbytes / percentiles(sample(_waiting(copy, device), seconds=seconds))["p50"]


def link_rate(*, nbytes: int, seconds: float) -> float:
    """Bytes a second from page-locked host memory to the device."""
    # Drawn on the device: a CPU takes five seconds a gigabyte.
    target = torch.randint(0, 255, (nbytes,), dtype=torch.uint8, device="cuda")
    source = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True).copy_(target)
    run = synchronized(lambda: target.copy_(source, non_blocking=True))
    return nbytes / percentiles(sample(run, seconds=seconds))["p50"]


def matmul_rate(device: str, dtype: torch.dtype, *, size: int, seconds: float, tf32: bool = False) -> float:
    a, b = (torch.randn((size, size), device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        times = sample(_waiting(lambda: torch.matmul(a, b, out=out), device), seconds=seconds)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    return 2 * size**3 / percentiles(times)["p50"]


def launch_time(device: str, calls: int = 2000) -> float:
    """Host seconds of one small eager op: what a chain of modules costs where the device has less to do than that."""
    x = torch.zeros(8, device=device)

    def chain() -> None:
        for _ in range(calls):
            x.add_(1.0)

    # The queue holds about a thousand launches; past that the host waits for the device, which is no slower here.
    return percentiles(sample(_waiting(chain, device), seconds=0.05))["p50"] / calls


def _types(cuda: bool) -> list[tuple[str, torch.dtype, bool]]:
    if not cuda:
        return [("float32", torch.float32, False)]
    return [
        ("float16", torch.float16, False),
        ("bfloat16", torch.bfloat16, False),
        ("tf32", torch.float32, True),
        ("float32", torch.float32, False),
    ]


def _matmul_size(cuda: bool, quick: bool) -> int:
    return 256 if quick else 8192 if cuda else 1024


def _copy_bytes(cuda: bool, quick: bool) -> int:
    return 1 << 20 if quick else 4 << 30 if cuda else 256 << 20


def _waiting(run: Any, device: str) -> Any:
    return synchronized(run) if torch.device(device).type == "cuda" else run
