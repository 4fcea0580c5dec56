"""The first minute on a GPU: check kernels against fp64 and captured forms against calls, and profile an image.

    python benchmarks/first_light.py --out first_light.jsonl      # on a GPU, about a minute
    TRITON_INTERPRET=1 python benchmarks/first_light.py --rehearse # the same code at small sizes, on any machine

Each check writes one JSON line. A check that raises writes its traceback and the next one runs. If the CUDA context is
unusable or a check hangs, the process restarts itself with the next check.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

# Before torch is imported, which takes seconds of the minute.
STARTED = time.time()
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks import kernel_oracles  # noqa: E402
from benchmarks.kernel_cases import CASES, Case  # noqa: E402
from benchmarks.timing import captured, in_bulk, once, sample  # noqa: E402
from ragturbo.bench.timing import percentiles  # noqa: E402
from ragturbo.kernels import tiles  # noqa: E402
from ragturbo.machine import describe, gpu_state, no_gpu_reason  # noqa: E402

# Ops with checks of their own, because the data of their cases are zero.
OWN_CHECK = ("gather_rows", "topk")
# Small enough for Triton's interpreter.
REHEARSED = {"slerp": "b1 per sample", "slerp backward": "b8 per token", "scaled_residual": "b1",
             "linear": "b1 out, residual", "project_attention": "b1", "cross_attention": "b1 d32",
             "group_norm": "UNet 1280×8²", "layer_norm": "16² tokens, 1280", "geglu": "16² tokens, 5120",
             "bias_residual": "1280×8²", "scaled_residual backward": "b8"}  # fmt: skip
TOKENS, CHANNELS, KEY_WIDTH = 64, 1280, 1024
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "adapter, one graph": ("adapter", {"retriever": "exact"}),
    "none": ("none", {"retriever": "exact"}),
    "slerp, one graph": ("slerp", {"retriever": "exact"}),
    "adapter, ids to the host": ("adapter", {"retriever": "exact", "host_cache": 4 * 2 * TOKENS * CHANNELS}),
    "adapter, three graphs": ("adapter", {"retriever": "bm25"}),
}
HANGS_AFTER = 60.0


@dataclass(frozen=True)
class Check:
    """poisoned: whether torch.empty is filled with NaN during the check."""

    name: str
    run: Callable[[Bench], dict[str, Any]]
    poisoned: bool = False


class Bench:
    """Objects shared by several checks, created on first use."""

    def __init__(self, rehearse: bool) -> None:
        self.rehearse = rehearse
        self.device = "cpu" if rehearse else "cuda"
        self._folder = tempfile.TemporaryDirectory(prefix="ragturbo-first-light-")
        self.folder = Path(self._folder.name)

    @cached_property
    def bundle(self) -> Any:
        from ragturbo.bench.models import make_bundle

        return make_bundle(
            "rehearsal" if self.rehearse else "sd21", self.device, torch.float32 if self.rehearse else torch.float16
        )

    @cached_property
    def database(self) -> Any:
        from ragturbo.bench.models import make_database

        return make_database(self.bundle, self.folder / "db", 64)

    def generator(self, capture: bool = True, **options: Any) -> Any:
        from ragturbo.config import GeneratorConfig
        from ragturbo.generate import Generator

        engine = {} if self.rehearse else {"engine": "graph", "capture": capture}
        config = GeneratorConfig(**engine, batch_sizes=(1,), **options)
        return Generator(self.bundle, database=self.database, config=config)

    def seconds(self, call: Callable[..., Any], inputs: list[tuple[Any, ...]]) -> dict[str, float]:
        """Return percentiles of one call: in a CUDA graph on a GPU, uncaptured in a rehearsal."""
        if self.rehearse:
            return percentiles(sample(lambda: call(*inputs[0]), seconds=0.0, least=2))
        run, calls = in_bulk(call, inputs)
        return percentiles([t / calls for t in sample(run, seconds=0.15, least=5)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("first_light.jsonl"))
    parser.add_argument("--seconds", type=float, default=60.0, help="start no check after this time")
    parser.add_argument("--only", nargs="+", default=[], help="only checks whose names begin with these")
    parser.add_argument("--rehearse", action="store_true", help="small sizes on a CPU, kernels in the interpreter")
    parser.add_argument("--resume", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--begun", type=float, default=STARTED, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.rehearse and (why := no_gpu_reason()):
        print(f"first light: {why} (--rehearse runs the same code without a GPU)", file=sys.stderr)
        return 4
    if not options.resume:
        options.out.unlink(missing_ok=True)
    checks = [c for c in plan(options.rehearse) if not options.only or c.name.startswith(tuple(options.only))]
    return Runner(checks, options).run()


class Runner:
    def __init__(self, checks: list[Check], options: argparse.Namespace) -> None:
        self._checks, self._options = checks, options
        self._bench = Bench(options.rehearse)
        self._now = options.resume
        self._since = time.monotonic()
        # The watchdog or the main thread ends a check; only one of them writes its line.
        self._lock = threading.Lock()

    def run(self) -> int:
        threading.Thread(target=self._watch, daemon=True).start()
        failed = 0
        for i in range(self._options.resume, len(self._checks)):
            check = self._checks[i]
            with self._lock:
                self._now, self._since = i, time.monotonic()
            if time.time() - self._options.begun > self._options.seconds:
                self._write(check.name, {"ok": False, "skipped": "the time was used up"})
                continue
            try:
                # Uninitialized memory is NaN, except in timed checks, because filling it takes launches.
                torch.use_deterministic_algorithms(check.poisoned, warn_only=True)
                with torch.no_grad():
                    found = check.run(self._bench)
            except BaseException as error:  # a kernel's compiler may exit
                found = {"ok": False, "error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
            with self._lock:
                self._write(check.name, {"ok": True, **found})
                failed += not found.get("ok", True)
                if "error" in found and not self._usable():
                    self._restart(i + 1)
        return 1 if failed else 0

    def _watch(self) -> None:
        main = threading.main_thread().ident
        while True:
            time.sleep(0.5)
            with self._lock:
                if time.monotonic() - self._since > HANGS_AFTER * (20 if self._options.rehearse else 1):
                    frame = sys._current_frames().get(main or 0)
                    stack = "".join(traceback.format_stack(frame)) if frame else ""
                    name = self._checks[self._now].name
                    self._write(name, {"ok": False, "error": f"hung for {HANGS_AFTER:.0f} s", "traceback": stack})
                    self._restart(self._now + 1)

    def _usable(self) -> bool:
        """Return whether the CUDA context still works; after an illegal access every call fails."""
        if self._options.rehearse:
            return True
        try:
            torch.cuda.synchronize()
            return bool((torch.ones(8, device="cuda") + 1).eq(2).all())
        except Exception:
            return False

    def _restart(self, index: int) -> None:
        arguments = sys.argv[1:]
        for flag in ("--resume", "--begun"):
            if flag in arguments:
                at = arguments.index(flag)
                del arguments[at : at + 2]
        command = [sys.executable, sys.argv[0], *arguments, "--resume", str(index), "--begun", str(self._options.begun)]
        os.execv(sys.executable, command)

    def _write(self, name: str, found: dict[str, Any]) -> None:
        line = {"check": name, "seconds": round(time.monotonic() - self._since, 3), **found}
        if not self._options.rehearse and found["ok"]:
            # Context, modules and graphs.
            free, total = torch.cuda.mem_get_info()
            line["outside_torch_bytes"] = total - free - torch.cuda.memory_reserved()
        with self._options.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, default=str) + "\n")
        shown = found.get("error") or found.get("skipped") or found.get("say") or ""
        word = "ok" if found["ok"] else "skipped" if "skipped" in found else "FAILED"
        if word != "ok" or shown:
            print(f"first light: {name}: {word} {str(shown)[:300]}", flush=True)


def plan(rehearse: bool) -> list[Check]:
    halves, others = [torch.float16], [torch.bfloat16, torch.float32]
    # The usual form first; the least important checks last, because the time may run out.
    usual, *further_forms = FORMS
    wanted = [c for c in CASES if c.op not in OWN_CHECK and (not rehearse or REHEARSED.get(c.op) == c.label)]

    def cases(dtypes: list[torch.dtype]) -> list[Check]:
        return [Check(f"case {c.op}, {c.label}, {_name(d)}", partial(case, c, d), True) for d in dtypes for c in wanted]

    return [
        Check("versions", versions),
        *cases(halves),
        Check("bits", bits, True),
        Check("gather", gather, True),
        Check("topk", topk, True),
        Check("split-K", split_k),
        Check("adapter", adapter),
        Check(f"form {usual}", partial(form, usual)),
        Check("profile", profile),
        *(Check(f"pairs {run.__name__}", run) for run in (group_norm, topk_variants, gather_rate)),
        *(Check(f"form {name}", partial(form, name)) for name in further_forms),
        # A rehearsal always computes in fp32.
        *([] if rehearse else cases(others)),
    ]


def versions(bench: Bench) -> dict[str, Any]:
    found = describe()
    native = _native()
    gpu = found["gpu"] or {"name": "no GPU"}
    return {"context": found, "native": native, "cudnn": torch.backends.cudnn.version(), "gpu_state": gpu_state(),
            "started_s": round(time.time() - STARTED, 1),
            "say": f"{gpu['name']}, torch {torch.__version__}, native {native}"}  # fmt: skip


def _native() -> Any:
    from ragturbo.ops import dispatch

    module = dispatch.native()
    return None if module is None else module.build_info()


def case(case: Case, dtype: torch.dtype, bench: Bench) -> dict[str, Any]:
    """Compare one launch with fp64, and time the first one including compilation."""
    if bench.rehearse and dtype == torch.float16:
        dtype = torch.float32
    torch.manual_seed(0)
    call = case.make(bench.device, dtype)
    start = time.monotonic()
    call()
    _wait(bench)
    first = time.monotonic() - start
    found = kernel_oracles.compare(case.op, call)
    within = 0.0 if case.op == "to_uint8" else kernel_oracles.WITHIN[dtype]
    error, control = found["relative_error"], found["control"]
    good = error <= within and control > 10 * max(within, error)
    say = "" if good else f"error {error:.2e}, allowed {within:.0e}, control {control:.2e}"
    return {"ok": good, **found, "within": within, "first_call_s": round(first, 3), "say": say}


def bits(bench: Bench) -> dict[str, Any]:
    """Check exact results: slerp at w = 0 and 1, the scaled residual at λ = 0."""
    from ragturbo.ops import scaled_residual, slerp

    wrong = []
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for scale in (1.0,) if bench.rehearse else (1.0, 1e-3, 50.0):
            t, r = (
                scale * _random(bench, 2, TOKENS, 64 if bench.rehearse else CHANNELS, dtype=dtype) for _ in range(2)
            )
            for per in ("sample", "token"):
                one, zero = (torch.full((2,), w, device=bench.device) for w in (1.0, 0.0))
                for w, expected in ((one, t), (zero, r)):
                    out = slerp(t, r, w, per=per, impl="triton")
                    if not torch.equal(out, expected):
                        off = (out != expected).float().mean().item()
                        wrong.append(f"slerp {_name(dtype)} per {per} w={w[0].item():.0f} ×{scale:g}: {off:.1%} differ")
            out = scaled_residual(t, torch.full_like(r, torch.nan), torch.zeros(2, device=bench.device), impl="triton")
            if not torch.equal(out, t):
                wrong.append(f"scaled_residual {_name(dtype)} λ=0")
    return {"ok": not wrong, "wrong": wrong, "say": "; ".join(wrong[:3])}


def gather(bench: Bench) -> dict[str, Any]:
    """Compare gathered rows, from page-locked and device memory, with indexing."""
    from ragturbo.ops import Rows, describe, gather_rows

    wrong, count = [], 32 if bench.rehearse else 512
    for stored, record in (("float16", 2 * TOKENS * CHANNELS), ("int8", TOKENS * CHANNELS + 4 * TOKENS)):
        there = torch.randint(0, 60, (count, record), dtype=torch.uint8, device=bench.device)
        host = there.cpu() if bench.rehearse else there.cpu().pin_memory()
        ids = torch.tensor([3, 0, count - 1, -1, 17, 3, 2**40], device=bench.device)
        for place, table in (("host", host), ("device", there)):
            rows = Rows(describe(table.data_ptr(), count, bench.device), record, TOKENS, CHANNELS, stored)
            expected = _rows(there, ids, stored)
            for impl in _implementations(bench, "gather_rows"):
                if not torch.equal(gather_rows(rows, ids, impl=impl), expected):
                    wrong.append(f"{impl} {stored} from {place}")
    return {"ok": not wrong, "wrong": wrong, "say": "; ".join(wrong)}


def _rows(table: Tensor, ids: Tensor, stored: str) -> Tensor:
    inside = (ids >= 0) & (ids < len(table))
    row, values = table[torch.where(inside, ids, 0)], TOKENS * CHANNELS
    if stored == "float16":
        out = row.view(torch.float16).view(-1, TOKENS, CHANNELS)
    else:
        scales = row[:, values:].contiguous().view(torch.float32)[..., None]
        out = (row[:, :values].contiguous().view(torch.int8).view(-1, TOKENS, CHANNELS).float() * scales).half()
    return torch.where(inside[:, None, None], out, 0)


def topk(bench: Bench) -> dict[str, Any]:
    """Compare exact search over 630,000 keys with fp64."""
    from ragturbo.ops import describe
    from ragturbo.ops import topk as search

    keys, wrong = _keys(bench), []
    descriptor = describe(keys.data_ptr(), len(keys), bench.device)
    for queries, k in ((1, 1), (1, 4), (4, 16)):
        query = torch.nn.functional.normalize(_random(bench, queries, KEY_WIDTH), dim=-1)
        exact = torch.cat([part.double() @ query.double().T for part in keys.split(65_536)]).T.topk(k)
        for impl in _implementations(bench, "topk"):
            rows, scores = search(descriptor, query, k, impl=impl)
            if not torch.equal(rows, exact.indices) or not torch.allclose(scores.double(), exact.values, atol=1e-6):
                wrong.append(f"{impl} {queries} queries k {k}")
    return {"ok": not wrong, "wrong": wrong, "keys": len(keys), "say": "; ".join(wrong)}


def split_k(bench: Bench) -> dict[str, Any]:
    """Check that 2,000 split-K linears on two streams all give the same bits."""
    from ragturbo.kernels import linear

    n, k = (32 if bench.rehearse else CHANNELS), 4 * CHANNELS
    x, w = _random(bench, 1, TOKENS, k, dtype=torch.float16), (_random(bench, n, k) * k**-0.5).half()
    first = linear.forward(x, [w])
    differing, rounds = torch.zeros((), dtype=torch.int64, device=bench.device), 2 if bench.rehearse else 1000
    streams = [None, None] if bench.rehearse else [torch.cuda.Stream() for _ in range(2)]
    counts = [differing.clone() for _ in streams]
    _wait(bench)
    for _ in range(rounds):
        for stream, count in zip(streams, counts, strict=True):
            with torch.cuda.stream(stream) if stream is not None else torch.no_grad():
                count += (linear.forward(x, [w]) != first).any()
    _wait(bench)
    wrong = int(sum(counts))
    return {"ok": wrong == 0, "calls": 2 * rounds, "differing": wrong, "say": f"{wrong} differ" if wrong else ""}


def adapter(bench: Bench) -> dict[str, Any]:
    """Compare graph replays of the adapter with eager calls, over eight sets of weights, which exceed the L2."""
    from ragturbo.model.adapter import HSpaceAdapter

    width = 64 if bench.rehearse else CHANNELS
    dtype = torch.float32 if bench.rehearse else torch.float16
    sets = []
    for i in range(8):
        torch.manual_seed(i)
        with torch.device(bench.device):
            made = HSpaceAdapter(width)
            torch.nn.init.normal_(made.proj_out.weight, std=width**-0.5)
        sets.append(made.to(dtype).eval().requires_grad_(False))
    h, rows = _random(bench, 1, TOKENS, width, dtype=dtype), _random(bench, 1, 1, TOKENS, width, dtype=dtype)
    lam = torch.full((1,), 0.7, device=bench.device)
    impl = "auto" if bench.rehearse else "triton"

    def call(one: Any) -> Tensor:
        return one(h, rows, lam, impl=impl)

    eager = [call(one) for one in sets]
    exact = sets[0](h, rows, lam, impl="reference")
    error = float((eager[0] - exact).float().norm() / (exact - h).float().norm())
    found: dict[str, Any] = {
        "relative_error": error,
        "of_another_set": float((eager[1] - exact).float().norm() / exact.norm()),
    }
    if bench.rehearse:
        return {"ok": error < 1e-2, **found}
    replayed: list[Tensor] = []
    run = captured(lambda one: replayed.append(call(one)) or replayed[-1], [(one,) for one in sets], len(sets))
    replayed = replayed[-len(sets) :]
    run()
    same = all(torch.equal(a, b) for a, b in zip(replayed, eager, strict=True))
    times = [t / len(sets) for t in sample(run, seconds=0.5, least=20)]
    p = percentiles(times)
    return {"ok": same and error < 1e-2, "replay_equals_eager": same, "with_k_and_v_s": p, **found,
            "say": f"{1e6 * p['p50']:.1f} µs with K and V, error {error:.1e}, bits equal: {same}"}  # fmt: skip


def form(name: str, bench: Bench) -> dict[str, Any]:
    """Compare a Generator's replays with the uncaptured steps, bit for bit, and with plain torch."""
    from ragturbo.bench.agreement import disagreement, latent_agreement

    mode, options = FORMS[name]
    words = ["a boat on the water with a lighthouse", "a red fox beside a river"]

    def draw(gen: Any, i: int) -> Any:
        return gen(words[i % 2], seed=i, mode=mode, output_type="uint8")

    with bench.generator(capture=False, **options) as called:
        expected = [draw(called, i).images for i in range(3)]
        eager_s = percentiles([once(lambda: draw(called, 3)) for _ in range(3)])["p50"]
        with bench.generator(**options) as gen:
            start = time.monotonic()
            got = [draw(gen, i).images for i in range(3)]
            recorded = time.monotonic() - start
            same = all((a == b).all() for a, b in zip(got, expected, strict=True))
            ways = gen.info["ways"]
            plain = {} if bench.rehearse else ways["plain batches"]
            times = percentiles([once(lambda i=i: draw(gen, i)) for i in range(3 if bench.rehearse else 40)])
            stages = dict(draw(gen, 1).timings)
            agreement = latent_agreement(bench.bundle, gen, mode, words)
    why = disagreement(agreement, bench.bundle.dtype)
    say = f"{1e3 * times['p50']:.2f} ms, bits equal: {same}, latents {agreement['error']:.1e} from plain torch"
    return {"ok": bool(same and not plain and why is None), "replay_equals_call": bool(same), "plain": plain,
            "agreement": agreement, "why_not": why, "p50_s": times, "eager_p50_s": eager_s, "recorded_s": recorded,
            "stages": stages, "ways": ways, "say": "; ".join(map(str, filter(None, (say, why, plain))))}  # fmt: skip


