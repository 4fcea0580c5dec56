"""What enlarges the maps of the VAE's decoder: the faster of two ways, where this GPU has been measured.

"nearest" is nearest upsampling and a 3x3 convolution; "phases" a 2x2 convolution of the small map for each of the four
phases of the large one: 387 of an image's 2,515 GFLOP less, and sums of weights that are rounded once more.

`python -m ragturbo.engine.upsampling` times both at the sizes of an image of 512x512, in a CUDA graph, and leaves the
sums beside the kernels' tiles, in configs/<gpu>.json.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ragturbo.model.fused_vae import UPSAMPLINGS
from ragturbo.model.ties import Ties

# Channels and side of what is enlarged.
SIZES = ((512, 64), (512, 128), (256, 256))


def choose(device: torch.device) -> str:
    """A name in UPSAMPLINGS; where nothing has been measured "nearest", whose weights are the model's own."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return "nearest"
    from ragturbo.kernels import tiles

    known = {name: seconds for name, seconds in tiles.upsampling_seconds(device).items() if name in UPSAMPLINGS}
    return min(known, key=lambda name: known[name]) if known else "nearest"


def race(device: str, time: Callable[[Callable[[], Any]], float]) -> dict[str, float]:
    """time: seconds of a call. "phases" is left out where its result is another."""
    seconds = dict.fromkeys(UPSAMPLINGS, 0.0)
    for channels, side in SIZES:
        root = nn.Module()
        root.up = nn.Module()
        root.up.conv = nn.Conv2d(channels, channels, 3, padding=1, device=device, dtype=torch.float16)
        root.requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        x = torch.randn(1, channels, side, side, device=device, dtype=torch.float16)
        x = x.contiguous(memory_format=torch.channels_last)
        ways = {name: UPSAMPLINGS[name](Ties(root), "up", biased=False) for name in seconds}
        expected = ways["nearest"](x).double()
        for name, way in ways.items():
            # A NaN differs.
            if bool((way(x).double() - expected).norm() <= 1e-2 * expected.norm()):
                seconds[name] += time(lambda way=way: way(x))  # type: ignore[misc]  # noqa: B023
            else:
                del seconds[name]
    return seconds


def main(argv: Sequence[str] | None = None) -> int:
    from ragturbo.kernels import tiles

    parser = argparse.ArgumentParser(prog="python -m ragturbo.engine.upsampling", description=__doc__)
    parser.add_argument("--out", type=Path, default=tiles.INSTALLED, help="the folder of <gpu>.json")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        sys.stderr.write("upsampling is timed on a GPU, and torch sees none here\n")
        return 4
    from ragturbo.kernels.tune import graph_seconds
    from ragturbo.machine import describe

    with torch.inference_mode():
        seconds = race("cuda", graph_seconds)
    path = options.out / tiles.file_name(torch.cuda.get_device_name())
    tiles.note(path, "upsampling", tiles.made_on(describe()), upsampling=seconds)
    for name, total in sorted(seconds.items(), key=lambda item: item[1]):
        print(f"{name}: {1e6 * total:.0f} us an image")
    return 0


if __name__ == "__main__":
    sys.exit(main())
