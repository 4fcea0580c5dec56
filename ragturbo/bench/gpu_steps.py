"""What the GPU script measures, one function a step. Each gives figures by budget name, their noise, and details.

A step first holds what it times against a reference: what is wrong has no time, and the step says why. Every step runs
in a process of its own. With `rehearse` the same lines run at tiny sizes on any machine, so that the script is known to
work before a GPU is lent to it; a rehearsal's figures are never written among results.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ragturbo.bench.context import NOISE_LIMIT, gpu_state, throttled
from ragturbo.bench.peers import CONTROLS_BY, WITHIN, Diffusers, agreement, equal, latent_agreement, relative_error
from ragturbo.bench.prompts import prompts
from ragturbo.bench.timing import captured, interleaved, noise, once, percentiles, sample
from ragturbo.engine import profile as profiling

# Asks for the card's state: beside a measurement, never within one.
Look = Callable[[], None]
# What the UNet gives, and the adapter, lies this much farther apart by rounding than the latents made of it.
PARTS_BY = 5


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
        """A rehearsal has no CUDA graphs: "auto" is then the eager engine."""
        return "auto" if self.rehearse else "graph"

    def count(self, full: int, quick: int) -> int:
        return 3 if self.rehearse else quick if self.quick else full


def _bundle(scale: Scale) -> Any:
    from ragturbo.bench.models import make_bundle

    return make_bundle(scale.config, scale.device, scale.dtype)


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


def measure(name: str, scale: Scale) -> dict[str, Any]:
    """A step, the card's states while it ran, and what makes its figures doubtful."""
    states: list[Any] = []

    def look() -> None:
        if not scale.rehearse:
            states.append(gpu_state())

    look()
    found = STEPS[name](scale, look)
    look()
    flags = [*found.get("flags", []), *(f"throttled: {reason}" for reason in throttled(states))]
    flags += [f"noise {share:.1%} ({row})" for row, share in found.get("noise", {}).items() if share > NOISE_LIMIT]
    return {**found, "gpu_states": states, "flags": flags}


def _withheld(why: str, agreement: dict[str, Any]) -> dict[str, Any]:
    return {"measured": {}, "withheld": why, "agreement": agreement}


def _differs(found: dict[str, dict[str, float]], scale: Scale) -> str | None:
    """Of comparisons by name, the first that fails, or whose controls do not."""
    reasons = ((name, equal(entry, scale.dtype)) for name, entry in found.items())
    return next((f"{name}: {why}" for name, why in reasons if why is not None), None)


def _modes(bundle: Any, gen: Any) -> dict[str, dict[str, float]]:
    return {mode: latent_agreement(bundle, gen, mode, prompts(2)) for mode in ("none", "adapter")}


def _draw(gen: Any) -> Any:
    return lambda words, seeds, output: gen(words, seed=seeds, mode="none", output_type=output).images


def image(scale: Scale, look: Look) -> dict[str, Any]:
    """One image, ours with the adapter, against diffusers eager: interleaved, and only after latents agree."""
    from ragturbo.bench.models import make_database

    bundle = _bundle(scale)
    with tempfile.TemporaryDirectory() as folder:
        database = make_database(bundle, Path(folder) / "db", scale.count(4096, 1024))
        with _generator(scale, bundle, database, retriever="exact", batch_sizes=(1,)) as gen:
            peer, words = Diffusers(bundle), prompts(200)
            found = {"diffusers": agreement(_draw(gen), peer, words[:1], words[1:2]), **_modes(bundle, gen)}
            if why := _differs(found, scale):
                return _withheld(why, found)
            turn = iter(range(10**9))

            def theirs() -> Any:
                i = next(turn)
                return peer([words[i % 200]], [i])

            runs = {
                "ours": _requests(gen, "adapter"),
                "ours, no retrieval": _requests(gen, "none"),
                "diffusers": theirs,
            }
            look()
            times = interleaved(runs, rounds=scale.count(60, 15))
            look()
            alone = sample(_requests(gen, "adapter", 5000), seconds=0.1 if scale.rehearse else 5, least=3)
            look()
            info, stages = gen.info, dict(gen(words[0], seed=1, mode="adapter", output_type="uint8").timings)
            trace = Path(folder) / "trace.json"
            with profiling.traced(gen, trace):
                profiling.run(gen, words, 3, mode="adapter")
            streams = profiling.summary(trace)
    p50 = {name: percentiles(values) for name, values in times.items()}
    measured = {
        "image_p50_s": percentiles(alone)["p50"],
        "faster_than_diffusers": p50["diffusers"]["p50"] / p50["ours"]["p50"],
    }
    return {"measured": measured, "agreement": found, "interleaved": p50, "alone": percentiles(alone),
            "noise": {"alone": noise(alone), **_noises(times)}, "stages": stages,
            "stages_over_total": _stages_over_total(stages), "trace of 3 images": streams, "info": info}  # fmt: skip