def profile(bench: Bench) -> dict[str, Any]:
    """Profile three images by kernel."""
    from ragturbo.bench import profile as profiling

    trace = bench.folder / "trace.json"
    with bench.generator(retriever="exact") as gen:
        words = ["a boat", "a fox", "a castle"]
        profiling.run(gen, words, 3, mode="adapter")
        with profiling.traced(gen, trace):
            profiling.run(gen, words, 3, mode="adapter")
    return {"images": 3, **profiling.summary(trace, most=80)}


def group_norm(bench: Bench) -> dict[str, Any]:
    """Time the VAE's largest GroupNorms beside torch's and a copy of the same tensor."""
    from torch.nn import functional as F

    from ragturbo.ops import group_norm as op

    dtype = torch.float32 if bench.rehearse else torch.float16
    out = {}
    for channels, size in ((64, 16),) if bench.rehearse else ((128, 512), (256, 512), (512, 256), (320, 64)):
        w, b = (_random(bench, channels, dtype=dtype) for _ in range(2))
        one = _random(bench, 1, channels, size, size, dtype=dtype).contiguous(memory_format=torch.channels_last)
        inputs = [(one.clone(),) for _ in range(3 if size > 64 else 24)]
        impl = "reference" if bench.rehearse else "triton"
        found = op(one, 32, w, b, silu=True, impl=impl)
        exact = op(one.double(), 32, w.double(), b.double(), silu=True, impl="reference")
        error = float((found.double() - exact).norm() / exact.norm())
        target = torch.empty_like(one)
        ours = bench.seconds(lambda x, w=w, b=b, impl=impl: op(x, 32, w, b, silu=True, impl=impl), inputs)
        theirs = bench.seconds(lambda x, w=w, b=b: F.silu(F.group_norm(x, 32, w, b)), inputs)
        copy = bench.seconds(lambda x, target=target: target.copy_(x), inputs)
        out[f"{channels}×{size}²"] = {"error": error, "ours": ours, "torch": theirs, "copy": copy}
    good = all(row["error"] <= kernel_oracles.WITHIN[dtype] for row in out.values())
    return {"ok": good, "rows": out, "say": _medians(out, "ours", "torch", "copy")}


