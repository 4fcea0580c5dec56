"""Predict the time of each operation of an image on a GPU, from bytes, FLOPs, launches, latency and L2 residency.

`python -m benchmarks.cost_model` checks the model against what was measured on an H200 at commit 2f5dd0b, prints the
error of each figure, and predicts the current code. `--json FILE` writes both: predictions are to be committed before a
GPU run that could refute them. The operations are those of results/operations.json (`benchmarks.operations`).

The time of a kernel is the larger of its memory and matrix time, plus FIXED: the launch, one round trip to memory and
the drain. Tensors of at most half of L2 are read and written at L2's rate, weights always come from memory. A matrix
product occupies whole multiprocessors with tiles, split along K where there are too few. The constants below were
chosen on the measured figures, so their errors are residuals of a fit, and a prediction's error is larger.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.roofline import MACHINES, Machine, group_norm

RESULTS = Path(__file__).parent / "results"
BEFORE = "2f5dd0b65"

# Seconds of a kernel beyond its work: layer_norm's average of 2.5 to 3.1 µs, less its bytes.
FIXED = 2.3e-6
# Matrix products start and end with more: tensor maps, a deep pipeline, an epilogue.
FIXED_PRODUCT = 3.9e-6
# Between two dependent nodes of a graph, and what remains of both if the second is launched early.
GAP, GAP_EARLY, SAVED_EARLY = 0.35e-6, 0.1e-6, 0.8e-6
# Shares of the datasheets' rates that kernels reach.
STREAM, L2_RATE = 0.90, 5.5e12
# Tile -> share of a multiprocessor's matrix rate.
TILES = {(256, 128): 0.72, (128, 256): 0.72, (128, 128): 0.66, (128, 64): 0.5, (64, 128): 0.5, (64, 64): 0.38}
ATTENTION, WIDE_ATTENTION = 0.30, 0.105
L2 = {"H100": 50e6, "H200": 60e6}
PROCESSORS = 132
# A program of our linear layers copies tiles of both operands to shared memory, this many bytes ahead.
LATENCY, AHEAD, OLD_AHEAD = 1.2e-6, 96 * 1024, 48 * 1024
# At 2f5dd0b: the statistics loop exchanged sums between threads for every 8 KB tile, the one-launch form looped twice,
# and torch upsampled.
OLD_STATISTICS, OLD_STATISTICS_RATE, OLD_ONE_LAUNCH, OLD_UPSAMPLE = 5e-6, 0.85e12, 4.6e-6, 0.08


@dataclass(frozen=True)
class Gpu:
    machine: Machine
    l2: float

    def memory(self, *sizes: float) -> float:
        """Return the seconds to read or write activations of these sizes."""
        rates = (L2_RATE if size <= self.l2 / 2 else self.machine.bandwidth * STREAM for size in sizes)
        return sum(size / rate for size, rate in zip(sizes, rates, strict=True))

    def weights(self, size: float) -> float:
        return size / (self.machine.bandwidth * STREAM)

    def product(self, m: int, n: int, k: int) -> float:
        """Return the seconds of the multiply-adds of (m, k) times (k, n), by the best of TILES."""

        def tiled(rows: int, columns: int, share: float) -> float:
            tiles = math.ceil(m / rows) * math.ceil(n / columns)
            splits = max(1, min(PROCESSORS // tiles, k // 512)) if tiles < PROCESSORS else 1
            waves = math.ceil(tiles * splits / PROCESSORS)
            return waves * 2 * rows * columns * k / splits / (self.machine.flops / PROCESSORS * share)

        return min(tiled(*tile, share) for tile, share in TILES.items())


GPUS = {name: Gpu(MACHINES[name], L2[name]) for name in L2}


@dataclass(frozen=True)
class Cost:
    """Seconds on the device of one call, launches, and by how much an early launch shortens it."""

    seconds: float
    launches: int = 1

    def total(self, after_ours: bool, early: bool) -> float:
        """Return the seconds with the gaps before its launches; `early`: with programmatic dependent launch."""
        chained = self.launches - (0 if after_ours else 1) if early else 0
        rest = self.launches - chained
        return self.seconds + rest * GAP + chained * (GAP_EARLY - SAVED_EARLY)


def _shape(row: dict[str, Any]) -> list[int]:
    return [int(n) for n in row["shape"].split("x")] if row["shape"] else []


def group_norm_forms(row: dict[str, Any], old: bool) -> int:
    """Return the number of launches of a GroupNorm, 32 groups, batch 1."""
    _, channels, *sides = _shape(row)
    pixels = math.prod(sides)
    if old:
        return 1 if pixels <= 512 else 3
    return group_norm(1, channels, pixels).launches


def cost(row: dict[str, Any], gpu: Gpu, old: bool) -> Cost:
    """Return the cost of one call of an operation. old: as at 2f5dd0b."""
    op, read, weights, written, flops = (row[name] for name in ("op", "read", "weights", "written", "flops"))
    moved = gpu.memory(read, written)
    if op == "ragturbo::group_norm":
        launches = group_norm_forms(row, old)
        if launches == 1:
            return Cost(FIXED + moved + (OLD_ONE_LAUNCH if old else 0.6e-6), 1)
        # Both passes over the rows are bound by memory now, the second finds part of a large map in L2.
        statistics = OLD_STATISTICS + read / OLD_STATISTICS_RATE if old else gpu.memory(read)
        return Cost(launches * FIXED + statistics + moved, launches)
    if op.startswith("aten::conv"):
        k = round(flops / written)
        n = max(1, weights // 2 // k)
        seconds = max(gpu.product(written // 2 // n, n, k), moved + gpu.weights(weights)) + FIXED_PRODUCT
        # torch adds a convolution's bias in a launch of its own.
        biased = weights // 2 != n * k
        return Cost(seconds + (FIXED + gpu.memory(written, written) if biased else 0), 2 if biased else 1)
    if op in ("ragturbo::linear", "ragturbo::project_attention"):
        return _our_product(row, gpu, old)
    if op == "aten::addmm_":
        m, n = _shape(row)
        seconds = max(gpu.product(m, n, round(flops / 2 / m / n)), gpu.weights(weights))
        return Cost(seconds + moved + FIXED_PRODUCT)
    if op.startswith("aten::bmm"):
        seconds = max(flops / (gpu.machine.flops * TILES[128, 128]), moved)
        return Cost(seconds + FIXED_PRODUCT)
    if "linear" in op:
        k = _shape(row)[-1]
        seconds = max(gpu.product(math.prod(_shape(row)[:-1]), max(1, weights // 2 // k), k), gpu.weights(weights))
        return Cost(seconds + moved + FIXED_PRODUCT)
    if "attention" in op:
        wide = _shape(row)[-1] >= 512 and op.startswith("aten")
        share = WIDE_ATTENTION if wide else ATTENTION
        seconds = max(flops / (gpu.machine.flops * share), gpu.weights(weights)) + moved
        return Cost(seconds + FIXED_PRODUCT)
    if "upsample" in op and op.startswith("aten"):
        return Cost(FIXED + (read + written) / (gpu.machine.bandwidth * OLD_UPSAMPLE))
    return Cost(FIXED + moved + gpu.weights(weights))


def _our_product(row: dict[str, Any], gpu: Gpu, old: bool) -> Cost:
    """Few rows, as in the adapter: a program streams its columns' weights and all rows through shared memory."""
    *_, k = _shape(row)
    m, n = math.prod(_shape(row)[:-1]), row["weights"] // 2 // k
    split = 4 if k >= 4096 else 1
    geglu = row["op"] == "ragturbo::linear" and row["written"] // 2 // m < n and k < 4096
    columns = 64 if split > 1 or geglu else 32 if old or n > 2048 else 16
    programs = math.ceil(n / columns) * split * math.ceil(m / 64)
    # Programs that share a multiprocessor share its time.
    waves = max(1.0, programs / PROCESSORS)
    streamed = (columns + min(m, 64)) * k / split * 2
    seconds = max(streamed * waves / ((OLD_AHEAD if old else AHEAD) / LATENCY), gpu.weights(row["weights"]))
    # LayerNorm was part of the product, which read its rows once more.
    normed = min(m, 64) * k * 2 / (OLD_AHEAD / LATENCY) if old and (n > 2048 or "project" in row["op"]) else 0.0
    attention = FIXED if "project" in row["op"] else 0.0
    # The sum of the shares, and at 2f5dd0b a launch that zeroed counters.
    zeroed = old and split > 1
    shares = (FIXED if split > 1 else 0.0) + (FIXED if zeroed else 0.0)
    return Cost(seconds + normed + attention + shares + FIXED_PRODUCT, 2 if zeroed else 1)


