"""Measures a GPU in parts, each within a time box: `make gpu PART=kernels|engine|breakdown|train RESULTS=dir`.

Every step is a process of its own: one that fails or hangs costs its box and nothing else, and what is finished is on
disk. `--rehearse` runs the same lines at tiny sizes without a GPU, and says so in what it writes.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

STARTED = time.monotonic()
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
PARTS = ("kernels", "engine", "breakdown", "train")
NEEDED = ("diffusers", "transformers", "safetensors", "pyarrow", "PIL", "scann", "bm25s", "peft", "accelerate",
          "pytest_benchmark", "hypothesis", "pynvml", "matplotlib", "typer", "rich")  # fmt: skip
# The whole of a part, and of the quick cut of all four, installation included: the machine is lent for little longer.
PART_SECONDS = 470.0
QUICK_SHARES = {"kernels": 110.0, "engine": 160.0, "breakdown": 110.0, "train": 90.0}
# Their suites hold peers that torch.compile autotunes, for minutes where its cache is cold.
COMPILED = ("cross_attention", "adapter")
# The page stays one; all of them are in the files.
MOST_FLAGS = 20
# A rehearsal asks whether every line runs, on whatever slow and shared machine it runs on.
REHEARSAL_PATIENCE = 4


@dataclass(frozen=True)
class Step:
    name: str
    command: list[str]
    box: float
    """Seconds after which it is ended."""
    result: Path | None = None
    """JSON it leaves: merged into the part's file, or, for a suite, a file of its own."""
    needs: tuple[str, ...] = ()
    """Programs or modules without which it is skipped, by name."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=(*PARTS, "all"), default="all")
    parser.add_argument("--results", type=Path, default=Path("gpu-results"))
    parser.add_argument("--cache", type=Path, help="where compiled kernels are kept from run to run")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, no GPU: does every line run?")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="of a part, the steps whose names begin so")
    parser.add_argument("--spent", type=float, default=0.0, help="seconds of the time that are gone already")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        return run_step(options)
    if not options.rehearse and (why := no_gpu()):
        print(f"gpu: nothing to measure: {why} (--rehearse runs the same lines without one)", file=sys.stderr)
        return 4
    if options.cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(options.cache.resolve() / "inductor")
        os.environ["TRITON_CACHE_DIR"] = str(options.cache.resolve() / "triton")
    options.results.mkdir(parents=True, exist_ok=True)
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(f"gpu: not installed, and what needs them is skipped: {', '.join(missing)}", flush=True)
    quick, failed = options.part == "all", list[str]()
    left = max(0.0, PART_SECONDS - options.spent - (time.monotonic() - STARTED))
    for part in PARTS if quick else (options.part,):
        with tempfile.TemporaryDirectory(prefix="ragturbo-gpu-") as scratch:
            steps = plan(part, options, quick, Path(scratch))
            if options.only:
                steps = [step for step in steps if step.name.startswith(tuple(options.only))]
            seconds = left * QUICK_SHARES[part] / sum(QUICK_SHARES.values()) if quick else left
            try:
                run_part(part, steps, options.results, seconds, rehearsal=options.rehearse, missing=missing)
            except Exception as error:  # a step's odd result, a full disk: the other parts are still worth their time
                failed.append(f"{part}: {type(error).__name__}: {error}")
    text = "\n".join([summary(options.results), *(f"Part {line}" for line in failed)])
    (options.results / "summary.md").write_text(text, "utf-8")
    print(text)
    return 0


def no_gpu() -> str | None:
    from ragturbo.bench.context import no_gpu_reason

    return no_gpu_reason()


def plan(part: str, options: argparse.Namespace, quick: bool, scratch: Path) -> list[Step]:
    """The steps of a part, dearest last: a part that runs out of time has the rest already."""
    rehearse = options.rehearse

    def own(name: str, box: float, *needs: str) -> Step:
        out = scratch / f"{name.replace(' ', '-')}.json"
        command = [sys.executable, str(Path(__file__)), "--step", name, "--out", str(out)]
        command += ["--rehearse"] * rehearse + ["--quick"] * quick
        return Step(name, command, box, out, needs)

    def suite(file: str, box: float, seconds: float, rows: str = "") -> Step:
        """A process a file: pytest writes its JSON at the end, and one that runs out of time must not take the rest.

        rows: "quick" for the first row of each kind alone, "not quick" for the others.
        """
        rows = "quick" if quick or rehearse else rows
        name = " ".join(["suite", Path(file).stem.removeprefix("test_bench_"), *([f"({rows})"] if rows else [])])
        out = scratch / f"{name.replace(' ', '-')}.json"
        command = [sys.executable, "-m", "pytest", file, "-q", "--benchmark-only", "-p", "no:cacheprovider",
                   f"--benchmark-json={out}", f"--benchmark-max-time={seconds}",
                   "--benchmark-columns=median,iqr,rounds"]  # fmt: skip
        command += ["-m", rows] if rows else []
        return Step(name, command, box, out, ("pytest_benchmark",))

    benchmarks = ROOT / "benchmarks"
    bundles = {"generate", "stages", "serve", "import"}
    named = {p.stem.removeprefix("test_bench_"): str(p) for p in sorted(benchmarks.glob("test_bench_*.py"))}
    if part == "kernels":
        others = bundles | {"train", "retrieval", "features", *COMPILED}
        ops = [path for name, path in named.items() if name not in others]
        # The ops' tests take a GPU where there is one; in a rehearsal, one quick file of them.
        folder = ROOT / "tests" / "ops"
        chosen = [folder / "test_dispatch.py"] if rehearse else [folder, ROOT / "tests" / "native" / "test_cuda.py"]
        # A test file whose packages are missing here must not keep the others from running.
        tests = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--continue-on-collection-errors", "-m", "not slow",
                 *map(str, chosen),
                 f"--ignore={folder / 'test_compile_only.py'}"]  # fmt: skip
        sanitized = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "1", sys.executable, *tests,
                     "-k", "gather or topk or slerp or shared_by", "-x"]  # fmt: skip
        # What it finds is kept as it goes: kernels/configs/<gpu>.json, once looked at, is where it belongs.
        tune = [sys.executable, "-m", "ragturbo.kernels.tune", "--out", str(options.results.resolve() / "configs"),
                "--op", "linear", "project_attention", "cross_attention", "--label", "b1"]  # fmt: skip
        tune += ["--dry-run"] * rehearse
        # Of the suites' times, once all are there.
        results = options.results.resolve()
        fastest = [sys.executable, "-m", "ragturbo.bench.fastest", str(results / "kernels-suite.json"),
                   "--out", str(results / "configs")]  # fmt: skip
        # Nobody knows how long peers autotune: the rows that matter most come first, by themselves.
        compiled = [named[name] for name in COMPILED]
        seconds = 0.1 if quick or rehearse else 0.3
        return [
            Step("kernel tests", [sys.executable, *tests], 60 if quick else 130, None, ("pytest",)),
            *(suite(file, 20 if quick else 40, seconds) for file in ops),
            *(suite(file, 25 if quick else 150, seconds, "quick") for file in compiled),
            *([] if quick or rehearse else [Step("fastest", fastest, 30, None)]),
            *([] if quick or rehearse else [suite(file, 150, seconds, "not quick") for file in compiled]),
            *([] if quick else [Step("tune", tune, 240, None, ("triton",))]),
            *([] if quick else [Step("sanitizer", sanitized, 200, None, ("compute-sanitizer",))]),
        ]
    if part == "engine":
        # Replays against calls bit for bit, and 10,000 requests over which memory must stay flat.
        tests = ["env", "RAGTURBO_LONG=1", sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
                 "--maxfail=8", str(ROOT / "tests" / "engine" / "test_gpu.py")]  # fmt: skip
        # Into the file that the tiles go to, kernels/configs/<gpu>.json once it is looked at.
        attention = [sys.executable, "-m", "ragturbo.engine.attention"]
        attention += ["--out", str(options.results.resolve() / "configs")]
        return [
            own("parts", 60, "diffusers"),
            *([] if rehearse else [Step("attention", attention, 20 if quick else 45, None, ("triton",))]),
            own("image", 90, "diffusers"),
            *([] if quick else [Step("engine tests", tests, 110, None, ("pytest", "diffusers"))]),
            own("tail", 90, "diffusers"),
            own("added", 170, "diffusers"),
            own("cold", 60, "diffusers"),
            *([] if quick else [own("compiled peer", 330, "diffusers")]),
        ]
    if part == "breakdown":
        files = [named[name] for name in ("stages", "generate", "serve") if name in named]
        return [
            own("breakdown", 100 if quick else 260, "diffusers"),
            *(suite(file, 30 if quick else 90, 0.1 if quick or rehearse else 0.5) for file in files),
        ]
    files = [named[name] for name in ("train", "retrieval", "features") if name in named]
    return [
        own("build", 45 if quick else 90, "diffusers"),
        *(suite(file, 45 if quick else 220, 0.1 if quick or rehearse else 1.0) for file in files),
    ]


def run_part(
    part: str, steps: list[Step], results: Path, seconds: float, *, rehearsal: bool, missing: list[str]
) -> dict[str, Any]:
    """Runs the steps within `seconds`; the part's file is written anew after each."""
    from ragturbo.bench.context import context, now

    patience = REHEARSAL_PATIENCE if rehearsal else 1
    until = time.monotonic() + seconds * patience
    record: dict[str, Any] = {"kind": part if part != "breakdown" else "breakdown-steps", "datetime": now(),
                              "context": context(), "rehearsal": rehearsal, "missing": missing, "measured": {},
                              "steps": {}}  # fmt: skip
    path = results / f"{part}.json"
    earlier = _earlier(path, record["context"])
    if earlier is not None and earlier["rehearsal"] == rehearsal:
        # A part that is gone on with: what other steps found in the same sources stays.
        record = {**earlier, "datetime": record["datetime"]}
    for step in steps:
        print(f"gpu: {part}: {step.name} …", flush=True)
        found = run_boxed(step, min(step.box * patience, until - time.monotonic()))
        result = found.pop("result", None)
        # What this step gave in an earlier run is no longer so.
        for key in record["steps"].get(step.name, {}).get("figures", []):
            record["measured"].pop(key, None)
        if result and "benchmarks" in result:
            # All that --results may receive is eight files, the tiles among them.
            merge_suite(results / ("kernels-suite.json" if part == "kernels" else "suite.json"), result)
        elif result and result.get("kind") == "breakdown":
            # The part is this one record; what became of its other steps is beside it.
            record = {**result, "rehearsal": rehearsal, "missing": missing, "steps": record["steps"]}
        elif result:
            figures = result.pop("measured", {})
            record["measured"] |= figures
            found |= {**result, "figures": list(figures)}
            if "withheld" in result:
                found["outcome"] = f"no time: {result['withheld']}"
        record["steps"][step.name] = found
        if record["kind"] != "breakdown":
            steps = record["steps"].items()
            record["flags"] = [f"{name}: {flag}" for name, entry in steps for flag in entry.get("flags", [])]
        path.write_text(json.dumps(record, indent=1, default=str) + "\n", "utf-8")
        print(f"gpu: {part}: {step.name}: {found['outcome']}, {found.get('wall_s', 0):.0f} s", flush=True)
    return record


