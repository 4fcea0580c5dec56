"""Measure a GPU in steps, each in a process of its own with a time limit.

    bash benchmarks/gpu.sh first      # make gpu: correctness, and the time of an image
    bash benchmarks/gpu.sh more       # make gpu-more: the other GPU budgets
    bash benchmarks/gpu.sh STEP…      # single steps; --list prints them

A step that fails, hangs, is killed or gives wrong results does not affect the others. Results are written to the
results folder while a step runs. `--rehearse` runs the same steps at tiny sizes without a GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import signal
import site
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

STARTED = time.monotonic()
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import step_process  # noqa: E402
from benchmarks.step_process import Step  # noqa: E402
from ragturbo.machine import no_gpu_reason  # noqa: E402

NEEDED = ("diffusers", "transformers", "safetensors", "pyarrow", "PIL", "scann", "bm25s", "peft", "accelerate",
          "pytest", "xdist", "pytest_benchmark", "hypothesis", "pynvml", "typer", "rich")  # fmt: skip
# The most important steps first.
SETS = {
    "first": ("first-light", "smoke", "upsampling", "image", "parts", "tail", "engine-tests", "kernel-tests"),
    "more": ("added", "cold", "compiled-peer", "train"),
}
# Time limit of a set in seconds, including the installation.
SECONDS = {"first": 500.0, "more": 270.0}
# Suites whose torch.compile rows autotune for minutes with a cold cache: those rows are a separate step.
COMPILED = ("adapter", "cross_attention")
BUNDLES = ("stages", "generate", "serve", "train", "retrieval", "features", "import")
# Factor on all time limits of a rehearsal, which may run on a slow machine.
REHEARSAL_PATIENCE = 6
# Files of a run, renamed before the next run in the same folder.
RECORDS = ("engine.json", "suite.json", "kernels-suite.json", "breakdown.json", "first_light.jsonl")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", default=["first"], help="first, more, or steps by name")
    parser.add_argument("--results", type=Path, default=Path("gpu-results"))
    parser.add_argument("--seconds", type=float, help="time limit of the run; 500 for first, 270 for more, else none")
    parser.add_argument("--spent", type=float, default=0.0, help="seconds of the limit already used")
    parser.add_argument("--rehearse", action="store_true", help="run the steps at tiny sizes without a GPU")
    parser.add_argument("--list", action="store_true", help="print the steps and their time limits")
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        return measure(options.measure, options.rehearse, options.out)
    # End the running step, which has a session of its own, as Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with tempfile.TemporaryDirectory(prefix="ragturbo-gpu-") as scratch:
        steps = plan(options.results.resolve(), Path(scratch), rehearse=options.rehearse)
        if options.list:
            for name, step in steps.items():
                print(f"{name:24}{step.box:5.0f} s")
            return 0
        chosen = [name for given in options.steps for name in SETS.get(given, (given,))]
        if options.rehearse:
            # Some steps exist only with a GPU.
            chosen = [name for name in chosen if name in steps or name not in sum(SETS.values(), ())]
        if unknown := [name for name in chosen if name not in steps]:
            parser.error(f"no step {unknown[0]!r}; choose from: {', '.join([*SETS, *steps])}")
        if not options.rehearse and (why := no_gpu_reason()):
            print(f"gpu: {why} (--rehearse runs the same steps without a GPU)", file=sys.stderr)
            return 4
        seconds = options.seconds or sum(SECONDS.get(given, float("inf")) for given in options.steps)
        patience = REHEARSAL_PATIENCE if options.rehearse else 1
        deadline = STARTED + seconds * patience - options.spent
        options.results.mkdir(parents=True, exist_ok=True)
        if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
            print(f"gpu: not installed, steps that need them are skipped: {', '.join(missing)}", flush=True)
        run([steps[name] for name in chosen], options.results, deadline, rehearsal=options.rehearse, patience=patience)
    print((options.results / "summary.md").read_text("utf-8"))
    return 0


def plan(results: Path, scratch: Path, *, rehearse: bool) -> dict[str, Step]:
    """Return every step by name."""
    python, tests = sys.executable, ROOT / "tests"
    # Later steps use what earlier steps measured on this GPU.
    environment = {
        "RAGTURBO_KERNEL_CONFIGS": str(results / "configs"),
        "RAGTURBO_CEILINGS": str(scratch / "ceilings.json"),
        "RAGTURBO_INSTANT": "1",
    }
    one_thread = {"OMP_NUM_THREADS": "1"}
    found: dict[str, Step] = {}

    def add(name: str, command: list[str], box: float, *needs: str, result: Path | None = None, **more: str) -> None:
        found[name] = Step(name, command, box, result, needs, {**environment, **more})

    def own(name: str, box: float, *needs: str) -> None:
        out = scratch / f"{name}.json"
        command = [python, str(Path(__file__)), "--measure", name, "--out", str(out), *["--rehearse"] * rehearse]
        add(name, command, box, "diffusers", *needs, result=out)

    def pytest(*arguments: str | Path, workers: int = 0) -> list[str]:
        parallel = ["-n", str(2 if rehearse else workers), "--dist", "worksteal"] if workers else []
        return [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *parallel, *map(str, arguments)]

    def suite(file: Path, name: str, box: float, marks: str) -> None:
        out = scratch / f"{name.replace(':', '-')}.jsonl"
        command = pytest(file, "--benchmark-only", f"--benchmark-max-time={0.1 if rehearse else 0.3}", "-m", marks)
        add(name, command, box, "pytest_benchmark", result=out, RAGTURBO_ROWS=str(out))

    light = [python, str(ROOT / "benchmarks" / "first_light.py"), "--out", str(results / "first_light.jsonl")]
    add("first-light", [*light, *(["--rehearse", "--seconds", "400"] if rehearse else [])], 110, "diffusers",
        **({"TRITON_INTERPRET": "1"} if rehearse else {}))  # fmt: skip
    engine = tests / "engine" / "test_gpu.py"
    add("smoke", pytest(engine, "-x", "-k", "adapter and 1 and bit_for_bit"), 60, "pytest", "diffusers")
    own("image", 100)
    own("parts", 60)
    own("tail", 60)
    # The same in one process, which saves three start-ups of 15 s each.
    together = scratch / "together"
    command = [python, str(Path(__file__)), "--measure", "image", "parts", "added", "tail", "--out", str(together)]
    add("together", [*command, *["--rehearse"] * rehearse], 200, "diffusers", result=together)
    lanes = tests / "engine" / "test_gpu_graphs.py"
    add("engine-tests", pytest(engine, lanes, workers=6), 110, "pytest", "diffusers", RAGTURBO_LONG="1", **one_thread)
    ops = [tests / "ops" / "test_dispatch.py"] if rehearse else [tests / "ops", tests / "native" / "test_cuda.py"]
    skipped = f"--ignore={tests / 'ops' / 'test_compile_only.py'}"
    collected = ["--continue-on-collection-errors", "-m", "not slow", skipped]
    add("kernel-tests", pytest(*ops, *collected, workers=12), 120, "pytest", **one_thread)

    configs = ["--out", str(results / "configs")]
    if not rehearse:
        add("attention", [python, "-m", "benchmarks.model_races", "attention", *configs], 45, "triton")
        add("upsampling", [python, "-m", "benchmarks.model_races", "upsampling", *configs], 40, "triton")
    own("added", 70)
    own("cold", 50)
    own("compiled-peer", 130)
    own("breakdown", 200)
    own("build", 90)
    for file in sorted((ROOT / "benchmarks").glob("test_bench_*.py")):
        name = file.stem.removeprefix("test_bench_")
        box = 220 if name in BUNDLES else 60
        quick = "quick and not compiled" if rehearse else "not compiled"
        suite(file, "train" if name == "train" else f"suite:{name}", box, quick)
        if name in COMPILED and not rehearse:
            suite(file, f"suite:{name}-compiled", 150, "compiled")
    tune = [python, "-m", "benchmarks.tune", *configs, "--label", "b1", "UNet", "VAE", "1"]
    add("tune", [*tune, "--op", "linear", "project_attention", "cross_attention", "group_norm", "topk", "gather_rows",
                 "--seconds", "200", *["--dry-run"] * rehearse], 240, "triton")  # fmt: skip
    if not rehearse:
        suites = str(results / "kernels-suite.json")
        add("fastest", [python, "-m", "benchmarks.fastest", suites, *configs], 30)
        # torch's caching allocator would hide out-of-bounds accesses.
        add("sanitizer", ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "1",
                          *pytest(*ops, *collected, f"--ignore={tests / 'ops' / 'test_capture.py'}",
                                  "-k", "gather or topk or slerp or shared_by")],
            200, "compute-sanitizer", PYTORCH_NO_CUDA_MEMORY_CACHING="1")  # fmt: skip
    return found


def run(steps: Sequence[Step], results: Path, deadline: float, *, rehearsal: bool, patience: float = 1) -> None:
    """Run the steps until the deadline; update the record and the summary during and after each."""
    set_aside(results)
    records = Records(results, rehearsal)
    with (results / "logs.txt").open("a", encoding="utf-8") as log:
        for step in steps:
            print(f"gpu: {step.name} …", flush=True)
            box = Step(**{**vars(step), "box": step.box * patience})
            try:
                records.update(step, {"outcome": "running"})
                found = step_process.run(box, deadline - time.monotonic(), log, cwd=ROOT,
                                  poll=lambda step=step: records.update(step, {"outcome": "running"}))  # fmt: skip
            except Exception as error:  # such as a missing program or a full disk
                found = {"outcome": f"did not run: {type(error).__name__}: {error}"}
            try:
                outcome = records.update(step, found)
            except OSError as error:
                outcome = f"{found['outcome']}; not recorded: {error}"
            print(f"gpu: {step.name}: {outcome}, {found.get('wall_s', 0):.0f} s", flush=True)
            if tail := found.get("tail"):
                print("\n".join(f"gpu:   {line}"[:200] for line in tail.strip().splitlines()[-12:]), flush=True)


def set_aside(results: Path) -> None:
    """Rename the records of an earlier run in this folder, which may be of another GPU or commit."""
    earlier = [path for name in RECORDS if (path := results / name).exists()]
    number = 1
    while any(path.with_stem(f"{path.stem}-{number}").exists() for path in earlier):
        number += 1
    for path in earlier:
        path.rename(path.with_stem(f"{path.stem}-{number}"))


class Records:
    """The results of the steps, in the files that `ragturbo bench report` reads."""

    def __init__(self, results: Path, rehearsal: bool) -> None:
        self._results, self._rehearsal = results, rehearsal
        self._steps: dict[str, dict[str, Any]] = {}
        self._seen: dict[str, bytes] = {}
        self._own: dict[str, dict[str, Any]] = {}

    def update(self, step: Step, found: dict[str, Any]) -> str:
        """Merge what a step has written so far, and return its outcome."""
        if step.result is not None and step.result.is_dir():
            # Steps that share a process have an entry each; the process has one without figures.
            for path in sorted(step.result.glob("*.json")):
                self.update(Step(path.stem, step.command, step.box, path), {"outcome": found["outcome"]})
        content = step.result.read_bytes() if step.result is not None and step.result.is_file() else b""
        if found["outcome"] == "running" and self._seen.get(step.name) == content and step.name in self._steps:
            return "running"
        self._seen[step.name] = content
        entry = {**found}
        try:
            if content and step.result is not None and step.result.suffix == ".jsonl":
                self._take_suite(step, content)
            elif content:
                entry |= self._take(step.name, json.loads(content))
        except Exception as error:  # a partial or malformed result
            entry["outcome"] += f"; its result cannot be read: {type(error).__name__}: {error}"
        if "withheld" in entry:
            entry["outcome"] += f"; withheld: {entry['withheld']}"
        for key, why in entry.get("unverified_because", {}).items():
            entry["outcome"] += f"; {key} unverified: {why}"
        self._steps[step.name] = entry
        self._write()
        return str(entry["outcome"])

    def _take(self, name: str, result: dict[str, Any]) -> dict[str, Any]:
        if str(result.get("kind")).startswith("breakdown"):
            replace_json(self._results / "breakdown.json", {**result, "rehearsal": self._rehearsal})
            return {}
        self._own[name] = result
        return {**result, "figures": list(result.get("measured", {}))}

    def _take_suite(self, step: Step, content: bytes) -> None:
        from benchmarks.suite_rows import rows_to_json

        assert step.result is not None
        new = rows_to_json(step.result)
        if new is None:
            return
        path = self._results / ("suite.json" if step.name.removeprefix("suite:") in BUNDLES else "kernels-suite.json")
        earlier = json.loads(path.read_text("utf-8")) if path.is_file() else {**new, "benchmarks": []}
        seen = {b["fullname"] for b in new["benchmarks"]}
        kept = [b for b in earlier["benchmarks"] if b["fullname"] not in seen]
        merged = {**earlier, "datetime": new.get("datetime"), "benchmarks": kept + new["benchmarks"]}
        for name in ("ceilings", "failed"):
            merged[name] = {**earlier.get(name, {}), **new.get(name, {})}
        replace_json(path, merged)

    def _write(self) -> None:
        from benchmarks.summary import summary
        from ragturbo.machine import describe, now

        results = self._own.values()
        record = {
            "kind": "engine", "datetime": now(), "context": describe(), "rehearsal": self._rehearsal,
            "measured": {key: value for result in results for key, value in result.get("measured", {}).items()},
            "unverified": {key: value for result in results for key, value in result.get("unverified", {}).items()},
            "flags": [f"{name}: {flag}" for name, result in self._own.items() for flag in result.get("flags", [])],
            "steps": self._steps,
        }  # fmt: skip
        replace_json(self._results / "engine.json", record)
        try:
            text = summary(self._results)
        except Exception as error:  # such as another file in the folder
            text = f"No summary: {type(error).__name__}: {error}\n"
        replace_text(self._results / "summary.md", text)


def replace_json(path: Path, data: Any) -> None:
    text = json.dumps(data, indent=1, default=str) + "\n"
    # Remove the machine's paths.
    for place in (f"{ROOT}/", *(f"{folder}/" for folder in (*site.getsitepackages(), sys.prefix))):
        text = text.replace(place, "")
    replace_text(path, re.sub(rf"(?:/dev/shm|{tempfile.gettempdir()})/[\w.-]+/", "", text))


def replace_text(path: Path, text: str) -> None:
    """Write atomically: a reader sees the old or the new file."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(text, "utf-8")
    os.replace(new, path)


def measure(names: Sequence[str], rehearse: bool, out: Path) -> int:
    """Run steps in this process. The result of one goes to the file `out`, results of several to the folder `out`."""
    from benchmarks import gpu_steps, projection
    from ragturbo.bench.breakdown import Settings, breakdown

    scale, failed = gpu_steps.Scale(rehearse), 0
    if len(names) > 1:
        out.mkdir(parents=True, exist_ok=True)
        for name in names:
            try:
                gpu_steps.measure(name.replace("-", " "), scale, out / f"{name}.json")
            except Exception:
                traceback.print_exc()
                failed += 1
        return failed
    (name,) = names
    if name == "breakdown":
        small = {"prompts": 3, "teacher_prompts": 1, "teacher_steps": 3, "pairs": 64, "keys": 200}
        settings = Settings(scale.config, scale.device, **(small if rehearse else {}))
        record = breakdown(settings, lambda profile, kind, part: replace_json(out, part))
        replace_json(out, record)
        replace_json(out, {**record, "projection": projection.to_l40s(record, scale.config)})
    else:
        gpu_steps.measure(name.replace("-", " "), scale, out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
