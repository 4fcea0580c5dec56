"""The steps of the GPU script: one function each, which records figures by budget, their noise and details.

A step first compares what it times with a reference. If they disagree, its figures are recorded as unverified (see
`StepRecord`). Every step runs in a process of its own and writes its record after each phase. With `rehearse` the same
code runs at tiny sizes on any machine; a rehearsal's figures are never results.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from benchmarks.diffusers_peer import Diffusers, agreement
from benchmarks.step_record import StepRecord
from benchmarks.timing import captured, interleaved, once, sample
from ragturbo.bench import profile as profiling
from ragturbo.bench.agreement import (
    CONTROLS_BY,
    WITHIN,
    disagreement,
    engine_mismatch,
    latent_agreement,
    relative_error,
)
from ragturbo.bench.prompts import prompts
from ragturbo.bench.timing import noise, percentiles

# Rounding errors of the UNet's and the adapter's outputs are larger than those of latents by this factor.
PARTS_BY = 5
# Time limit for the requests of `tail`.
TAIL_SECONDS = 40.0
# Size of the database, except for `added`.
PAIRS = 1024


@dataclass(frozen=True)
class Scale:
    rehearse: bool = False
    quick: bool = False

    @property
    def device(self) -> str:
        return "cpu" if self.rehearse else "cuda"

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.rehearse else torch.float16

    @property
    def config(self) -> str:
        return "rehearsal" if self.rehearse else "sd21"

    @property
    def engine(self) -> str:
        """The expected engine; a rehearsal takes plain torch, which "auto" chooses on a CPU."""
        return "auto" if self.rehearse else "graph"

    def count(self, full: int, quick: int) -> int:
        return 3 if self.rehearse else quick if self.quick else full


def measure(name: str, scale: Scale, out: Path | None = None) -> dict[str, Any]:
    """Run a step and return its record. out: file to write it to after every phase."""
    record = StepRecord(out, has_gpu=not scale.rehearse)
    record.look()
    STEPS[name](scale, record)
    record.look()
    record.save()
    return record.to_dict()


@lru_cache(maxsize=1)
def _bundle(scale: Scale) -> Any:
    """Steps in one process share the model."""
    from ragturbo.bench.models import make_bundle

    return make_bundle(scale.config, scale.device, scale.dtype)


def _folder(needed: int = 4 << 30) -> tempfile.TemporaryDirectory[str]:
    """Return a temporary folder, in /dev/shm if it has room for `needed` bytes, since the disk may be slow."""
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and shutil.disk_usage(memory).free > 2 * needed
    return tempfile.TemporaryDirectory(dir=memory if roomy else None)


def _database(scale: Scale, bundle: Any, folder: str, count: int = PAIRS) -> Any:
    from ragturbo.bench.models import make_database

    return make_database(bundle, Path(folder) / "db", 64 if scale.rehearse else count)


def _generator(scale: Scale, bundle: Any, database: Any, **options: Any) -> Any:
    from ragturbo.config import GeneratorConfig
    from ragturbo.generate import Generator

    return Generator(bundle, database=database, config=GeneratorConfig(engine=scale.engine, **options))


def _requests(gen: Any, mode: str, start: int = 0) -> Callable[[], Any]:
    words, turn = prompts(1152), iter(range(start, 10**9))

    def run() -> Any:
        i = next(turn)
        return gen(words[i % len(words)], seed=i, mode=mode, output_type="uint8")

    return run


def _peer(peer: Diffusers) -> Callable[[], Any]:
    words, turn = prompts(200), iter(range(10**9))

    def run() -> Any:
        i = next(turn)
        return peer([words[i % 200]], [i])

    return run


def _mismatch(scale: Scale, gen: Any) -> str | None:
    return engine_mismatch(gen.info, scale.engine, scale.dtype)


def _differs(found: dict[str, dict[str, float]], scale: Scale) -> str | None:
    """Return why the first failing comparison fails, or None."""
    reasons = ((name, disagreement(entry, scale.dtype)) for name, entry in found.items())
    return next((f"{name}: {why}" for name, why in reasons if why is not None), None)


def _compare(
    record: StepRecord, scale: Scale, bundle: Any, gen: Any, more: Callable[[], dict[str, Any]] = dict
) -> None:
    """Compare both modes with plain torch, and run the comparisons of `more`."""
    found: dict[str, Any] = {}
    with record.phase("comparison"):
        for mode in ("none", "adapter"):
            found[mode] = latent_agreement(bundle, gen, mode, prompts(2))
            record.save(agreement=found)
        found |= more()
        record.save(agreement=found)
        record.verify(_differs(found, scale))


def image(scale: Scale, record: StepRecord) -> None:
    """Time one image with the adapter, alone and interleaved with eager diffusers."""
    bundle = _bundle(scale)
    with _folder() as folder:
        database = _database(scale, bundle, folder)
        with _generator(scale, bundle, database, retriever="exact", batch_sizes=(1,)) as gen:
            peers: list[Diffusers] = []

            def against_diffusers() -> dict[str, Any]:
                peers.append(Diffusers(bundle))
                words = prompts(2)
                return {"diffusers": agreement(_draw(gen), peers[0], words[:1], words[1:])}

            _compare(record, scale, bundle, gen, against_diffusers)
            with record.phase("alone"):
                alone = sample(_requests(gen, "adapter", 200), seconds=0.1 if scale.rehearse else 5, least=3)
                record.look()
                record.withhold(_mismatch(scale, gen))
                p50 = percentiles(alone)
                record.save(
                    figures={"image_p50_s": p50["p50"]}, alone=p50, noise={"alone": noise(alone)}, pairs=len(database)
                )
            with record.phase("interleaved"):
                peer = peers[0] if peers else Diffusers(bundle)
                runs = {
                    "ours": _requests(gen, "adapter"),
                    "ours, no retrieval": _requests(gen, "none"),
                    "diffusers": _peer(peer),
                }
                times = interleaved(runs, rounds=scale.count(60, 15))
                record.look()
                spread = _spread(times)
                ratio = spread["diffusers"]["p50"] / spread["ours"]["p50"]
                record.save(figures={"faster_than_diffusers": ratio}, interleaved=spread, noise=_noises(times))
            with record.phase("stages"):
                out = gen(prompts(1)[0], seed=1, mode="adapter", output_type="uint8")
                stages = dict(out.timings)
                record.withhold(_mismatch(scale, gen))
                record.save(stages=stages, stages_over_total=_stages_over_total(stages), info=gen.info)
            # Last, because a profiler may fail or slow down the process.
            with record.phase("trace"):
                trace = Path(folder) / "trace.json"
                with profiling.traced(gen, trace):
                    profiling.run(gen, prompts(3), 3, mode="adapter")
                record.save(trace_of_3_images=profiling.summary(trace))


def _draw(gen: Any) -> Any:
    return lambda words, seeds, output: gen(words, seed=seeds, mode="none", output_type=output).images


def _spread(times: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    return {name: percentiles(values) for name, values in times.items()}


def _noises(times: dict[str, list[float]]) -> dict[str, float]:
    return {name: noise(values) for name, values in times.items()}


def _stages_over_total(stages: dict[str, float]) -> float:
    """Return the device time of the consecutive stages over the host time of the call."""
    names = ("tokenize", "queue", "text", "encode", "adapter", "decode", "vae", "copy")
    return sum(stages.get(name, 0.0) for name in names) / stages["total"]


def compiled_peer(scale: Scale, record: StepRecord) -> None:
    """Time diffusers with torch.compile(reduce-overhead, channels_last), whose cache may be cold."""
    bundle = _bundle(scale)
    with _folder() as folder:
        database = _database(scale, bundle, folder, 256)
        # Compiling for a CPU takes minutes, so a rehearsal does not compile.
        peer = Diffusers(bundle, compile=not scale.rehearse)
        theirs = _peer(peer)
        # The second call records its graphs, which clears cuBLAS's workspaces. Ours are recorded after that.
        record.save(peer=peer.name, first_calls_s=[once(theirs) for _ in range(3)])
        with _generator(scale, bundle, database, retriever="exact", batch_sizes=(1,)) as gen:

            def against_eager() -> dict[str, Any]:
                words = prompts(2)
                return {"compiled": agreement(peer, Diffusers(bundle), words[:1], words[1:])}

            _compare(record, scale, bundle, gen, against_eager)
            with record.phase("interleaved"):
                times = interleaved({"ours": _requests(gen, "adapter"), "compiled": theirs}, rounds=scale.count(60, 20))
                record.look()
                record.withhold(_mismatch(scale, gen))
                spread = _spread(times)
                ratio = spread["compiled"]["p50"] / spread["ours"]["p50"]
                record.save(figures={"faster_than_compiled": ratio}, interleaved=spread, noise=_noises(times))


@torch.inference_mode()
def parts(scale: Scale, record: StepRecord) -> None:
    """Time the UNet and the adapter alone, as graph replays, compared with plain torch."""
    from ragturbo.engine.fast_model import FastModel

    bundle = _bundle(scale)
    model, size = FastModel(bundle), bundle.unet.unet.config.sample_size
    where, dtype = bundle.device, bundle.dtype
    latents = [torch.randn((1, 4, size, size), device=where, dtype=dtype) for _ in range(4)]
    texts = [bundle.text.encode(bundle.text.tokenize([p]).input_ids.to(where)).hidden_states for p in prompts(4)]

    def unet(sample_in: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return model.unet.decode(model.unet.encode(sample_in, 0, model.unet.text_kv(text)))

    state = bundle.unet.encode(latents[0], torch.full((1,), 999.0, device=where), texts[0])
    tokens = state.h.permute(0, 2, 3, 1).flatten(1, 2).contiguous()
    lam = torch.full((1,), 0.5, device=where)
    features = [torch.randn((1, 1, *tokens.shape[1:]), device=where, dtype=dtype) for _ in range(8)]

    def adapter(h_retr: torch.Tensor) -> torch.Tensor:
        return bundle.adapter(tokens, h_retr, lam)

    def same(key: str, ours: Callable[[int], torch.Tensor], reference: Callable[[int], torch.Tensor]) -> None:
        """Compare on input 0; the control is our result on input 1."""
        expected, bar = reference(0), PARTS_BY * WITHIN[dtype]
        error, other = relative_error(ours(0), expected), relative_error(ours(1), expected)
        right = error <= bar and other > max(bar, CONTROLS_BY * error)
        why = None if right else f"{key}: error {error:.1e}, of another input {other:.1e}"
        found[key] = {"error": error, "error_other_input": other}
        record.verify(why, [key])
        record.save(agreement=found)

    found: dict[str, Any] = {}
    with record.phase("comparison of the UNet"):
        same("unet_s", lambda i: unet(latents[i], texts[i]),
             lambda i: bundle.unet.unet(latents[i], model.unet.timesteps[0], texts[i]).sample)  # fmt: skip
    with record.phase("comparison of the adapter"):
        # At λ = 1 the neighbour's effect is largest.
        same("adapter_s", lambda i: bundle.adapter(tokens, features[i], 2 * lam),
             lambda i: bundle.adapter(tokens, features[i], 2 * lam, impl="reference"))  # fmt: skip
    details: dict[str, Any] = {}
    jobs: dict[str, tuple[Callable[..., Any], list[tuple[Any, ...]], int]] = {
        "unet_s": (unet, list(zip(latents, texts, strict=True)), 4),
        "adapter_s": (adapter, [(h,) for h in features], 64),
        # With cuDNN's autotuning. The engine uses cuDNN's heuristics, which choose the same in every process.
        "unet_tuned_s": (unet, list(zip(latents, texts, strict=True)), 4),
    }
    for key, (call, inputs, calls) in jobs.items():
        with record.phase(key):
            torch.backends.cudnn.benchmark = key == "unet_tuned_s"
            run = _eagerly(call, inputs, calls) if scale.rehearse else captured(call, inputs, calls)
            times = [t / calls for t in sample(run, seconds=0.05 if scale.rehearse else 2.0, least=3)]
            record.look()
            details[key] = percentiles(times)
            figures = {} if key == "unet_tuned_s" else {key: details[key]["p50"]}
            record.save(figures=figures, details=details, noise={key: noise(times)})
    torch.backends.cudnn.benchmark = False


def _eagerly(call: Callable[..., Any], inputs: list[tuple[Any, ...]], calls: int) -> Callable[[], None]:
    def run() -> None:
        for i in range(calls):
            call(*inputs[i % len(inputs)])

    return run


def added(scale: Scale, record: StepRecord) -> None:
    """Time what retrieval and adapter add: modes "adapter" and "none" interleaved on one engine.

    630,000 keys are searched, and 65,000 distinct rows are page-locked. Every prompt is new and finds a row of its own
    at a random place. Keys without rows are searched and never found (`large_database.pad_keys`).
    """
    from benchmarks import large_database

    bundle = _bundle(scale)
    wanted = 600 if scale.rehearse else large_database.ROWS
    place, count = large_database.where_and_how_many(bundle, wanted)
    keys = count if scale.rehearse else large_database.KEYS
    record.save(rows=count, keys=keys, flags=[] if count == wanted else [f"memory for {count:,} rows only"])
    with tempfile.TemporaryDirectory(dir=place) as folder:
        start = time.perf_counter()
        own = large_database.prompt_keys(bundle, prompts(min(1152, count)))
        encode_s, start = time.perf_counter() - start, time.perf_counter()
        workers = 2 if scale.rehearse else 16
        database = large_database.write(bundle, Path(folder) / "db", count, workers=workers, own=own)
        record.save(encode_prompts_s=encode_s, write_s=time.perf_counter() - start,
                    rows_bytes=count * database.geometry.record_bytes)  # fmt: skip
        options = {"host_cache": count * database.geometry.stride}
        start = time.perf_counter()
        with _generator(scale, bundle, database, retriever="exact", batch_sizes=(1,), **options) as gen:
            record.save(page_lock_s=time.perf_counter() - start, first_request_s=once(_requests(gen, "adapter", 1100)))
            if not scale.rehearse:
                gen.call(lambda: large_database.pad_keys(gen._engine._tables.keys, keys))
            _compare(record, scale, bundle, gen)
            with record.phase("rows found"):
                words = prompts(min(1152, count))[-20:]
                found = [gen(word, seed=0, mode="adapter").neighbors[0][0].id for word in words]
                record.save(distinct_rows=f"{len(set(found))} of {len(words)}")
                if len(set(found)) < len(words):
                    record.verify("prompts share rows", ["retrieval_added_s"])
            with record.phase("interleaved"):
                runs = {"adapter": _requests(gen, "adapter"), "none": _requests(gen, "none")}
                times = interleaved(runs, rounds=scale.count(500, 100))
                record.look()
                form = "one graph" if scale.rehearse else gen.info["ways"]["retrieval"]
                record.withhold(_mismatch(scale, gen))
                record.withhold(None if form == "one graph" else f"retrieval ran as {form!r}")
                spread = _spread(times)
                difference = spread["adapter"]["p50"] - spread["none"]["p50"]
                pairs = [a - b for a, b in zip(times["adapter"], times["none"], strict=True)]
                record.save(
                    figures={"retrieval_added_s": difference}, share=difference / spread["none"]["p50"],
                    interleaved=spread, paired_p50_s=percentiles(pairs)["p50"], noise=_noises(times), info=gen.info,
                )  # fmt: skip


def tail(scale: Scale, record: StepRecord) -> None:
    """Measure p99 over p50 of 1,000 requests with new prompts, and peak device memory with buckets 1 to 8."""
    bundle = _bundle(scale)
    with _folder() as folder:
        database = _database(scale, bundle, folder)
        with _generator(scale, bundle, database, retriever="exact") as gen:
            _compare(record, scale, bundle, gen)
            run, count = _requests(gen, "adapter", 100), scale.count(1000, 200)
            with record.phase("requests"):
                for _ in range(3):
                    run()
                before, times = _memory(scale), list[float]()
                until = time.perf_counter() + TAIL_SECONDS
                record.look()
                while len(times) < count and time.perf_counter() < until:
                    times.append(once(run))
                record.look()
                record.withhold(_mismatch(scale, gen))
                if len(times) < count:
                    why = f"only {len(times)} of {count:,} requests in {TAIL_SECONDS:.0f} s"
                    record.verify(why, ["p99_over_p50"])
                growth = {name: size - before[name] for name, size in _memory(scale).items()}
                grown = [f"{name} memory grew by {n} bytes over {len(times)} requests" for name, n in growth.items()
                         if n > 0]  # fmt: skip
                p = percentiles(times)
                record.save(
                    figures={"p99_over_p50": p["p99"] / p["p50"]}, seconds=p, noise={"requests": noise(times)},
                    requests=len(times), memory_growth_bytes=growth, flags=grown, info=gen.info,
                )  # fmt: skip
            with record.phase("buckets"):
                if not scale.rehearse:
                    # Without the memory of the comparison.
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
                words = prompts(8)
                # The largest first, as in `warmup`, so that the smaller ones share its memory pool.
                for batch in (8, 4, 2, 1):
                    for mode in ("adapter", "none"):
                        gen(words[:batch], seed=list(range(batch)), mode=mode, output_type="uint8")
                record.save(info=gen.info)
                if not scale.rehearse:
                    reserved, outside = torch.cuda.max_memory_reserved(), _outside_torch()
                    keys = database.geometry.key_dim * 2 * len(database)
                    record.save(
                        figures={"peak_memory_bytes": reserved + outside - keys},
                        reserved_bytes=reserved, outside_torch_bytes=outside,
                    )  # fmt: skip


def _memory(scale: Scale) -> dict[str, int]:
    if scale.rehearse:
        return {}
    held = {"allocated": torch.cuda.memory_allocated(), "reserved": torch.cuda.memory_reserved()}
    return {**held, "outside torch": _outside_torch()}


def _outside_torch() -> int:
    """Return GPU memory outside torch's allocator: context, modules, graphs, other processes."""
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def cold(scale: Scale, record: StepRecord) -> None:
    """Time a fresh process to its first image, with a warm disk cache."""
    from benchmarks.startup import first_image

    # Times of processes: nothing to compare.
    record.verify(None)
    bundle = _bundle(scale)
    with _folder() as folder:
        model = str(bundle.save(Path(folder) / "model"))
        del bundle
        if not scale.rehearse:
            torch.cuda.empty_cache()
        runs: list[dict[str, Any]] = []
        for _ in range(1 if scale.rehearse else 3):
            runs.append(first_image(model, scale.device))
            record.look()
            middle = sorted(runs, key=lambda r: r["total_s"])[len(runs) // 2]
            record.save(figures={"cold_start_s": middle["total_s"]}, runs=runs)


def build(scale: Scale, record: StepRecord) -> None:
    """Time building a database from JPEG files at the model's size."""
    import numpy as np
    from PIL import Image

    from ragturbo.retrieval import Database

    bundle, count = _bundle(scale), scale.count(1024, 256)
    side, words = bundle.default_size, prompts(1024)
    with _folder() as folder:
        images = Path(folder) / "images"
        images.mkdir()

        def draw(i: int) -> None:
            small = Image.fromarray(np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8))
            small.resize((side, side)).save(images / f"{i:05d}.jpg", quality=90)
            (images / f"{i:05d}.txt").write_text(words[i % 1024])

        with ThreadPoolExecutor(8) as threads:
            list(threads.map(draw, range(count)))
        start = time.perf_counter()
        database = Database.build(images, Path(folder) / "db", model=bundle, index=False)
        seconds = time.perf_counter() - start
        record.look()
        record.verify(None if len(database) == count else f"{len(database)} pairs of {count} images")
        record.save(figures={"build_images_per_s": count / seconds}, images=count, seconds=seconds)


STEPS: dict[str, Callable[[Scale, StepRecord], None]] = {
    "image": image,
    "parts": parts,
    "tail": tail,
    "added": added,
    "cold": cold,
    "compiled peer": compiled_peer,
    "build": build,
}