def predict(rows: Sequence[dict[str, Any]], gpu: Gpu, *, old: bool, early: bool) -> dict[str, dict[str, float]]:
    """Return {"stages": seconds of each stage, "ops": seconds of each kind of operation}."""
    stages: defaultdict[str, float] = defaultdict(float)
    ops: defaultdict[str, float] = defaultdict(float)
    for row in rows:
        ours = row["op"].startswith("ragturbo::")
        seconds = row["count"] * cost(row, gpu, old).total(row["after_ours"] and ours, early and ours)
        stages[row["stage"] or "rest"] += seconds
        ops[row["op"].split("::")[1].split(".")[0]] += seconds
    return {"stages": dict(stages), "ops": dict(ops)}


def measured(results: Path = RESULTS) -> dict[str, float]:
    """Return the seconds measured at BEFORE: stages of an image, and a call's average of kernels in its trace."""
    steps = json.loads((results / "h200" / "engine.json").read_text("utf-8"))["steps"]
    image = steps["image"]
    found = {stage: image["stages"][stage] for stage in ("text", "encode", "adapter", "decode", "vae")}
    trace = image["trace_of_3_images"]
    for stream, place in ((str(trace["main stream"]), "text to vae"), ("180", "encode")):
        for row in trace["streams"][stream]["costliest"]:
            if row["name"] in KERNELS or row["name"].startswith("void at::native::(anonymous namespace)::upsample"):
                name = row["name"] if row["name"] in KERNELS else "upsample"
                found[f"{name}, {place}"] = row["us"] * 1e-6 / row["calls"]
    found["unet"] = steps["parts"]["measured"]["unet_s"]
    return found | {"image": image["alone"]["p50"], "device": sum(image["stages"][stage] for stage in DEVICE)}