def topk_variants(bench: Bench) -> dict[str, Any]:
    """Time exact search with several tiles, by the CUDA kernel and as a matrix product, beside one read of the keys."""
    from ragturbo.ops import describe
    from ragturbo.ops import topk as search

    keys = _keys(bench)
    descriptor = describe(keys.data_ptr(), len(keys), bench.device)
    inputs = [(torch.nn.functional.normalize(_random(bench, 1, KEY_WIDTH), dim=-1),) for _ in range(8)]
    rows: dict[str, Any] = {"default": {}}
    if not bench.rehearse:
        variants = (16, 1024, 8, 2), (8, 1024, 4, 4), (8, 1024, 4, 7), (4, 1024, 4, 8), (8, 1024, 8, 2)
        for bn, bd, warps, programs in variants:
            tile = {"BN": bn, "BD": bd, "num_warps": warps, "PER_PROCESSOR": programs}
            rows[f"BN {bn} BD {bd} warps {warps} programs {programs}"] = {"tile": tile}
    expected = search(descriptor, inputs[0][0], 4, impl="triton")[0]
    for row in rows.values():
        with tiles.forced("topk", row.get("tile", {})):
            row["right"] = torch.equal(search(descriptor, inputs[0][0], 4, impl="triton")[0], expected)
            row["seconds"] = bench.seconds(lambda q: search(descriptor, q, 4, impl="triton"), inputs)
    if "cuda" in _implementations(bench, "topk"):
        right = torch.equal(search(descriptor, inputs[0][0], 4, impl="cuda")[0], expected)
        rows["csrc"] = {
            "right": right,
            "seconds": bench.seconds(lambda q: search(descriptor, q, 4, impl="cuda"), inputs),
        }
    rows["matrix product"] = {"right": True, "seconds": bench.seconds(lambda q: (q.half() @ keys.T).topk(4), inputs)}
    rows["one read"] = {"right": True, "seconds": bench.seconds(lambda q: keys.view(torch.int32).sum(), inputs)}
    say = ", ".join(f"{n} {1e6 * r['seconds']['p50']:.0f}" for n, r in rows.items())
    return {"ok": all(row["right"] for row in rows.values()), "rows": rows, "say": f"µs: {say}"}


