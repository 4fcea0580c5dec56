"""Tile sizes, warps and stages of a kernel for a shape: tuned for this GPU, or the launcher's default.

Measurements of a GPU are stored in configs/<gpu>.json. Four tools write their sections there:
* `python -m benchmarks.tune`: "tiles" {kernel: {shape: {name: int}}}, "microseconds" {kernel: {shape: {"tuned",
  "default"}}};
* `python -m benchmarks.fastest`: "fastest" {op: {"impl", "microseconds": {impl: …}}}, used by `impl="auto"`;
* `python -m benchmarks.model_races attention`: "attention" {impl: seconds per image}, used by `attention="auto"`;
* `python -m benchmarks.model_races upsampling`: "upsampling" {name: seconds per image}, used by the VAE's decoder.
"made_on" records each tool's machine and commit. The GPU's name is not queried before the first launch on it. The
interpreter and offline compilation use the defaults.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch

from ragturbo.errors import InvalidRequest

Tile = dict[str, int]

INSTALLED = Path(__file__).parent / "configs"
_OVERRIDE = os.environ.get("RAGTURBO_KERNEL_CONFIGS")

_asked: ContextVar[list[tuple[str, str]] | None] = ContextVar("ragturbo_asked_tiles", default=None)
_forced: ContextVar[dict[str, Tile] | None] = ContextVar("ragturbo_forced_tiles", default=None)


def power_of_2(n: int, least: int = 1) -> int:
    """The smallest power of two that is at least n and at least `least`."""
    return max(least, 1 << max(0, n - 1).bit_length())


def file_name(gpu: str) -> str:
    """nvidia_h200.json for "NVIDIA H200"."""
    return re.sub(r"[^a-z0-9]+", "_", gpu.lower()).strip("_") + ".json"


def made_on(context: dict[str, Any]) -> dict[str, Any]:
    """Return the part of `ragturbo.machine.describe()` that a choice of tiles or implementations depends on."""
    gpu, packages = context["gpu"], context.get("packages", {})
    return {
        "gpu": gpu["name"],
        **{name: gpu.get(name) for name in ("capability", "driver", "power_limit_w")},
        **{name: context.get(name) for name in ("commit", "dirty", "sources", "cuda")},
        **{name: packages.get(name) for name in ("torch", "triton")},
    }


def known(path: Path) -> dict[str, Any]:
    """The contents of a GPU's file, or those of an empty one."""
    return _load(path) if path.is_file() else {"made_on": {}, "tiles": {}}


def note(path: Path, tool: str, machine: dict[str, Any], **sections: Any) -> None:
    """Replace a tool's sections in a GPU's file; other tools' sections are kept."""
    found = known(path)
    found |= {"made_on": {**found.get("made_on", {}), tool: machine}, **sections}
    path.parent.mkdir(parents=True, exist_ok=True)
    # Written under another name and renamed, so that a reader never sees a partial file, even after a kill.
    part = path.with_name(f"{path.name}.{os.getpid()}")
    part.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    part.replace(path)


def _load(path: Path) -> dict[str, Any]:
    again = "recreate it with `python -m benchmarks.tune`"
    try:
        data = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise InvalidRequest(f"{path} is not JSON ({error}): {again}") from error
    if not isinstance(data, dict) or not isinstance(data.get("tiles"), dict):
        raise InvalidRequest(f"{path} has no tiles: {again}")
    return data


def read(path: Path) -> dict[str, dict[str, Tile]]:
    """The tiles of one file: kernel -> shape -> tile. Raises InvalidRequest if an entry is malformed."""
    found = _load(path)["tiles"]
    for kernel, shapes in found.items():
        for shape, tile in shapes.items() if isinstance(shapes, dict) else [("", shapes)]:
            if not isinstance(tile, dict) or not all(type(n) is int and n > 0 for n in tile.values()):
                raise InvalidRequest(f"{path}: the tile of {kernel!r} for {shape!r} is {tile!r}, not integers by name")
    return found


def _section(device: int | torch.device, name: str) -> dict[str, Any]:
    path = _file(device)
    return _load(path).get(name, {}) if path else {}


def fastest(device: int) -> dict[str, str]:
    """op -> the implementation measured fastest on this GPU."""
    return {op: row["impl"] for op, row in _section(device, "fastest").items()}


def attention_seconds(device: torch.device) -> dict[str, float]:
    """implementation -> seconds of all attention layers of one image, as measured on this GPU."""
    return _section(device, "attention")


def upsampling_seconds(device: torch.device) -> dict[str, float]:
    """Name ("nearest", "phases") -> seconds of the VAE's upsamplers for one image, as measured on this GPU."""
    return _section(device, "upsampling")


def _file(device: int | torch.device) -> Path | None:
    name = file_name(torch.cuda.get_device_name(device))
    paths = (Path(folder) / name for folder in (_OVERRIDE, INSTALLED) if folder)
    return next((path for path in paths if path.is_file()), None)


@functools.cache
def _measured(device: int) -> dict[str, dict[str, Tile]]:
    path = _file(device)
    return read(path) if path else {}


def choose(kernel: str, shape: str, device: torch.device, default: Tile) -> Tile:
    """The tile of `kernel` for `shape` (such as "N81920 torch.float16"): forced, tuned, or the default."""
    asked = _asked.get()
    if asked is not None:
        asked.append((kernel, shape))
    forced = _forced.get()
    if forced is not None and kernel in forced:
        return {**default, **forced[kernel]}
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        return {**default, **_measured(index).get(kernel, {}).get(shape, {})}
    return default


@contextmanager
def recorded() -> Iterator[list[tuple[str, str]]]:
    """The (kernel, shape) of every `choose` inside the block."""
    asked: list[tuple[str, str]] = []
    token = _asked.set(asked)
    try:
        yield asked
    finally:
        _asked.reset(token)


@contextmanager
def forced(kernel: str, tile: Tile) -> Iterator[None]:
    """Use `tile` for `kernel` inside the block, for the tuner and tests."""
    token = _forced.set({**(_forced.get() or {}), kernel: tile})
    try:
        yield
    finally:
        _forced.reset(token)
