"""`python -m ragturbo.bench.check`: counts that do not depend on the machine, against the committed ones.

FLOPs, bytes, launches and allocations of every stage at SD 2.1's size, and of every op at its main shape. A change that
makes an image dearer shows here before anyone has a GPU. `--write` commits to the new counts.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ragturbo.machine import ROOT

FILE = ROOT / "benchmarks" / "stage_counts.json"


def counted() -> dict[str, Any]:
    """{"stages": {stage: counts}, "ops": {op at its shape: counts}}, on any machine."""
    import torch

    from ragturbo.bench import roofline
    from ragturbo.bench.counts import stage_counts

    stages = stage_counts("sd21", torch.float16)
    return {
        "what": "eager modules in fp16, 512x512, batch 1, one neighbour; ops as roofline.py counts them",
        "stages": {name: counts.to_dict() for name, counts in stages.items()},
        "ops": {name: asdict(work) for name, work in roofline.main_shapes().items()},
    }


def differences(now: Any, committed: Any, path: str = "") -> Iterator[str]:
    """One line for each count that is not the committed one."""
    if isinstance(now, dict) and isinstance(committed, dict):
        for key in dict.fromkeys([*committed, *now]):
            yield from differences(now.get(key), committed.get(key), f"{path}/{key}" if path else str(key))
    elif now != committed:
        change = ""
        if isinstance(now, (int, float)) and isinstance(committed, (int, float)) and committed:
            change = f" ({now / committed - 1:+.2%})"
        yield f"{path}: {now}, committed {committed}{change}"


def main(argv: Sequence[str] | None = None, file: Path = FILE) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m ragturbo.bench.check", description="Counts against committed ones."
    )
    parser.add_argument("--write", action="store_true", help="commit to the counts as they are now")
    options = parser.parse_args(argv)
    now = json.loads(json.dumps(counted()))
    if options.write:
        file.write_text(json.dumps(now, indent=1) + "\n", "utf-8")
        return 0
    found = list(differences(now, json.loads(file.read_text("utf-8"))))
    for line in found:
        sys.stdout.write(line + "\n")
    if found:
        sys.stdout.write(f"{len(found)} counts differ from {file}; if that is meant: --write\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
