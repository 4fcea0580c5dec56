"""Tune the kernels' tiles for this GPU: `python -m benchmarks.tune` times candidates and writes configs/<gpu>.json.

Candidates that do not compile, do not fit or give another result than the default are dropped. The fastest of the
others in a CUDA graph is taken if it is faster than the default by more than the noise. Inputs that an image reads from
memory are not cached here either. The file has both times, GPU, driver, torch, triton and commit. The most important
cases come first, and each is written when done, so `--seconds` or a kill loses at most one. All cores compile
candidates while earlier cases are timed. `--dry-run` only counts the candidates, on any machine.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import math
import multiprocessing
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton

from benchmarks import compile_offline
from benchmarks.kernel_cases import CASES, FIXED_DTYPE, Call, Case
from ragturbo.kernels import tiles
from ragturbo.kernels.launch import programmatic, replaced

log = logging.getLogger("ragturbo")

# Smaller gains are noise.
WORTHWHILE = 0.03

# The cases with the largest share of an image: (op, beginning of the label). The others follow in the order of CASES.
FIRST = (
    ("linear", "b1 QKV"),
    ("linear", "b1 GEGLU"),
    # proj_in and proj_out have the same shape and tile as "out".
    ("linear", "b1 out"),
    ("linear", "b1 FF out"),
    ("project_attention", "b1"),
    ("linear", "b1 K and V"),
    ("cross_attention", "b1 d64 k1"),
    ("group_norm", "VAE"),
    ("topk", "1 queries"),
    ("group_norm", "UNet"),
    ("gather_rows", "16 rows fp16"),
)
# Ops whose weights or rows are not in L2 when an image needs them: 2 GB of other weights are read in between.
COLD = ("linear", "project_attention", "gather_rows")
MOST_COPIES = 64

# Calls of one case on different inputs -> seconds per call.
Measure = Callable[[Sequence[Call]], float]


def _product(**choices: Sequence[int]) -> list[tiles.Tile]:
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


CANDIDATES: dict[str, list[tiles.Tile]] = {
    "slerp": _product(BLOCK=(1024, 2048, 4096), ONE_PASS=(2048, 8192), num_warps=(4, 8)),
    "scaled_residual": _product(BLOCK=(512, 1024, 2048, 4096), num_warps=(2, 4, 8)),
    # The most promising first. Those that exceed the shared memory fail at their first launch.
    "linear": [
        *_product(BM=(64,), BN=(16, 32, 64), BK=(64,), num_warps=(4,), num_stages=(8, 6)),
        *_product(BM=(64,), BN=(16, 32, 64), BK=(128,), num_warps=(4,), num_stages=(4, 5, 3)),
        *_product(BM=(64,), BN=(64, 32), BK=(64,), SPLITS=(4, 8, 2), num_warps=(4,), num_stages=(6,)),
        *_product(BM=(64,), BN=(64,), BK=(128,), SPLITS=(4, 8), num_warps=(4,), num_stages=(4,)),
        *_product(BM=(32,), BN=(16, 32), BK=(128,), num_warps=(4,), num_stages=(5,)),
        *_product(BM=(128,), BN=(32, 64, 128), BK=(64,), num_warps=(8,), num_stages=(4,)),
    ],
    "cross_attention": _product(BT=(16, 32, 64), BS=(64, 32), num_warps=(4, 2), num_stages=(2, 1)),
    "project_cross_attention": [
        *_product(BT=(16,), BS=(64,), BK=(128,), num_warps=(4, 8), num_stages=(5, 4, 6)),
        *_product(BT=(16,), BS=(64,), BK=(64, 256), num_warps=(4,), num_stages=(8, 4)),
        *_product(BT=(32,), BS=(64,), BK=(64, 128), num_warps=(4, 8), num_stages=(5, 3)),
    ],
    "cross_attention_backward": _product(BT=(16, 32, 64), BS=(16, 32, 64), num_warps=(2, 4, 8), num_stages=(1, 2)),
    # One launch with more or fewer threads, two, then three.
    "group_norm": [
        *_product(num_warps=(4, 8)),
        *_product(ONE_LAUNCH=(64,), TWO_LAUNCHES=(1 << 20,), LANES=(32, 64), SPLITS=(8, 16, 32), num_warps=(4,)),
        *_product(ONE_LAUNCH=(64,), TWO_LAUNCHES=(1,), BR=(32, 64, 16), SPLITS=(1024, 512, 256), num_warps=(4, 8)),
    ],
    "layer_norm": _product(BM=(1, 2, 4, 8), num_warps=(1, 2, 4, 8)),
    "geglu": _product(BLOCK=(256, 512, 1024, 2048), num_warps=(2, 4, 8)),
    "bias_residual": _product(BLOCK=(512, 1024, 2048, 4096), num_warps=(4, 8)),
    "upsample": _product(BLOCK=(1024, 2048, 4096), num_warps=(4, 8)),
    "interleave": _product(BLOCK=(2048, 4096, 8192), num_warps=(4, 8)),
    "softmax": _product(num_warps=(4, 8, 16)),
    "to_uint8": _product(BLOCK=(512, 1024, 2048, 4096), num_warps=(4, 8)),
    "gather_rows": _product(BLOCK=(1024, 2048, 4096, 8192), num_warps=(2, 4, 8)),
    # One query, then several in one product. With several programs per multiprocessor the loads of one overlap the
    # search of another, so stages do not help.
    "topk": [
        *_product(BN=(4, 8, 16), BD=(512, 1024), PER_PROCESSOR=(2, 4, 7, 8), num_warps=(4, 8), num_stages=(2,)),
        *_product(BN=(32, 64, 128), BD=(64, 128), PER_PROCESSOR=(2, 3, 4), num_warps=(4,), num_stages=(2, 3)),
    ],
}  # fmt: skip


def graph_seconds(calls: Call | Sequence[Call], launches: int = 20, replays: int = 15) -> float:
    """Return the median seconds per call in a CUDA graph that holds each of `calls` equally often."""
    calls = [calls] if callable(calls) else calls
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.stream(stream):
        for call in calls:
            call()
        begin.record()
        for _ in range(3):
            calls[0]()
        end.record()
    torch.cuda.current_stream().wait_stream(stream)
    end.synchronize()
    # At most 5 ms per replay.
    launches = max(1, min(launches, int(5 / max(begin.elapsed_time(end) / 3, 1e-3))))
    rounds = math.ceil(launches / len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    graph.replay()
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(replays)]
    # Queue all replays before waiting, so that late launches of a busy host do not count.
    for first, last in marks:
        first.record()
        graph.replay()
        last.record()
    torch.cuda.synchronize()
    return statistics.median(first.elapsed_time(last) for first, last in marks) / 1e3 / (rounds * len(calls))


def cold_calls(case: Case, dtype: torch.dtype, device: str) -> list[Call]:
    """Return calls of the case on as many different inputs as exceed twice the L2."""
    gpu = torch.device(device).type == "cuda"
    before = torch.cuda.memory_allocated() if gpu else 0
    calls = [case.make(device, dtype)]
    if gpu and case.op in COLD:
        # A gather reads as many bytes of its table as it writes.
        own = calls[0]().nbytes if case.op == "gather_rows" else torch.cuda.memory_allocated() - before
        l2 = torch.cuda.get_device_properties(device).L2_cache_size
        copies = min(MOST_COPIES, 2 * l2 // max(own, 1) + 1)
        calls += [case.make(device, dtype) for _ in range(copies - 1)]
    return calls


@dataclass(frozen=True)
class Tuned:
    """The best tile of one kernel and shape, its time, and the default tile's time."""

    kernel: str
    shape: str
    tile: tiles.Tile
    seconds: float
    default: float


