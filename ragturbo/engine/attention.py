"""What runs the UNet's attention: by name, or the fastest this GPU has been measured to have.

`python -m ragturbo.engine.attention` times every implementation at the sizes of SD 2.1's UNet, in a CUDA graph, and
leaves the sums beside the kernels' tiles, in configs/<gpu>.json, where "auto" finds them.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ragturbo.errors import InvalidRequest
from ragturbo.ops import dispatch

log = logging.getLogger("ragturbo")

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
    from ragturbo.kernels import tiles

    return tiles.attention_seconds(device)


def race(device: str, time: Callable[[Callable[[], Any]], float]) -> dict[str, float]:
    """time: seconds of a call. What cannot run here, or gives another result than torch's own, is left out."""
    from ragturbo.model.fused import attend

    able = [
        n for n in NAMES if dispatch.refusal("cross_attention", n, torch.device(device).type, torch.float16) is None
    ]
    seconds = dict.fromkeys(able, 0.0)
    for tokens, others, heads, count in SIZES:
        q = torch.randn(1, tokens, 64 * heads, device=device, dtype=torch.float16)
        k, v = torch.randn(2, 1, others, 64 * heads, device=device, dtype=torch.float16)
        expected = attend(q, k, v, heads, "sdpa")
        for name in list(seconds):
            if name != "sdpa" and _differs(attend(q, k, v, heads, name), expected):
                log.warning("attention %r gives another result at %d x %d tokens and is out", name, tokens, others)
                del seconds[name]
                continue
            seconds[name] += count * time(lambda name=name: attend(q, k, v, heads, name))  # type: ignore[misc]  # noqa: B023
    return seconds


def _differs(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Beyond what another order of summation rounds to in fp16; a NaN differs."""
    difference = (found.double() - expected.double()).norm()
    return not bool(difference <= 1e-2 * expected.double().norm())


def main(argv: Sequence[str] | None = None) -> int:
    from ragturbo.kernels import tiles

    parser = argparse.ArgumentParser(prog="python -m ragturbo.engine.attention", description=__doc__)
    parser.add_argument("--out", type=Path, default=tiles.INSTALLED, help="the folder of <gpu>.json")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        sys.stderr.write("attention is timed on a GPU, and torch sees none here\n")
        return 4
    from ragturbo.kernels.tune import graph_seconds
    from ragturbo.machine import describe

    with torch.inference_mode():
        seconds = race("cuda", graph_seconds)
    path = options.out / tiles.file_name(torch.cuda.get_device_name())
    tiles.note(path, "attention", tiles.made_on(describe()), attention=seconds)
    for name, total in sorted(seconds.items(), key=lambda item: item[1]):
        print(f"{name}: {1e6 * total:.0f} us an image")
    return 0


if __name__ == "__main__":
    sys.exit(main())