# Stages that run on the device, and kernels of the trace -> the operation and the launch of it.
DEVICE = "text", "gather", "encode", "adapter", "decode", "vae"
KERNELS = {
    "layer_norm": "ragturbo::layer_norm", "bias_residual": "ragturbo::bias_residual", "group_norm": "one",
    "group_norm_partial": "partial", "group_norm_apply": "apply",
}  # fmt: skip
PLACES = {"text to vae": ("text", "gather", "adapter", "decode", "vae"), "encode": ("encode",)}


def _average(rows: Sequence[dict[str, Any]], kernel: str, place: str, gpu: Gpu) -> float:
    """Return a kernel's modelled average at BEFORE, as in the trace: without gaps."""
    seconds, calls = 0.0, 0
    for row in rows:
        launches = group_norm_forms(row, True) if row["op"] == "ragturbo::group_norm" else 0
        if row["stage"] not in PLACES[place]:
            continue
        if kernel == "upsample" and "upsample" in row["op"] or KERNELS.get(kernel) == row["op"]:
            each = cost(row, gpu, True).seconds
        elif kernel == "group_norm" and launches == 1:
            each = cost(row, gpu, True).seconds
        elif kernel == "group_norm_partial" and launches == 3:
            each = FIXED + OLD_STATISTICS + row["read"] / OLD_STATISTICS_RATE
        elif kernel == "group_norm_apply" and launches == 3:
            each = FIXED + gpu.memory(row["read"], row["written"])
        else:
            continue
        seconds, calls = seconds + row["count"] * each, calls + row["count"]
    return seconds / calls


