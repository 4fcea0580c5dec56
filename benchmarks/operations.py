"""List the operations of one image on the device, with their bytes and FLOPs, without a GPU.

`python -m benchmarks.operations --out benchmarks/results/operations.json` records sd-turbo's sizes at 512x512, batch 1,
one step, adapter mode, on fake CUDA tensors as `tests/engine` does, and adds the list under the current commit. The
cost model reads it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

ROOT = Path(__file__).resolve().parents[1]
FIELDS = "stage", "op", "shape", "read", "weights", "written", "flops", "after_ours"


def flops(name: str, func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Return the FLOPs of matrix products, convolutions and attention."""
    if name in ("aten::linear", "ragturbo::linear"):
        weights = args[1] if name.startswith("ragturbo") else [args[1]]
        return int(2 * args[0].numel() * sum(w.shape[0] for w in weights))
    if name == "aten::addmm_":
        return int(2 * args[1].numel() * args[2].shape[-1])
    if name.startswith("aten::conv"):
        return int(2 * out.numel() * args[1].numel() // args[1].shape[0])
    if name == "ragturbo::project_attention":
        k = next(t for t in args[2:] if isinstance(t, torch.Tensor) and t.ndim == 4)
        return int(2 * args[0].numel() * args[1].shape[0] + 4 * args[0].shape[1] * k.numel())
    if name == "ragturbo::cross_attention":
        return int(4 * args[0].shape[1] * args[1].numel())
    if "scaled_dot_product" in name:
        return int(4 * args[0].numel() * args[1].shape[-2])
    packet = func._overloadpacket
    return int(flop_registry[packet](*args, **kwargs, out_val=out)) if packet in flop_registry else 0


def _storages(root: Any) -> set[int]:
    """Return the storages of all tensors that an object holds, at any depth: a model's weights."""
    found: set[int] = set()
    seen: set[int] = set()
    waiting = [root]
    while waiting:
        one = waiting.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, torch.Tensor):
            found.add(one.untyped_storage()._cdata)
            continue
        if isinstance(one, torch.nn.Module):
            waiting += [*one.parameters(), *one.buffers()]
        if isinstance(one, dict):
            waiting += one.values()
        elif isinstance(one, (list, tuple, set)):
            waiting += one
        elif hasattr(one, "__dict__"):
            waiting += vars(one).values()
    return found


def record() -> list[dict[str, Any]]:
    """Return one row for each kind of operation: FIELDS, bytes per call, and how often it is called ("count")."""
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "engine")]
    import fake
    import test_capture
    import tiny

    rows: Counter[tuple[Any, ...]] = Counter()
    weights: set[int] = set()
    previous = ""

    class Listed(fake.Watch):  # type: ignore[misc, name-defined]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal previous
            before: Counter[str] = Counter(self.by_stage)
            out = super().__torch_dispatch__(func, types, args, kwargs)
            if self.by_stage == before:
                return out
            given = [t for t in tree_leaves((args, kwargs or {})) if isinstance(t, torch.Tensor)]
            made = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
            owned = sum(t.nbytes for t in given if t.untyped_storage()._cdata in weights)
            name, shape = func.name(), "x".join(map(str, given[0].shape)) if given else ""
            work = flops(name, func, args, kwargs or {}, out)
            sizes = sum(t.nbytes for t in given) - owned, owned, sum(t.nbytes for t in made), work
            stage = next(iter(self.by_stage - before))
            rows[(stage, name, shape, *sizes, previous.startswith("ragturbo::"))] += 1
            previous = name
            return out

    fake.Watch = Listed
    with fake.fake_cuda():
        model = test_capture.FastModel(fake.make_bundle(tiny, real_sizes=True))
        weights |= _storages(model)
        test_capture.watched(model, test_capture.spec(model))
    return [{**dict(zip(FIELDS, key, strict=True)), "count": count} for key, count in rows.items()]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.operations", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="a JSON file of lists by commit")
    parser.add_argument("--commit", help="by default the current one")
    options = parser.parse_args(argv)
    command = ["git", "rev-parse", "--short=9", "HEAD"]
    commit = options.commit or subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    lists = json.loads(options.out.read_text("utf-8")) if options.out.exists() else {}
    lists[commit.strip()] = record()
    # One row a line.
    parts = (f'"{key}": [\n' + ",\n".join(map(json.dumps, rows)) + "\n]" for key, rows in lists.items())
    options.out.write_text("{\n" + ",\n".join(parts) + "\n}\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
