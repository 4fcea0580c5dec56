"""Measure this machine's copy bandwidth, matrix rates by dtype and host time per launch, for computing floors.

The data are random, because matrices of zeros are multiplied faster. With RAGTURBO_CEILINGS=file the first process
writes the file, and later ones read it if GPU (or CPU and number of threads) and torch version are the same.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from benchmarks.step_record import write_json
from benchmarks.timing import sample, synchronized
from ragturbo.bench.timing import percentiles
from ragturbo.machine import cpu_model


@lru_cache(maxsize=4)
def ceilings(device: str, quick: bool = False) -> dict[str, Any]:
    """Return bytes_per_s (reads plus writes), flops_per_s by dtype, launch_s and link_bytes_per_s.

    Args:
        quick: measure at tiny sizes, for a rehearsal; never stored.
    """
    path = os.environ.get("RAGTURBO_CEILINGS")
    if not path or quick:
        return measured(device, quick)
    made_on = _made_on(device)
    stored = _read(Path(path))
    if stored.get(device, {}).get("made_on") != made_on:
        stored[device] = {"made_on": made_on, "ceilings": measured(device)}
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_json(Path(path), stored)
    found: dict[str, Any] = stored[device]["ceilings"]
    return found


def _made_on(device: str) -> dict[str, Any]:
    if torch.device(device).type == "cuda":
        return {"gpu": torch.cuda.get_device_name(device), "torch": torch.__version__}
    return {"cpu": cpu_model(), "threads": torch.get_num_threads(), "torch": torch.__version__}


def _read(path: Path) -> dict[str, Any]:
    """Return the file's content by device; empty if it is missing or damaged."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def measured(device: str, quick: bool = False) -> dict[str, Any]:
    """Measure the ceilings now: under four seconds on a GPU."""
    cuda = torch.device(device).type == "cuda"
    seconds = 0.05 if quick else 0.2 if cuda else 0.3
    nbytes = 1 << 20 if quick else 4 << 30 if cuda else 256 << 20
    size = 256 if quick else 8192 if cuda else 1024
    types = {"float32": (torch.float32, False)}
    if cuda:
        types |= {"float16": (torch.float16, False), "bfloat16": (torch.bfloat16, False), "tf32": (torch.float32, True)}
    rates = {
        name: matmul_rate(device, dtype, size=size, seconds=seconds, tf32=tf32) for name, (dtype, tf32) in types.items()
    }
    return {
        "bytes_per_s": copy_rate(device, nbytes=nbytes, seconds=seconds),
        "flops_per_s": rates,
        "launch_s": launch_time(device),
        # Page-locked host memory to the device.
        "link_bytes_per_s": link_rate(nbytes=nbytes // 16, seconds=seconds) if cuda else None,
    }


def copy_rate(device: str, *, nbytes: int, seconds: float) -> float:
    source = torch.randint(0, 255, (nbytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)

    return 2 * nbytes / percentiles(sample(_waiting(copy, device), seconds=seconds))["p50"]


def link_rate(*, nbytes: int, seconds: float) -> float:
    """Return bytes per second from page-locked host memory to the device."""
    # Drawn on the device: a CPU takes five seconds per gigabyte.
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
    """Return the host time of one small eager op."""
    x = torch.zeros(8, device=device)

    def chain() -> None:
        for _ in range(calls):
            x.add_(1.0)

    # The host waits when about a thousand launches are queued, but the device is not slower than the host here.
    return percentiles(sample(_waiting(chain, device), seconds=0.05))["p50"] / calls


def _waiting(run: Callable[[], Any], device: str) -> Callable[[], Any]:
    return synchronized(run) if torch.device(device).type == "cuda" else run
