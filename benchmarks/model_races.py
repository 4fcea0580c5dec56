"""Time the implementations of attention or upsampling that the engine chooses from on a GPU.

`python -m benchmarks.model_races attention|upsampling` times them in a CUDA graph at the sizes of a 512x512 image with
SD 2.1, and writes the sums to configs/<gpu>.json, where `attention="auto"` and the VAE's decoder find them. One whose
result differs is left out.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ragturbo.kernels import tiles
from ragturbo.model.fused_vae import UPSAMPLINGS
from ragturbo.model.ties import Ties
from ragturbo.ops import dispatch

log = logging.getLogger("ragturbo")

ATTENTIONS = ("sdpa", "triton", "xformers")
# Tokens, tokens attended to, heads of 64 channels, and calls per image.
ATTENTION_SIZES = (
    (4096, 4096, 5, 5), (4096, 77, 5, 5), (1024, 1024, 10, 5), (1024, 77, 10, 5), (256, 256, 20, 5), (256, 77, 20, 5),
    (64, 64, 20, 1), (64, 77, 20, 1),
)  # fmt: skip
# Channels and side of the upsampled maps.
UPSAMPLING_SIZES = ((512, 64), (512, 128), (256, 256))
# Returns seconds of one call.
Timer = Callable[[Callable[[], Any]], float]


def race(calls: dict[str, Callable[[], torch.Tensor]], expected: torch.Tensor, time: Timer) -> dict[str, float]:
    """Return name -> seconds of the calls whose result agrees with `expected`."""
    found = {}
    for name, call in calls.items():
        error = (call().double() - expected.double()).norm()
        # The summation order changes fp16 results by less than this. A NaN fails.
        if bool(error <= 1e-2 * expected.double().norm()):
            found[name] = time(call)
        else:
            log.warning("%r gives another result and is left out", name)
    return found


def add(total: dict[str, float], seconds: dict[str, float], count: int) -> dict[str, float]:
    return {name: total[name] + count * seconds[name] for name in total if name in seconds}


def attention(device: str, time: Timer) -> dict[str, float]:
    """Return seconds per image by implementation; those that cannot run here are left out."""
    from ragturbo.model.fused import attend

    kind = torch.device(device).type
    able = [n for n in ATTENTIONS if dispatch.refusal("cross_attention", n, kind, torch.float16) is None]
    total = dict.fromkeys(able, 0.0)
    for tokens, others, heads, count in ATTENTION_SIZES:
        q = torch.randn(1, tokens, 64 * heads, device=device, dtype=torch.float16)
        k, v = torch.randn(2, 1, others, 64 * heads, device=device, dtype=torch.float16)
        calls = {n: lambda n=n, q=q, k=k, v=v, heads=heads: attend(q, k, v, heads, n) for n in total}
        total = add(total, race(calls, attend(q, k, v, heads, "sdpa"), time), count)
    return total


def upsampling(device: str, time: Timer) -> dict[str, float]:
    """Return seconds per image of "nearest" and "phases"."""
    total = dict.fromkeys(UPSAMPLINGS, 0.0)
    for channels, side in UPSAMPLING_SIZES:
        root = nn.Module()
        root.up = nn.Module()
        root.up.conv = nn.Conv2d(channels, channels, 3, padding=1, device=device, dtype=torch.float16)
        root.requires_grad_(False).to(memory_format=torch.channels_last)
        x = torch.randn(1, channels, side, side, device=device, dtype=torch.float16)
        x = x.contiguous(memory_format=torch.channels_last)
        modules = {name: UPSAMPLINGS[name](Ties(root), "up", biased=False) for name in total}
        calls = {name: lambda module=module, x=x: module(x) for name, module in modules.items()}
        total = add(total, race(calls, modules["nearest"](x), time), 1)
    return total


RACES: dict[str, Callable[[str, Timer], dict[str, float]]] = {"attention": attention, "upsampling": upsampling}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.model_races", description=__doc__)
    parser.add_argument("race", choices=sorted(RACES))
    parser.add_argument("--out", type=Path, default=tiles.INSTALLED, help="the folder of <gpu>.json")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        sys.stderr.write("model_races needs a CUDA GPU\n")
        return 4
    from benchmarks.tune import graph_seconds
    from ragturbo.machine import describe

    with torch.inference_mode():
        seconds = RACES[options.race]("cuda", graph_seconds)
    path = options.out / tiles.file_name(torch.cuda.get_device_name())
    tiles.note(path, options.race, tiles.made_on(describe()), **{options.race: seconds})
    for name, total in sorted(seconds.items(), key=lambda item: item[1]):
        print(f"{name}: {1e6 * total:.0f} us per image")
    return 0


if __name__ == "__main__":
    sys.exit(main())
