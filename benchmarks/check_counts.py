"""`python -m benchmarks.check_counts`: compare machine-independent counts with the committed ones.

These are FLOPs, bytes, launches and allocations of every stage at SD 2.1's size, and of every op at its main shape.
`--write` updates the committed counts.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import roofline
from benchmarks.counts import stage_counts
from ragturbo.machine import ROOT

FILE = ROOT / "benchmarks" / "stage_counts.json"


def counted() -> dict[str, Any]:
    """Return {"stages": {stage: counts}, "ops": {op and shape: counts}}."""
    stages = stage_counts("sd21", torch.float16)
    return {
        "what": "eager modules in fp16, 512x512, batch 1, one neighbour; ops as roofline.py counts them",
        "stages": {name: counts.to_dict() for name, counts in stages.items()},
        "ops": {name: asdict(work) for name, work in roofline.main_shapes().items()},
    }


def differences(now: Any, committed: Any, path: str = "") -> Iterator[str]:
    """Yield one line for each count that differs."""
    if isinstance(now, dict) and isinstance(committed, dict):
        for key in dict.fromkeys([*committed, *now]):
            yield from differences(now.get(key), committed.get(key), f"{path}/{key}" if path else str(key))
    elif now != committed:
        change = ""
        if isinstance(now, (int, float)) and isinstance(committed, (int, float)) and committed:
            change = f" ({now / committed - 1:+.2%})"
        yield f"{path}: {now}, committed {committed}{change}"


def main(argv: Sequence[str] | None = None, file: Path = FILE) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.check_counts", description=__doc__)
    parser.add_argument("--write", action="store_true", help="update the committed counts")
    options = parser.parse_args(argv)
    now = json.loads(json.dumps(counted()))
    if options.write:
        file.write_text(json.dumps(now, indent=1) + "\n", "utf-8")
        return 0
    found = list(differences(now, json.loads(file.read_text("utf-8"))))
    for line in found:
        sys.stdout.write(line + "\n")
    if found:
        sys.stdout.write(f"{len(found)} counts differ from {file}; update it with --write if this is intended\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
