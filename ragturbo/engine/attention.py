"""What runs the UNet's attention: by name, or the fastest this GPU has been measured to have.

`python -m ragturbo.engine.attention` times every implementation at the sizes of SD 2.1's UNet, in a CUDA graph, and
leaves the sums beside the kernels' tiles, in configs/<gpu>_attention.json, where "auto" finds them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ragturbo.errors import InvalidRequest
from ragturbo.ops import dispatch

# Tokens, tokens attended to, heads of 64 channels, and how many of them an image of 512x512 takes.
SIZES = (
    (4096, 4096, 5, 5), (4096, 77, 5, 5), (1024, 1024, 10, 5), (1024, 77, 10, 5), (256, 256, 20, 5), (256, 77, 20, 5),
    (64, 64, 20, 1), (64, 77, 20, 1),
)  # fmt: skip
NAMES = ("sdpa", "triton", "xformers")


def choose(name: str, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """What runs, and why. A name runs or raises; only "auto" chooses."""
    if name != "auto":
        why_not = dispatch.refusal("cross_attention", name, device.type, dtype)
        if why_not is not None:
            raise InvalidRequest(f"attention={name!r}: {why_not}")
        return name, "asked for"
    known = measured(device)
    able = {n: s for n, s in known.items() if dispatch.refusal("cross_attention", n, device.type, dtype) is None}
    if not able:
        return "sdpa", "torch's scaled_dot_product_attention; nothing has been measured on this machine"
    fastest = min(able, key=lambda n: able[n])
    times = ", ".join(f"{n} {1e6 * s:.0f} us" for n, s in sorted(able.items(), key=lambda item: item[1]))
    return fastest, f"measured on this GPU, all of an image's: {times}"


def measured(device: torch.device) -> dict[str, float]:
    """Seconds of all attentions of an image by implementation, as far as this kind of GPU has been measured."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return {}
    path = _file(torch.cuda.get_device_name(device))
    if not path.is_file():
        return {}
    return json.loads(path.read_text("utf-8"))["seconds"]


def race(device: str, time: Callable[[Callable[[], Any]], float]) -> dict[str, float]:
    """time: seconds of a call. What cannot run here is left out."""
    from ragturbo.model.fused import attend

    seconds: dict[str, float] = {}
    for name in NAMES:
        if dispatch.refusal("cross_attention", name, torch.device(device).type, torch.float16) is not None:
            continue
        total = 0.0
        for tokens, others, heads, count in SIZES:
            q = torch.randn(1, tokens, 64 * heads, device=device, dtype=torch.float16)
            k, v = torch.randn(2, 1, others, 64 * heads, device=device, dtype=torch.float16)
            total += count * time(lambda q=q, k=k, v=v, heads=heads, name=name: attend(q, k, v, heads, name))  # type: ignore[misc]
        seconds[name] = total
    return seconds


def _file(gpu: str) -> Path:
    from ragturbo.kernels import tiles

    return tiles.INSTALLED / tiles.file_name(gpu).replace(".json", "_attention.json")


def main() -> int:
    if not torch.cuda.is_available():
        sys.stderr.write("attention is timed on a GPU, and torch sees none here\n")
        return 4
    from ragturbo.kernels.tune import graph_seconds, machine

    with torch.inference_mode():
        seconds = race("cuda", graph_seconds)
    path = _file(torch.cuda.get_device_name())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"made_on": machine(), "seconds": seconds}, indent=1) + "\n", "utf-8")
    for name, total in sorted(seconds.items(), key=lambda item: item[1]):
        print(f"{name}: {1e6 * total:.0f} us an image")
    return 0


if __name__ == "__main__":
    sys.exit(main())