def _noises(times: dict[str, list[float]]) -> dict[str, float]:
    return {name: noise(values) for name, values in times.items()}


def _stages_over_total(stages: dict[str, float]) -> float:
    """What follows one another, by the device's clock, over the whole call by the host's. The rest lies beside."""
    names = ("tokenize", "queue", "text", "encode", "adapter", "decode", "vae", "copy")
    return sum(stages.get(name, 0.0) for name in names) / stages["total"]


def compiled_peer(scale: Scale, look: Look) -> dict[str, Any]:
    """diffusers + torch.compile(max-autotune, channels_last): minutes to compile when its cache is cold."""
    from ragturbo.bench.models import make_database

    bundle = _bundle(scale)
    with tempfile.TemporaryDirectory() as folder:
        database = make_database(bundle, Path(folder) / "db", 256)
        # On a CPU max-autotune needs a compiler and minutes: the rehearsal compiles nothing and runs the same lines.
        peer, eager = Diffusers(bundle, compile=not scale.rehearse), Diffusers(bundle)
        words, turn = prompts(200), iter(range(10**9))

        def theirs() -> Any:
            i = next(turn)
            return peer([words[i % 200]], [i])

        took = once(theirs)
        with _generator(scale, bundle, database, retriever="exact", batch_sizes=(1,)) as gen:
            found = {"compiled": agreement(peer, eager, words[:1], words[1:2]), **_modes(bundle, gen)}
            if why := _differs(found, scale):
                return {**_withheld(why, found), "first_call_s": took}
            look()
            times = interleaved({"ours": _requests(gen, "adapter"), "compiled": theirs}, rounds=scale.count(60, 20))
            look()
    p50 = {name: percentiles(values) for name, values in times.items()}
    return {"measured": {"faster_than_compiled": p50["compiled"]["p50"] / p50["ours"]["p50"]}, "agreement": found,
            "interleaved": p50, "noise": _noises(times), "first_call_s": took}  # fmt: skip