def _earlier(path: Path, context: dict[str, Any]) -> dict[str, Any] | None:
    """What an earlier run left, where it ran this very code on this kind of machine: any other is begun anew."""
    if not path.is_file():
        return None
    found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    theirs = found["machine_info"]["ragturbo"] if "machine_info" in found else found["context"]
    return found if all(theirs[name] == context[name] for name in ("sources", "machine")) else None


def merge_suite(path: Path, new: dict[str, Any]) -> None:
    """Several suites in one file: same machine, same sources, one after another."""
    earlier = _earlier(path, new["machine_info"]["ragturbo"])
    merged = earlier or {**new, "benchmarks": []}
    seen = {b["fullname"] for b in new["benchmarks"]}
    merged["benchmarks"] = [b for b in merged["benchmarks"] if b["fullname"] not in seen] + new["benchmarks"]
    merged["datetime"] = new.get("datetime")
    merged["wall_s"] = new.get("wall_s", 0.0) + (earlier.get("wall_s", 0.0) if earlier else 0.0)
    path.write_text(json.dumps(merged, indent=1) + "\n", "utf-8")


def run_boxed(step: Step, box: float) -> dict[str, Any]:
    """One process, ended with all its children when its box is used up."""
    for need in step.needs:
        if shutil.which(need) is None and (not need.isidentifier() or importlib.util.find_spec(need) is None):
            return {"outcome": f"skipped: {need} is not installed"}
    if box < 5:
        return {"outcome": "skipped: the part's time is used up"}
    start = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            step.command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, start_new_session=True
        )
        try:
            code: int | None = process.wait(box)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = None
        log.seek(0)
        tail = log.read()[-1500:]
    found: dict[str, Any] = {"wall_s": time.monotonic() - start, "box_s": box}
    if code == 0:
        found["outcome"] = "done"
    else:
        found |= {"outcome": "out of time" if code is None else f"failed with {code}", "tail": tail}
    if step.result is not None and step.result.is_file():
        try:
            found["result"] = json.loads(step.result.read_text("utf-8"))
        except ValueError:
            # Ended while it wrote.
            found["outcome"] += ", its result half written"
    return found