def gather_rate(bench: Bench) -> dict[str, Any]:
    """Time gathering random rows from page-locked memory beside a copy of as many bytes."""
    from ragturbo.ops import Rows, describe, gather_rows

    record, count = 2 * TOKENS * CHANNELS, 64 if bench.rehearse else 6000
    table = torch.randint(0, 60, (count, record), dtype=torch.uint8, device=bench.device).cpu()
    table = table if bench.rehearse else table.pin_memory()
    rows = Rows(describe(table.data_ptr(), count, bench.device), record, TOKENS, CHANNELS, "float16")
    out: dict[str, Any] = {}
    for n in (1,) if bench.rehearse else (1, 16, 64):
        turns = 2 if bench.rehearse else 24
        inputs = [(torch.randint(0, count, (n,), device=bench.device),) for _ in range(turns)]
        target = torch.empty(n, record, dtype=torch.uint8, device=bench.device)
        parts = [(table[i * n : (i + 1) * n],) for i in range(min(turns, count // n))]
        row = {"copy": bench.seconds(lambda part, target=target: target.copy_(part, non_blocking=True), parts)}
        for impl in _implementations(bench, "gather_rows"):
            row[impl] = bench.seconds(lambda ids, impl=impl: gather_rows(rows, ids, impl=impl), inputs)
        out[f"{n} rows"] = row
    return {"rows": out, "say": _medians(out, *out["1 rows"])}


def _medians(rows: dict[str, Any], *names: str) -> str:
    return "µs: " + "; ".join(
        f"{label} " + ", ".join(f"{n} {1e6 * row[n]['p50']:.1f}" for n in names) for label, row in rows.items()
    )


def _keys(bench: Bench) -> Tensor:
    if not hasattr(bench, "keys"):
        keys = torch.empty(500 if bench.rehearse else 630_000, KEY_WIDTH, dtype=torch.float16, device=bench.device)
        torch.manual_seed(1)
        for part in keys.split(65_536):
            part.copy_(torch.nn.functional.normalize(torch.randn(part.shape, device=bench.device), dim=-1))
        bench.keys = keys  # type: ignore[attr-defined]
    return bench.keys  # type: ignore[attr-defined,no-any-return]


def _implementations(bench: Bench, op: str) -> list[str]:
    from ragturbo.ops import dispatch

    return [name for name in ("triton", "cuda") if dispatch.refusal(op, name, bench.device) is None]


def _random(bench: Bench, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=bench.device).to(dtype)


def _wait(bench: Bench) -> None:
    if not bench.rehearse:
        torch.cuda.synchronize()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    sys.exit(main())
