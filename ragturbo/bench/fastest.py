"""Which implementation is the fastest on a GPU, from a committed suite: what `impl="auto"` then takes there.

`python -m ragturbo.bench.fastest SUITE.json` reads what `pytest benchmarks/ --benchmark-json SUITE.json` left and notes
the winner of each op that has several implementations for a GPU in kernels/configs/<gpu>.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ragturbo.errors import InvalidRequest
from ragturbo.kernels import tiles
from ragturbo.ops.dispatch import IMPLEMENTATIONS

# One image's request: the sizes at which the implementations race.
RACES: dict[str, dict[str, Any]] = {
    "cross_attention": {"batch": 1, "neighbours": 1, "heads": 20},
    "gather_rows": {"rows": 16, "where": "host", "stored": "float16"},
    "topk": {"queries": 1, "k": 1},
}
# An implementation has to win by more than the noise, or the kernels of this library stay.
WORTHWHILE = 0.03


def race(benchmarks: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """op -> {"impl": the fastest, "microseconds": {implementation: median}}; ops nobody raced are left out."""
    found: dict[str, dict[str, Any]] = {}
    for op, sizes in RACES.items():
        times = {}
        for entry in benchmarks:
            info = entry["extra_info"]
            own = info.get("sizes", {})
            if info.get("op") != op or "seconds" not in info or info.get("flags"):
                continue
            if own.get("impl") in IMPLEMENTATIONS[op] and sizes.items() <= own.items():
                times[own["impl"]] = round(info["seconds"]["p50"] * 1e6, 3)
        if "triton" not in times:
            continue
        best = min(times, key=times.__getitem__)
        if times[best] > times["triton"] * (1 - WORTHWHILE):
            best = "triton"
        found[op] = {"impl": best, "microseconds": times}
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ragturbo.bench.fastest", description=__doc__)
    parser.add_argument("suite", type=Path, help="JSON of pytest-benchmark, made on a GPU")
    parser.add_argument("--out", type=Path, default=tiles.INSTALLED, help="the folder of <gpu>.json")
    options = parser.parse_args(argv)
    data = json.loads(options.suite.read_text("utf-8"))
    machine = data.get("machine_info", {}).get("ragturbo", {})
    gpu = (machine.get("gpu") or {}).get("name")
    found = race(data.get("benchmarks", []))
    if not gpu or not found:
        raise InvalidRequest(f"{options.suite} holds no race on a GPU: it was made on {gpu or machine.get('cpu')}")
    # The suite's machine and commit, not this process's: it may be read elsewhere and later.
    tiles.note(options.out / tiles.file_name(gpu), "fastest", tiles.made_on(machine), fastest=found)
    for op, row in found.items():
        sys.stdout.write(f"{op}: {row['impl']} of {row['microseconds']} µs\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