@torch.inference_mode()
def parts(scale: Scale, look: Look) -> dict[str, Any]:
    """The UNet and the adapter by themselves, as replays of graphs, once they give what plain torch gives."""
    from ragturbo.engine.fast import FastModel

    bundle = _bundle(scale)
    model, size = FastModel(bundle), bundle.unet.unet.config.sample_size
    where, dtype = bundle.device, bundle.dtype
    latents = [torch.randn((1, 4, size, size), device=where, dtype=dtype) for _ in range(4)]
    texts = [bundle.text.encode(bundle.text.tokenize([p]).input_ids.to(where)).hidden_states for p in prompts(4)]

    def unet(sample_in: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return model.unet.decode(model.unet.encode(sample_in, 0, model.unet.context(text)))

    state = bundle.unet.encode(latents[0], torch.full((1,), 999.0, device=where), texts[0])
    tokens = state.h.permute(0, 2, 3, 1).flatten(1, 2).contiguous()
    lam = torch.full((1,), 0.5, device=where)
    features = [torch.randn((1, 1, *tokens.shape[1:]), device=where, dtype=dtype) for _ in range(8)]

    def adapter(h_retr: torch.Tensor) -> torch.Tensor:
        return bundle.adapter(tokens, h_retr, lam)

    found = {
        "unet_s": _part(
            lambda i: unet(latents[i], texts[i]),
            lambda i: bundle.unet.unet(latents[i], model.unet.timesteps[0], texts[i]).sample,
        ),
        # At λ = 1, where a neighbour's part is largest.
        "adapter_s": _part(
            lambda i: bundle.adapter(tokens, features[i], 2 * lam),
            lambda i: bundle.adapter(tokens, features[i], 2 * lam, impl="reference"),
        ),
    }
    bar = PARTS_BY * WITHIN[dtype]
    wrong = {
        key: f"{key}: error {part['error']:.1e}, of another input {part['error_other_input']:.1e}"
        for key, part in found.items()
        if not part["error"] <= bar or not part["error_other_input"] > max(bar, CONTROLS_BY * part["error"])
    }
    out, details, noises = {}, {}, {}
    jobs: dict[str, tuple[Callable[..., Any], list[tuple[Any, ...]], int]] = {
        "unet_s": (unet, list(zip(latents, texts, strict=True)), 4),
        # What cuDNN's own choice of convolutions, by timing them, would gain: the engine takes its heuristics, which
        # choose alike in every process.
        "unet_tuned_s": (unet, list(zip(latents, texts, strict=True)), 4),
        "adapter_s": (adapter, [(h,) for h in features], 64),
    }
    for key, (call, inputs, calls) in jobs.items():
        if key.replace("_tuned", "") in wrong:
            continue
        torch.backends.cudnn.benchmark = key.endswith("tuned_s")
        run = _eagerly(call, inputs, calls) if scale.rehearse else captured(call, inputs, calls)
        times = [t / calls for t in sample(run, seconds=0.05 if scale.rehearse else 2.0, least=3)]
        look()
        out[key], details[key] = percentiles(times)["p50"], percentiles(times)
        noises[key] = noise(times)
    torch.backends.cudnn.benchmark = False
    out.pop("unet_tuned_s", None)
    result = {"measured": out, "agreement": found, "details": details, "noise": noises}
    return {**result, "withheld": "; ".join(wrong.values())} if wrong else result


def _part(ours: Callable[[int], torch.Tensor], reference: Callable[[int], torch.Tensor]) -> dict[str, float]:
    """Input 0 by both, and the control: input 1 by ours."""
    expected = reference(0)
    return {"error": relative_error(ours(0), expected), "error_other_input": relative_error(ours(1), expected)}


def _eagerly(call: Callable[..., Any], inputs: list[tuple[Any, ...]], calls: int) -> Callable[[], None]:
    def run() -> None:
        for i in range(calls):
            call(*inputs[i % len(inputs)])

    return run


def added(scale: Scale, look: Look) -> dict[str, Any]:
    """Adapter against none, interleaved, of one engine over as many distinct page-locked rows as the machine holds."""
    from ragturbo.bench import rows

    bundle = _bundle(scale)
    wanted = 600 if scale.rehearse else 100_000 if scale.quick else rows.WANTED
    place, count = rows.where_and_how_many(bundle, wanted)
    with tempfile.TemporaryDirectory(dir=place) as folder:
        took: list[Any] = []
        build_s = once(
            lambda: took.append(rows.write(bundle, Path(folder) / "db", count, workers=2 if scale.rehearse else 16))
        )
        database = took[0]
        options = {"host_cache": int(count * 1.06 + 100) * (database.geometry.record_bytes + 128)}
        with _generator(scale, bundle, database, retriever="exact", batch_sizes=(1,), **options) as gen:
            first_s = once(_requests(gen, "adapter"))
            found = _modes(bundle, gen)
            if why := _differs(found, scale):
                return _withheld(why, found)
            runs = {"adapter": _requests(gen, "adapter"), "none": _requests(gen, "none")}
            look()
            times = interleaved(runs, rounds=scale.count(500, 100))
            look()
            info = gen.info
    p = {name: percentiles(values) for name, values in times.items()}
    difference = p["adapter"]["p50"] - p["none"]["p50"]
    return {
        "measured": {"retrieval_added_s": difference},
        "agreement": found,
        "share": difference / p["none"]["p50"],
        "interleaved": p,
        "noise": _noises(times),
        "keys": count, "rows_bytes": count * database.geometry.record_bytes,
        "write_s": build_s, "first_request_s": first_s, "info": info,
    }  # fmt: skip


def tail(scale: Scale, look: Look) -> dict[str, Any]:
    """1,000 requests, every prompt new: p99 over p50; peak device memory with buckets 1 to 8 recorded."""
    from ragturbo.bench.models import make_database

    bundle = _bundle(scale)
    with tempfile.TemporaryDirectory() as folder:
        database = make_database(bundle, Path(folder) / "db", scale.count(1024, 1024) if not scale.rehearse else 64)
        with _generator(scale, bundle, database, retriever="exact") as gen:
            found = _modes(bundle, gen)
            if why := _differs(found, scale):
                return _withheld(why, found)
            words = prompts(1152)
            for batch in (1, 2, 4, 8):
                gen(words[:batch], seed=list(range(batch)), mode="adapter", output_type="uint8")
                gen(words[:batch], seed=list(range(batch)), mode="none", output_type="uint8")
            run = _requests(gen, "adapter")
            before = _memory(scale)
            look()
            times = [once(run) for _ in range(scale.count(1000, 200))]
            look()
            growth = {name: size - before[name] for name, size in _memory(scale).items()}
            info = gen.info
        keys = database.geometry.key_dim * 2 * len(database)
    p = percentiles(times)
    measured = {"p99_over_p50": p["p99"] / p["p50"]}
    grown = [f"{name} memory grew by {n} bytes over {len(times)} requests" for name, n in growth.items() if n > 0]
    details: dict[str, Any] = {"agreement": found, "seconds": p, "noise": {"requests": noise(times)},
                               "requests": len(times), "info": info, "memory_growth_bytes": growth,
                               "flags": grown}  # fmt: skip
    if not scale.rehearse:
        details["reserved_bytes"] = torch.cuda.max_memory_reserved()
        measured["peak_memory_bytes"] = details["reserved_bytes"] - keys
    return {"measured": measured, **details}


def _memory(scale: Scale) -> dict[str, int]:
    if scale.rehearse:
        return {}
    return {"allocated": torch.cuda.memory_allocated(), "reserved": torch.cuda.memory_reserved()}


def cold(scale: Scale, look: Look) -> dict[str, Any]:
    """A fresh process to its first image; the files were written just now, so the disk's cache is warm."""
    from ragturbo.bench.cold import first_image

    bundle = _bundle(scale)
    with tempfile.TemporaryDirectory() as folder:
        model = str(bundle.save(Path(folder) / "model"))
        del bundle
        if not scale.rehearse:
            torch.cuda.empty_cache()
        runs = []
        for _ in range(1 if scale.rehearse else 3):
            runs.append(first_image(model, scale.device))
            look()
    middle = sorted(runs, key=lambda r: r["total_s"])[len(runs) // 2]
    return {"measured": {"cold_start_s": middle["total_s"]}, "runs": runs}


def build(scale: Scale, look: Look) -> dict[str, Any]:
    """A database built from images at the model's size: decoding, VAE, text encoder, UNet's encoder, writing."""
    import time

    import numpy as np
    from PIL import Image

    from ragturbo.retrieval import Database

    bundle, count = _bundle(scale), scale.count(1024, 256)
    rng, side = np.random.default_rng(0), bundle.default_size
    # JPEG files on disk, as a folder of pairs has them.
    with tempfile.TemporaryDirectory() as folder:
        images, words = Path(folder) / "images", prompts(1024)
        images.mkdir()
        for i in range(count):
            small = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
            small.resize((side, side)).save(images / f"{i:05d}.jpg", quality=90)
            (images / f"{i:05d}.txt").write_text(words[i % 1024])
        start = time.perf_counter()
        database = Database.build(images, Path(folder) / "db", model=bundle, index=False)
        seconds = time.perf_counter() - start
        look()
        assert len(database) == count
    return {"measured": {"build_images_per_s": count / seconds}, "images": count, "seconds": seconds}


STEPS: dict[str, Callable[[Scale, Look], dict[str, Any]]] = {
    "image": image,
    "parts": parts,
    "tail": tail,
    "added": added,
    "cold": cold,
    "compiled peer": compiled_peer,
    "build": build,
}