def tune_case(
    case: Case,
    dtype: torch.dtype,
    device: str,
    measure: Measure,
    candidates: Iterable[tiles.Tile] | None = None,
    until: float = math.inf,
) -> Tuned:
    """Time the default tile and the candidates of one case, until time.monotonic() reaches `until`."""
    calls = cold_calls(case, dtype, device)
    with tiles.recorded() as asked, tiles.forced(case.tiled, {}):
        expected = calls[0]()
    shapes = [shape for kernel, shape in asked if kernel == case.tiled]
    if not shapes:
        raise ValueError(f"{case.op} ({case.label}) requested no tile of {case.tiled!r}, only of {sorted(set(asked))}")
    with tiles.forced(case.tiled, {}):
        default = measure(calls)
    best, seconds = {}, default
    for tile in CANDIDATES[case.tiled] if candidates is None else candidates:
        if time.monotonic() >= until:
            break
        with tiles.forced(case.tiled, tile):
            # Triton's errors have no common base class, and a tile may fail an assertion.
            try:
                found = calls[0]()
                if not _same(found, expected, dtype):
                    log.warning("%s %s: tile %s gives another result and is dropped", case.op, shapes[0], tile)
                    continue
                took = measure(calls)
            except Exception as error:
                log.debug("%s %s %s: %s", case.op, shapes[0], tile, error)
                continue
        if took < seconds:
            best, seconds = tile, took
    if seconds > default * (1 - WORTHWHILE):
        best, seconds = {}, default
    return Tuned(case.tiled, shapes[0], best, seconds, default)


def _same(found: Any, expected: Any, dtype: torch.dtype) -> bool:
    """Return whether results are equal up to the rounding of another summation order."""
    if not isinstance(found, torch.Tensor):
        return expected is None or all(_same(a, b, dtype) for a, b in zip(found, expected, strict=True))
    if not found.is_floating_point():
        return torch.equal(found, expected)
    eps = torch.finfo(dtype).eps
    finite = expected.isfinite()
    scale = expected[finite].double().norm()
    difference = (found[finite].double() - expected[finite].double()).norm()
    return bool((found.isfinite() == finite).all()) and bool(difference <= 4 * eps * scale)


