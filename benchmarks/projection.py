"""Project the paper's Fig. 6 to an L40S: counted FLOPs and bytes, its datasheet, and the efficiency measured here.

`python -m benchmarks.projection [breakdown.json]` prints the projected times. The efficiency of each stage is measured
on this machine's GPU if it has a datasheet below; otherwise the times are lower bounds. Search and tokenizer times are
taken from the breakdown. A projection is not a measurement: nothing in it is fitted to the paper, and its error on
published figures is printed with it.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.ceilings import launch_time
from benchmarks.counts import Counts, stage_counts
from benchmarks.timing import captured, once, sample
from ragturbo.bench.eager import PNDM
from ragturbo.bench.models import SCHEDULE, make_bundle
from ragturbo.bench.paper import figure
from ragturbo.bench.prompts import prompts
from ragturbo.bench.timing import percentiles
from ragturbo.machine import gpu
from ragturbo.model.bundle import Bundle


@dataclass(frozen=True)
class Datasheet:
    """Dense peaks with fp32 accumulation, from the vendor's datasheets."""

    fp16: float
    tf32: float
    fp32: float
    bytes_per_s: float

    def rate(self, dtype: str, tf32: bool) -> float:
        if dtype in ("float16", "bfloat16"):
            return self.fp16
        return self.tf32 if tf32 else self.fp32


GPUS = {
    "L40S": Datasheet(362.05e12, 183e12, 91.6e12, 864e9),
    "A100": Datasheet(312e12, 156e12, 19.5e12, 2039e9),
    "RTX 4090": Datasheet(165.2e12, 82.6e12, 82.6e12, 1008e9),
    "H100": Datasheet(989.4e12, 494.7e12, 66.9e12, 3350e9),
    "H200": Datasheet(989.4e12, 494.7e12, 66.9e12, 4800e9),
}
# One image by one step of sd-turbo with the full VAE, batch 1: ONNX Runtime with a CUDA graph, from its team's tables
# for the optimized sd-turbo (described in huggingface.co/blog/sdxl_ort_inference, January 2024).
PUBLISHED = {"A100": 38.2e-3, "RTX 4090": 36.5e-3}


def known(name: str) -> str | None:
    """Return the datasheet's name for a GPU ("NVIDIA H200" -> "H200"), or None."""
    return next((short for short in GPUS if short.lower() in name.lower().split("nvidia ")[-1]), None)


def floor(counts: Counts, gpu: Datasheet, *, tf32: bool) -> float:
    """Return the larger of arithmetic time, each dtype at its own rate, and the eager ops' bytes over bandwidth."""
    arithmetic = sum(flops / gpu.rate(dtype, tf32) for dtype, flops in counts.flops.items())
    return max(arithmetic, counts.eager_bytes / gpu.bytes_per_s)


def fractions(
    device_seconds: Mapping[str, float], counts: Mapping[str, Counts], here: Datasheet, *, tf32: bool
) -> dict[str, float]:
    """Return each stage's efficiency on this GPU: floor over device time."""
    return {
        stage: floor(counts[stage], here, tf32=tf32) / seconds
        for stage, seconds in device_seconds.items()
        if stage in counts and seconds > 0
    }


@dataclass(frozen=True)
class Projected:
    host: float
    device: float

    @property
    def seconds(self) -> float:
        return max(self.host, self.device)

    @property
    def bound_by(self) -> str:
        return "host" if self.host > self.device else "device"


def project_stage(
    counts: Counts, target: Datasheet, *, fraction: float, launch_s: float, tf32: bool, evaluations: int = 1
) -> Projected:
    """Return the host's launch time and the device's time of all evaluations of a stage."""
    host = counts.launches * launch_s * evaluations
    return Projected(host, floor(counts, target, tf32=tf32) / fraction * evaluations)


