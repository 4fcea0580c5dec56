"""Find the fastest implementation of each op on a GPU, which `impl="auto"` then uses there.

`python -m benchmarks.fastest SUITE.json` reads the JSON of `pytest benchmarks/ --benchmark-json SUITE.json` and writes
the fastest of each op with several GPU implementations to kernels/configs/<gpu>.json.
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

# The sizes that are compared: those of one image.
RACES: dict[str, dict[str, Any]] = {
    "cross_attention": {"batch": 1, "neighbours": 1, "heads": 20},
    "gather_rows": {"rows": 16, "where": "host", "stored": "float16"},
    "topk": {"queries": 1, "k": 1},
}
# Another implementation has to be faster than the Triton kernel by more than this, the noise.
WORTHWHILE = 0.03


def race(benchmarks: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return op -> {"impl": the fastest, "microseconds": {implementation: median}} of the measured ops."""
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
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fastest", description=__doc__)
    parser.add_argument("suite", type=Path, help="pytest-benchmark's JSON from a GPU")
    parser.add_argument("--out", type=Path, default=tiles.INSTALLED, help="the folder of <gpu>.json")
    options = parser.parse_args(argv)
    data = json.loads(options.suite.read_text("utf-8"))
    machine = data.get("machine_info", {}).get("ragturbo", {})
    gpu = (machine.get("gpu") or {}).get("name")
    found = race(data.get("benchmarks", []))
    if not gpu or not found:
        raise InvalidRequest(f"{options.suite} compares nothing on a GPU: it is from {gpu or machine.get('cpu')}")
    # The suite's machine and commit, which may not be this process's.
    tiles.note(options.out / tiles.file_name(gpu), "fastest", tiles.made_on(machine), fastest=found)
    for op, row in found.items():
        sys.stdout.write(f"{op}: {row['impl']} of {row['microseconds']} µs\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