def write(path: Path, rows: Sequence[Tuned], machine: dict[str, Any]) -> None:
    """Add the rows to the GPU's file, keeping other shapes."""
    known = tiles.known(path)
    chosen, times = known["tiles"], known.get("microseconds", {})
    for row in rows:
        chosen.setdefault(row.kernel, {})[row.shape] = row.tile
        both = {"tuned": round(row.seconds * 1e6, 3), "default": round(row.default * 1e6, 3)}
        times.setdefault(row.kernel, {})[row.shape] = both
    tiles.note(path, "tiles", machine, tiles=chosen, microseconds=times)


def compile_candidate(case: Case, dtype: torch.dtype, capability: int, tile: tiles.Tile) -> bool:
    """Compile a candidate into Triton's cache, in a process of its own; return whether it compiled."""
    triton.runtime.driver.set_active(compile_offline.AbsentGPU(capability))

    def compile_only(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]) -> None:
        kernel.warmup(*args, grid=grid, **options, **programmatic(kernel, capability))

    try:
        with replaced(compile_only), tiles.forced(case.tiled, tile):
            case.make("meta", dtype)()
    except Exception as error:
        log.debug("%s %s: %s", case.op, tile, error)
        return False
    return True


def compile_ahead(
    pool: ProcessPoolExecutor, wanted: Sequence[tuple[Case, torch.dtype]], capability: int
) -> list[list[Future[bool]]]:
    """Submit the default tile and the candidates of each case; return the futures by case."""
    return [
        [pool.submit(compile_candidate, case, dtype, capability, tile) for tile in ({}, *CANDIDATES[case.tiled])]
        for case, dtype in wanted
    ]


def in_order(wanted: Iterable[tuple[Case, torch.dtype]]) -> list[tuple[Case, torch.dtype]]:
    """Return the cases with those of FIRST first."""

    def rank(entry: tuple[Case, torch.dtype]) -> int:
        case = entry[0]
        places = (i for i, (op, begin) in enumerate(FIRST) if case.op == op and case.label.startswith(begin))
        return next(places, len(FIRST))

    return sorted(wanted, key=rank)


def distinct(wanted: Iterable[tuple[Case, torch.dtype]]) -> list[tuple[Case, torch.dtype]]:
    """Return the first of the cases that share a tile."""
    found: dict[tuple[str, str], tuple[Case, torch.dtype]] = {}
    for case, dtype in wanted:
        with tiles.recorded() as asked, replaced(lambda *launch: None):
            case.make("meta", dtype)()
        found.setdefault(next(entry for entry in asked if entry[0] == case.tiled), (case, dtype))
    return list(found.values())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__)
    parser.add_argument("--op", nargs="+", default=[], help="only these ops")
    parser.add_argument("--label", nargs="+", default=[""], help="only labels that begin with these, such as b1 VAE")
    parser.add_argument("--dtype", nargs="+", default=["float16"], choices=["float16", "bfloat16", "float32"])
    parser.add_argument("--out", type=Path, default=tiles.INSTALLED, help="the folder of <gpu>.json")
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop after this time")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compiling processes; 0 for none")
    parser.add_argument("--dry-run", action="store_true", help="list what would be tuned; needs no GPU")
    options = parser.parse_args(argv)
    unknown = set(options.op) - {case.op for case in CASES}
    if unknown:
        parser.error(f"no such op: {', '.join(sorted(unknown))}; known: {', '.join(sorted({c.op for c in CASES}))}")
    wanted = distinct(
        in_order(
            (case, getattr(torch, name))
            for case in CASES
            if (not options.op or case.op in options.op) and case.label.startswith(tuple(options.label))
            for name in (["float16"] if case.op in FIXED_DTYPE else options.dtype)
        )
    )
    if options.dry_run:
        for case, dtype in wanted:
            print(f"{case.op}, {case.label}, {dtype}: {len(CANDIDATES[case.tiled])} candidates")
        return 0
    if not torch.cuda.is_available():
        sys.stderr.write("tuning needs a CUDA GPU, and torch sees none\n")
        return 4
    from ragturbo.machine import describe

    path, machine = options.out / tiles.file_name(torch.cuda.get_device_name()), tiles.made_on(describe())
    until = time.monotonic() + options.seconds
    major, minor = torch.cuda.get_device_capability()
    pool = ProcessPoolExecutor(max(1, options.jobs), mp_context=multiprocessing.get_context("spawn"))
    try:
        ahead = compile_ahead(pool, wanted, 10 * major + minor) if options.jobs else [[] for _ in wanted]
        for (case, dtype), compiling in zip(wanted, ahead, strict=True):
            wait(compiling, timeout=max(0.0, min(until - time.monotonic(), threading.TIMEOUT_MAX)))
            if time.monotonic() >= until:
                print(f"stopped after {options.seconds:.0f} s: {case.op}, {case.label} and the rest are not tuned")
                break
            row = tune_case(case, dtype, "cuda", graph_seconds, until=until)
            write(path, [row], machine)
            gain = row.default / row.seconds
            took = f"{row.seconds * 1e6:.2f} µs, {gain:.2f}× the default, {row.tile}"
            print(f"{case.op}, {case.label}, {dtype}: {took}", flush=True)
    finally:
        pool.shutdown(cancel_futures=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