def project(
    kinds: Mapping[str, Mapping[str, Any]], target: str, *, reached: Mapping[str, float], launch_s: float, tf32: bool
) -> dict[str, dict[str, Any]]:
    """Project each kind of model to the target GPU.

    Args:
        kinds: name -> {"counts": {stage: Counts}, "evaluations": int, "measured": {stage: seconds}}. "measured" are
            host stages, which do not depend on the GPU. UNet stages count once per evaluation.
        reached: efficiency by stage; a stage without one gets 1, a lower bound.
    """
    out: dict[str, dict[str, Any]] = {}
    for name, kind in kinds.items():
        found = {
            stage: project_stage(
                counts, GPUS[target], fraction=reached.get(stage, 1.0), launch_s=launch_s, tf32=tf32,
                evaluations=kind["evaluations"] if stage in ("encode", "adapter", "decode") else 1,
            )
            for stage, counts in kind["counts"].items()
        }  # fmt: skip
        stages = {stage: projected.seconds for stage, projected in found.items()} | kind.get("measured", {})
        bound_by = {stage: projected.bound_by for stage, projected in found.items()}
        out[name] = {"seconds": sum(stages.values()), "stages": stages, "bound_by": bound_by}
    return out


def held_out(counts: Mapping[str, Counts], reached: Mapping[str, float]) -> list[dict[str, Any]]:
    """Compare the projection of one fp16 image in a CUDA graph with published figures."""
    rows = []
    for name, published in PUBLISHED.items():
        stages = [s for s in counts if s != "adapter"]
        seconds = sum(floor(counts[s], GPUS[name], tf32=True) / reached.get(s, 1.0) for s in stages)
        rows.append({"gpu": name, "published_s": published, "projected_s": seconds, "error": seconds / published - 1})
    return rows


def to_l40s(record: Mapping[str, Any], config: str = "sd21") -> dict[str, Any]:
    """Project to an L40S.

    Args:
        record: a breakdown of the same config, for the times of search and tokenizer; may be empty.
    """
    # fp32 convolutions run in TF32 by default, and the fp32 VAE is convolutions.
    tf32 = bool(torch.backends.cudnn.allow_tf32)
    eager = stage_counts(config, torch.float16, vae_dtype=torch.float32)
    guided = stage_counts(config, torch.float16, batch=2, vae_dtype=torch.float32)
    lcm = stage_counts("rehearsal-lcm" if config == "rehearsal" else "lcm", torch.float16, vae_dtype=torch.float32)
    here = gpu()
    short = known(here["name"]) if here else None
    reached: dict[str, float] = {}
    basis = "a lower bound: no GPU with a datasheet is available here"
    if here and short:
        reached, launch_s = measure_efficiency(make_bundle(config, "cuda", torch.float16), eager, GPUS[short], tf32)
        basis = f"made with the efficiency and the host time per launch measured on {here['name']}"
    else:
        launch_s = launch_time("cpu")
    stages = record.get("profiles", {}).get("paper", {}).get("ours", {}).get("stages", {})
    host = {stage: stages[stage] for stage in ("search", "tokenize") if stage in stages}
    tokenizer = {stage: seconds for stage, seconds in host.items() if stage == "tokenize"}

    def without_adapter(counts: dict[str, Counts], evaluations: int) -> dict[str, Any]:
        plain = {stage: found for stage, found in counts.items() if stage != "adapter"}
        return {"counts": plain, "evaluations": evaluations, "measured": tokenizer}

    kinds = {
        # The teacher decodes one image although guidance doubles the UNet's batch.
        "teacher": without_adapter({**guided, "vae": eager["vae"]}, _pndm_steps(50)),
        "lcm": without_adapter(lcm, 4),
        "turbo": without_adapter(eager, 1),
        "ours": {"counts": eager, "evaluations": 1, "measured": host},
    }
    rows = project(kinds, "L40S", reached=reached, launch_s=launch_s, tf32=tf32)
    if config == "sd21":
        for name, row in rows.items():
            row["error_to_paper"] = row["seconds"] / (figure(f"latency.{name}") / 1e3) - 1
    return {
        "target": "L40S",
        "basis": basis,
        "tf32": tf32,
        "fractions": reached,
        "launch_s": launch_s,
        "rows": rows,
        "held_out": held_out(stage_counts(config, torch.float16), reached) if config == "sd21" else [],
    }


