"""Which tile sizes, warps and stages a kernel uses for a shape: measured for this GPU, or a sound default.

All that was measured of a GPU lives in configs/<gpu>.json, to which four tools add their sections:
* `python -m ragturbo.kernels.tune`: "tiles" {kernel: {shape: {name: int}}}, "microseconds" {kernel: {shape: {"tuned",
  "default"}}};
* `python -m ragturbo.bench.fastest`: "fastest" {op: {"impl", "microseconds": {impl: …}}}, what `impl="auto"` takes;
* `python -m ragturbo.engine.attention`: "attention" {impl: seconds of an image's}, what `attention="auto"` takes;
* `python -m ragturbo.engine.upsampling`: "upsampling" {name: seconds of an image's}, what the VAE's decoder takes.
"made_on" says of each tool on what and at which commit it measured.
Nothing asks the GPU's name before the first launch on it. In the interpreter and when compiling for a GPU that is not
there, defaults hold.
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
    """The file of a GPU: nvidia_h200.json for "NVIDIA H200"."""
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
    """A GPU's file, or one without an entry."""
    return _load(path) if path.is_file() else {"made_on": {}, "tiles": {}}


def note(path: Path, tool: str, machine: dict[str, Any], **sections: Any) -> None:
    """Puts a tool's sections into a GPU's file, in place of its earlier ones; those of other tools stay."""
    found = known(path)
    found |= {"made_on": {**found.get("made_on", {}), tool: machine}, **sections}
    path.parent.mkdir(parents=True, exist_ok=True)
    # Readers and a kill find the old file or the new one, never a part.
    part = path.with_name(f"{path.name}.{os.getpid()}")
    part.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    part.replace(path)


def _load(path: Path) -> dict[str, Any]:
    again = "make it anew by `python -m ragturbo.kernels.tune`"
    try:
        data = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise InvalidRequest(f"{path} is not JSON ({error}): {again}") from error
    if not isinstance(data, dict) or not isinstance(data.get("tiles"), dict):
        raise InvalidRequest(f"{path} has no tiles: {again}")
    return data


def read(path: Path) -> dict[str, dict[str, Tile]]:
    """The tiles of one file, kernel -> shape -> tile. Raises InvalidRequest, naming what is wrong."""
    found = _load(path)["tiles"]
    for kernel, shapes in found.items():
        for shape, tile in shapes.items() if isinstance(shapes, dict) else [("", shapes)]:
            if not isinstance(tile, dict) or not all(type(n) is int and n > 0 for n in tile.values()):
                raise InvalidRequest(f"{path}: the tile of {kernel!r} for {shape!r} is {tile!r}, not numbers by name")
    return found


def fastest(device: int) -> dict[str, str]:
    """op -> the implementation measured fastest on this GPU."""
    path = _file(device)
    return {op: row["impl"] for op, row in _load(path).get("fastest", {}).items()} if path else {}


def attention_seconds(device: torch.device) -> dict[str, float]:
    """implementation -> seconds of all attentions of an image, as measured on this GPU."""
    path = _file(device)
    found: dict[str, float] = _load(path).get("attention", {}) if path else {}
    return found


def upsampling_seconds(device: torch.device) -> dict[str, float]:
    """Name ("nearest", "phases") -> seconds of the VAE's upsamplers of an image, as measured on this GPU."""
    path = _file(device)
    found: dict[str, float] = _load(path).get("upsampling", {}) if path else {}
    return found


def _file(device: int | torch.device) -> Path | None:
    name = file_name(torch.cuda.get_device_name(device))
    paths = (Path(folder) / name for folder in (_OVERRIDE, INSTALLED) if folder)
    return next((path for path in paths if path.is_file()), None)


@functools.cache
def _measured(device: int) -> dict[str, dict[str, Tile]]:
    path = _file(device)
    return read(path) if path else {}


def choose(kernel: str, shape: str, device: torch.device, default: Tile) -> Tile:
    """The tile for `kernel` on `shape` (a name such as "N81920 torch.float16"): forced, measured, or the default."""
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
    """The (kernel, shape) of every tile asked for inside the block."""
    asked: list[tuple[str, str]] = []
    token = _asked.set(asked)
    try:
        yield asked
    finally:
        _asked.reset(token)


@contextmanager
def forced(kernel: str, tile: Tile) -> Iterator[None]:
    """Use `tile` for `kernel` inside the block: how the tuner tries its candidates."""
    token = _forced.set({**(_forced.get() or {}), kernel: tile})
    try:
        yield
    finally:
        _forced.reset(token)