def check(lists: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Compare the model with each measured figure of an H200 at BEFORE."""
    rows, gpu = lists[BEFORE], GPUS["H200"]
    stages = predict(rows, gpu, old=True, early=False)["stages"]
    out = []
    for figure, seconds in measured().items():
        if figure == "image":
            continue
        kernel, _, place = figure.partition(", ")
        if figure in ("device", "unet"):
            modelled = sum(stages[stage] for stage in (DEVICE if figure == "device" else ("encode", "decode")))
        else:
            modelled = stages[figure] if not place else _average(rows, kernel, place, gpu)
        out.append({"figure": figure, "measured": seconds, "modelled": modelled, "error": modelled / seconds - 1})
    return out


def predictions(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return stages, device and image, with and without early launches, and each of our kernels, for each GPU."""
    before = measured()
    # Not modelled: tokens, copies, the queue and Python, as they were on that machine.
    host = before["image"] - before["device"]
    out: dict[str, Any] = {"host": host}
    for name, gpu in GPUS.items():
        for early in (True, False):
            found = predict(rows, gpu, old=False, early=early)
            device = sum(found["stages"][stage] for stage in DEVICE)
            key = name if early else f"{name}, RAGTURBO_PDL=0"
            out[key] = {**found, "device": device, "image": device + host}
            unet = found["stages"]["encode"] + found["stages"]["decode"]
            keys = 2 * FIXED + 2 * 630_000 * 1024 / (gpu.machine.bandwidth * STREAM)
            out[key] |= {"unet": unet, "search of 630,000 keys": keys}
        out[name]["kernels"] = [
            {"op": row["op"], "shape": row["shape"], "stage": row["stage"], "count": row["count"],
             "launches": (each := cost(row, gpu, False)).launches, "seconds": each.seconds}
            for row in rows if row["op"].startswith("ragturbo::")
        ]  # fmt: skip
    return out


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cost_model", description=__doc__.splitlines()[0])
    parser.add_argument("--operations", type=Path, default=RESULTS / "operations.json")
    parser.add_argument("--commit", help="of the list to predict, by default the last one")
    parser.add_argument("--json", type=Path, help="write errors and predictions")
    options = parser.parse_args(argv)
    lists = json.loads(options.operations.read_text("utf-8"))
    commit = options.commit or list(lists)[-1]
    checked, predicted = check(lists), predictions(lists[commit])
    for row in checked:
        figure, was, modelled = row["figure"], row["measured"] * 1e6, row["modelled"] * 1e6
        print(f"{figure:34} measured {was:9.1f} µs, modelled {modelled:9.1f} µs ({row['error']:+.0%})")
    worst = max(abs(row["error"]) for row in checked)
    print(f"largest error {worst:.0%}, on figures the constants were chosen on")
    for name, found in predicted.items():
        if name != "host":
            stages = ", ".join(f"{stage} {found['stages'][stage] * 1e3:.3f}" for stage in DEVICE)
            print(f"{name}: image {found['image'] * 1e3:.2f} ms, device {found['device'] * 1e3:.2f} ms: {stages}")
    if options.json:
        from ragturbo.machine import describe, now

        record = {
            "kind": "prediction", "datetime": now(), "context": describe(), "operations": commit,
            "largest_error": worst, "checked": checked, "predicted": predicted,
        }  # fmt: skip
        options.json.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