def _pndm_steps(steps: int) -> int:
    """Return the number of evaluations: PNDM evaluates its second timestep twice, 51 for 50 steps."""
    from diffusers import PNDMScheduler

    scheduler: Any = PNDMScheduler(**SCHEDULE, **PNDM)
    scheduler.set_timesteps(steps)
    return len(scheduler.timesteps)


@torch.inference_mode()
def measure_efficiency(
    bundle: Bundle, counts: dict[str, Counts], here: Datasheet, tf32: bool
) -> tuple[dict[str, float], float]:
    """Measure each eager stage's device time as a graph replay, and the host time per launch as its enqueue time."""
    from ragturbo.model.vae import VAE

    size = bundle.unet.unet.config.sample_size
    where, dtype = bundle.device, bundle.dtype
    ids = bundle.text.tokenize(prompts(1)).input_ids.to(where)
    text = bundle.text.encode(ids).hidden_states
    noise = torch.randn((1, bundle.vae.channels, size, size), device=where, dtype=dtype)
    timestep = torch.full((1,), 999.0, device=where)
    state = bundle.unet.encode(noise, timestep, text)
    vae, adapter = VAE(torch.nn.Module.to(copy.deepcopy(bundle.vae.module), torch.float32)), bundle.adapter
    assert adapter is not None
    h_tgt = state.h.flatten(2).transpose(1, 2)
    h_retr = torch.randn_like(h_tgt)[:, None]
    lam, valid = torch.full((1,), 0.5, device=where), torch.ones((1, 1), dtype=torch.bool, device=where)
    calls: dict[str, Callable[[], Any]] = {
        "text": lambda: bundle.text.text_encoder(input_ids=ids),
        "encode": lambda: bundle.unet.encode(noise, timestep, text),
        "decode": lambda: bundle.unet.decode(state),
        "vae": lambda: vae.decode(noise),
        # As counted: torch's own layers, not the fused ops.
        "adapter": lambda: adapter(h_tgt, h_retr, lam, valid, impl="sdpa"),
    }
    device_seconds, host = {}, 0.0
    for stage, call in calls.items():
        replay = captured(call, [()], 1)
        device_seconds[stage] = percentiles(sample(replay, seconds=0.3))["p50"]
        if stage in ("encode", "decode"):
            host += min(_enqueue(call) for _ in range(10))
    launches = counts["encode"].launches + counts["decode"].launches
    return fractions(device_seconds, counts, here, tf32=tf32), host / launches


def _enqueue(call: Callable[[], Any]) -> float:
    """Return the host time until the call returns, starting with an idle device."""
    torch.cuda.synchronize()
    seconds = once(call)
    torch.cuda.synchronize()
    return seconds


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.projection", description=__doc__)
    parser.add_argument("breakdown", type=Path, nargs="?", help="JSON of `ragturbo bench breakdown` for sd21")
    parser.add_argument("--out", type=Path, help="write the projection as JSON")
    options = parser.parse_args(argv)
    found = to_l40s(json.loads(options.breakdown.read_text("utf-8")) if options.breakdown else {})
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    print(f"Projection to an L40S, {found['basis']}")
    for name, row in found["rows"].items():
        print(f"{name}: {row['seconds'] * 1e3:.1f} ms, {row['error_to_paper']:+.0%} of the paper's")
    for row in found["held_out"]:
        print(f"held out, {row['gpu']}: {row['projected_s'] * 1e3:.1f} ms, published {row['published_s'] * 1e3:.1f} ms")
    return 0


if __name__ == "__main__":
    sys.exit(main())