def run_step(options: argparse.Namespace) -> int:
    """In the step's own process."""
    from ragturbo.bench.breakdown import Settings, breakdown
    from ragturbo.bench.gpu_steps import Scale, measure

    scale = Scale(options.rehearse, options.quick)
    if options.step == "breakdown":
        small = {"prompts": 3, "teacher_prompts": 1, "teacher_steps": 3, "pairs": 64, "keys": 200, "quick": True}
        less = {"prompts": 20, "teacher_prompts": 2, "pairs": 1024, "keys": 100_000}
        result = breakdown(
            Settings(scale.config, scale.device, **(small if scale.rehearse else less if scale.quick else {}))
        )
    else:
        result = measure(options.step, scale)
    options.out.write_text(json.dumps(result, default=str), "utf-8")
    return 0


def summary(results: Path) -> str:
    """One page: every budget, what was measured here and whether it is met; every step that did not finish."""
    from ragturbo.bench import budgets
    from ragturbo.bench.results import Machine, read_folder

    machine: Machine = read_folder(results)
    if not machine.runs:
        return "No part left a record.\n"
    context = machine.runs[0].context
    rehearsal = any(run.data.get("rehearsal") for run in machine.runs)
    name = (context.get("gpu") or {}).get("name") or context["cpu"]
    lines = [f"# {name}, torch {context['packages'].get('torch')}, commit {machine.runs[0].commit}", ""]
    if rehearsal:
        keys = ", ".join(sorted(machine.figures()))
        lines += [f"A rehearsal at tiny sizes: nothing here was measured. A real run would fill: {keys}."]
    else:
        lines += budgets.table(
            {key: [own_flags(machine, key, f) for f in all_] for key, all_ in machine.figures().items()}
        )
    for run in machine.runs:
        for step, found in run.data.get("steps", {}).items():
            if found["outcome"] != "done":
                lines += ["", f"{run.path.stem}: {step}: {found['outcome']}"]
    every = [line for run in machine.runs for line in all_flags(run)]
    shown = "; ".join(every[:MOST_FLAGS]) + (f"; and {len(every) - MOST_FLAGS} more" if len(every) > MOST_FLAGS else "")
    lines += ["", f"Flags: {shown or 'none'}.", ""]
    return "\n".join(lines)


def own_flags(machine: Any, key: str, figure: Any) -> Any:
    """A part's record has the flags of all its steps, by name: of them those of the step that gave this figure."""
    run = next(run for run in machine.runs if figure.source.endswith(f"/{run.path.name}"))
    steps = run.data.get("steps", {})
    if run.kind == "suite" or not steps:
        return figure
    kept = [flag for name, found in steps.items() if key in found.get("figures", []) for flag in found.get("flags", [])]
    return replace(figure, flags=tuple(kept))


def all_flags(run: Any) -> Iterator[str]:
    from ragturbo.bench.results import flags

    yield from run.data.get("flags", [])
    for entry in run.data.get("benchmarks", []):
        yield from (f"{entry['name']}: {flag}" for flag in flags(run, entry))


if __name__ == "__main__":
    sys.exit(main())
