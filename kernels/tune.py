"""Finding this GPU's tiles: `python -m ragturbo.kernels.tune` times candidates and writes configs/<gpu>.json.

A candidate that does not compile, does not fit or gives another result than the default is out; of the rest the
fastest in a CUDA graph wins, if it beats the default by more than the noise. The file keeps both times and what made
them: GPU, driver, torch, triton and commit. Candidates are compiled beforehand by all cores; `--dry-run` only counts
them, on any machine.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton

from ragturbo.kernels import offline, tiles
from ragturbo.kernels.cases import CASES, FIXED_DTYPE, Call, Case
from ragturbo.kernels.launch import replaced

log = logging.getLogger("ragturbo")

# A win smaller than this is noise.
WORTHWHILE = 0.03

Measure = Callable[[Call], float]


def _product(**choices: Sequence[int]) -> list[tiles.Tile]:
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


CANDIDATES: dict[str, list[tiles.Tile]] = {
    "slerp": _product(BLOCK=(1024, 2048, 4096), ONE_PASS=(2048, 8192), num_warps=(4, 8)),
    "scaled_residual": _product(BLOCK=(512, 1024, 2048, 4096), num_warps=(2, 4, 8)),
    "linear": [
        tile
        for tile in _product(BM=(32, 64, 128), BN=(16, 32, 64), BK=(64, 128), num_warps=(4, 8), num_stages=(2, 3, 4))
        # Not more accumulators than a thread's registers hold, nor fewer than four a thread.
        if 128 * tile["num_warps"] <= tile["BM"] * tile["BN"] <= 4096 * tile["num_warps"]
    ]
    + _product(BM=(64,), BN=(32, 64, 128), BK=(64, 128), SPLITS=(2, 4, 8), num_warps=(4,), num_stages=(3, 4)),
    "cross_attention": _product(BT=(16, 32, 64), BS=(16, 32, 64, 128), num_warps=(2, 4, 8), num_stages=(1, 2, 3)),
    "project_cross_attention": _product(
        BT=(16, 32, 64), BS=(32, 64), BK=(32, 64, 128), num_warps=(4, 8), num_stages=(2, 3, 4)
    ),
    "cross_attention_backward": _product(BT=(16, 32, 64), BS=(16, 32, 64), num_warps=(2, 4, 8), num_stages=(1, 2)),
    "group_norm": _product(BR=(8, 16, 32, 64), SPLITS=(128, 512, 1024), ONE_LAUNCH=(64, 512, 2048), num_warps=(4, 8)),
    "layer_norm": _product(BM=(1, 2, 4, 8), num_warps=(1, 2, 4, 8)),
    "geglu": _product(BLOCK=(256, 512, 1024, 2048), num_warps=(2, 4, 8)),
    "bias_residual": _product(BLOCK=(512, 1024, 2048, 4096), num_warps=(4, 8)),
    "to_uint8": _product(BLOCK=(512, 1024, 2048, 4096), num_warps=(4, 8)),
    "gather_rows": _product(BLOCK=(1024, 2048, 4096, 8192), num_warps=(2, 4, 8)),
    "topk": _product(BN=(8, 16, 32), BD=(256, 512, 1024), PER_PROCESSOR=(1, 2, 4), num_warps=(4, 8), num_stages=(1, 2)),
}  # fmt: skip


def graph_seconds(call: Call, calls: int = 20, replays: int = 15) -> float:
    """Seconds of one call inside a CUDA graph of `calls`: the median of the replays, between two events."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    times = []
    for _ in range(replays):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / calls)
    return statistics.median(times)


@dataclass(frozen=True)
class Tuned:
    """The winner for one kernel and shape. default: the time of the built-in tile."""

    kernel: str
    shape: str
    tile: tiles.Tile
    seconds: float
    default: float


def tune_case(
    case: Case, dtype: torch.dtype, device: str, measure: Measure, candidates: Iterable[tiles.Tile] | None = None
) -> Tuned:
    """Times every candidate of one case; the first entry of the race is the built-in tile."""
    call = case.make(device, dtype)
    with tiles.recorded() as asked, tiles.forced(case.tiled, {}):
        expected = call()
    shapes = [shape for kernel, shape in asked if kernel == case.tiled]
    if not shapes:
        raise ValueError(f"{case.op} ({case.label}) asked for no tile of {case.tiled!r}, only {sorted(set(asked))}")
    with tiles.forced(case.tiled, {}):
        default = measure(call)
    best, seconds = {}, default
    for tile in CANDIDATES[case.tiled] if candidates is None else candidates:
        with tiles.forced(case.tiled, tile):
            try:
                found = call()
            except (triton.CompilationError, triton.OutOfResources, RuntimeError) as error:
                log.debug("%s %s %s: %s", case.op, shapes[0], tile, error)
                continue
            if not _same(found, expected, dtype):
                log.warning("%s %s: tile %s gives another result and is out", case.op, shapes[0], tile)
                continue
            took = measure(call)
        if took < seconds:
            best, seconds = tile, took
    if seconds > default * (1 - WORTHWHILE):
        best, seconds = {}, default
    return Tuned(case.tiled, shapes[0], best, seconds, default)


