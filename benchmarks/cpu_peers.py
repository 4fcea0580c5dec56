"""`python -m benchmarks.cpu_peers`: one image on a CPU, by ragturbo and by its peers, in pairs of processes.

The two processes of a pair take turns, in AB and BA order. The result has, for each pair, both medians, the ratio of
the medians with a bootstrap interval over rounds, and how far the latents are apart. Only ratios are comparable between
machines. Everything else on the machine should be idle.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ragturbo.machine import ROOT, describe, now

OURS = "ragturbo"
PAIRS = {
    "sd21": (
        ("ragturbo", "diffusers"),
        ("ragturbo", "diffusers, bfloat16"),
        ("ragturbo", "diffusers + torch.compile, bfloat16"),
        ("ragturbo", "OpenVINO, bfloat16"),
        ("ragturbo, tiny VAE", "diffusers"),
        ("ragturbo, float32", "diffusers"),
        ("ragturbo, float32", "diffusers + torch.compile"),
        ("ragturbo, float32", "OpenVINO"),
    ),
    "shapes": (("ragturbo", "diffusers"), ("ragturbo", "diffusers + torch.compile"), ("ragturbo", "OpenVINO")),
}
PAIRS["rehearsal"] = PAIRS["sd21"]


class Process:
    """A system of benchmarks.cpu_systems, loaded and warmed up."""

    def __init__(self, system: str, model: str) -> None:
        self.system = system
        command = [sys.executable, "-m", "benchmarks.cpu_systems", system, "--model", model]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=dict(os.environ)
        )
        self._answer()

    def draw(self, seed: int) -> float:
        return float(self._ask(f"draw {seed}")["seconds"])

    def latents(self, seed: int, file: Path) -> np.ndarray:
        self._ask(f"latents {seed} {file}")
        return np.load(file)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)

    def _ask(self, line: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        # Libraries print to the standard output as well.
        for line in self._process.stdout:
            if line.startswith('{"'):
                return json.loads(line)
        raise RuntimeError(f"{self.system} ended with {self._process.wait()}; its messages are above")


def compare(ours: str, peer: str, model: str, rounds: int) -> dict[str, Any]:
    """Time both systems in turns.

    Returns:
        Seconds of both by round, `times_as_fast` with its 95 % interval, and the latents' relative difference.
    """
    first, second = Process(ours, model), Process(peer, model)
    try:
        with tempfile.TemporaryDirectory() as folder:
            a, b = (p.latents(7, Path(folder) / f"{i}.npy").astype(np.float64) for i, p in enumerate((first, second)))
        seconds: dict[str, list[float]] = {ours: [], peer: []}
        for i in range(rounds):
            for process in (first, second) if i % 2 == 0 else (second, first):
                seconds[process.system].append(process.draw(i))
    finally:
        first.close()
        second.close()
    ratio, low, high = ratio_of_medians(seconds[peer], seconds[ours])
    return {
        "ours": ours, "peer": peer, "seconds": seconds, "times_as_fast": ratio, "interval": [low, high],
        "latents_apart": float(np.linalg.norm(a - b) / np.linalg.norm(b)),
    }  # fmt: skip


def ratio_of_medians(
    above: Sequence[float], below: Sequence[float], resamples: int = 2000
) -> tuple[float, float, float]:
    """Return median(above) / median(below) and its 95 % bootstrap interval over rounds."""
    x, y = np.asarray(above), np.asarray(below)
    chosen = np.random.default_rng(0).integers(0, len(x), (resamples, len(x)))
    ratios = np.median(x[chosen], axis=1) / np.median(y[chosen], axis=1)
    low, high = np.percentile(ratios, [2.5, 97.5])
    return float(np.median(x) / np.median(y)), float(low), float(high)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu_peers", description=__doc__)
    parser.add_argument("--model", choices=list(PAIRS), default="sd21")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--pair", type=int, nargs="*", help="numbers of the pairs to run; default all")
    parser.add_argument("--out", type=Path, required=True, help="JSON file; pairs in it from an earlier run are kept")
    options = parser.parse_args(argv)
    done: list[dict[str, Any]] = json.loads(options.out.read_text("utf-8"))["pairs"] if options.out.exists() else []
    pairs = PAIRS[options.model]
    for i in range(len(pairs)) if options.pair is None else options.pair:
        ours, peer = pairs[i]
        found = compare(ours, peer, options.model, options.rounds)
        done = [row for row in done if (row["ours"], row["peer"]) != (ours, peer)] + [found]
        low, high = found["interval"]
        sys.stdout.write(
            f"{ours} is {found['times_as_fast']:.2f} [{low:.2f}, {high:.2f}] times as fast as {peer}; "
            f"latents {found['latents_apart']:.1e} apart\n"
        )
        sys.stdout.flush()
        result = {
            "kind": "peers", "datetime": now(), "context": describe(), "model": options.model,
            "what": "one image from prompt to pixels on a CPU", "pairs": done,
        }  # fmt: skip
        options.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