def _same(found: Any, expected: Any, dtype: torch.dtype) -> bool:
    """Equal up to the rounding another order of summation makes."""
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
    """Adds the rows to the file of this GPU; earlier shapes that were not tuned again stay."""
    known = tiles.known(path)
    chosen, times = known["tiles"], known.get("microseconds", {})
    for row in rows:
        chosen.setdefault(row.kernel, {})[row.shape] = row.tile
        both = {"tuned": round(row.seconds * 1e6, 3), "default": round(row.default * 1e6, 3)}
        times.setdefault(row.kernel, {})[row.shape] = both
    tiles.note(path, "tiles", machine, tiles=chosen, microseconds=times)


def compile_candidates(case: Case, dtype: torch.dtype, capability: int, candidates: Sequence[tiles.Tile]) -> int:
    """In a process of its own: leaves in Triton's cache what `tune_case` will ask for. How many did compile."""
    triton.runtime.driver.set_active(offline.AbsentGPU(capability))
    compiled = 0
    with replaced(lambda kernel, grid, args, options: kernel.warmup(*args, grid=grid, **options)):
        for tile in candidates:
            try:
                with tiles.forced(case.tiled, tile):
                    case.make("meta", dtype)()
                compiled += 1
            except Exception as error:
                # tune_case meets it again and says so.
                log.debug("%s %s: %s", case.op, tile, error)
    return compiled


def compile_ahead(wanted: Sequence[tuple[Case, torch.dtype]], capability: int, jobs: int) -> int:
    tasks = [(case, dtype, CANDIDATES[case.tiled][i::jobs]) for case, dtype in wanted for i in range(jobs)]
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        done = [pool.submit(compile_candidates, case, dtype, capability, part) for case, dtype, part in tasks if part]
        return sum(future.result() for future in done)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ragturbo.kernels.tune", description=__doc__)
    parser.add_argument("--op", nargs="+", default=[], help="only these ops")
    parser.add_argument("--label", default="", help="only cases whose label begins so: b1")
    parser.add_argument("--dtype", nargs="+", default=["float16"], choices=["float16", "bfloat16", "float32"])
    parser.add_argument("--out", type=Path, default=tiles.INSTALLED, help="the folder of <gpu>.json")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes that compile ahead; 0: none")
    parser.add_argument("--dry-run", action="store_true", help="say what would be tuned; needs no GPU")
    options = parser.parse_args(argv)
    unknown = set(options.op) - {case.op for case in CASES}
    if unknown:
        parser.error(f"no such op: {', '.join(sorted(unknown))}; known: {', '.join(sorted({c.op for c in CASES}))}")
    wanted = [
        (case, getattr(torch, name))
        for case in CASES
        if (not options.op or case.op in options.op) and case.label.startswith(options.label)
        for name in (["float16"] if case.op in FIXED_DTYPE else options.dtype)
    ]
    if options.dry_run:
        for case, dtype in wanted:
            print(f"{case.op}, {case.label}, {dtype}: {len(CANDIDATES[case.tiled])} candidates")
        return 0
    if not torch.cuda.is_available():
        sys.stderr.write("tuning times kernels on a GPU, and torch sees none here\n")
        return 4
    if options.jobs:
        major, minor = torch.cuda.get_device_capability()
        compile_ahead(wanted, 10 * major + minor, options.jobs)
    from ragturbo.bench.context import context

    path, machine = options.out / tiles.file_name(torch.cuda.get_device_name()), tiles.made_on(context())
    for case, dtype in wanted:
        row = tune_case(case, dtype, "cuda", graph_seconds)
        # Written as found: an interrupted run keeps what it has.
        write(path, [row], machine)
        gain = row.default / row.seconds
        print(f"{case.op}, {case.label}, {dtype}: {row.seconds * 1e6:.2f} µs, {gain:.2f}× the default, {row.tile}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
