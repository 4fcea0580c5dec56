"""What another GPU would take: counted FLOPs and bytes, its datasheet, and how much of this GPU's we reach here.

A projection is no measurement and is never printed as one. Nothing in it is fitted to the paper: it takes counts,
datasheets and this machine's own fractions, and its error on published figures stands beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ragturbo.bench.counts import Counts


@dataclass(frozen=True)
class Datasheet:
    """Dense peaks, fp32 accumulation, by the vendor's datasheets."""

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
# Whole images by one step of sd-turbo, full VAE, batch 1: ONNX Runtime with a CUDA graph, by its own team's tables for
# the optimised sd-turbo (the work told of in huggingface.co/blog/sdxl_ort_inference, January 2024).
PUBLISHED = {"A100": 38.2e-3, "RTX 4090": 36.5e-3}


def known(name: str) -> str | None:
    """ "NVIDIA H200" -> "H200"; None for a GPU without a datasheet here."""
    return next((short for short in GPUS if short.lower() in name.lower().split("nvidia ")[-1]), None)


def floor(counts: Counts, gpu: Datasheet, *, tf32: bool) -> float:
    """Seconds: the larger of arithmetic, each dtype at its own rate, and the eager ops' bytes over bandwidth."""
    arithmetic = sum(flops / gpu.rate(dtype, tf32) for dtype, flops in counts.flops.items())
    return max(arithmetic, counts.eager_bytes / gpu.bytes_per_s)


def fractions(
    device_seconds: Mapping[str, float], counts: Mapping[str, Counts], here: Datasheet, *, tf32: bool
) -> dict[str, float]:
    """How much of this GPU's floor each stage reaches: floor over device time, host gaps excluded."""
    return {
        stage: floor(counts[stage], here, tf32=tf32) / seconds
        for stage, seconds in device_seconds.items()
        if stage in counts and seconds > 0
    }


@dataclass(frozen=True)
class Projected:
    seconds: float
    host: float
    device: float

    @property
    def bound_by(self) -> str:
        return "host" if self.host > self.device else "device"


def project_stage(
    counts: Counts, target: Datasheet, *, fraction: float, launch_s: float, tf32: bool, evaluations: int = 1
) -> Projected:
    """The larger of the host's launches and the device's work, times the evaluations of this stage."""
    host = counts.launches * launch_s * evaluations
    device = floor(counts, target, tf32=tf32) / fraction * evaluations
    return Projected(max(host, device), host, device)


def project(
    kinds: Mapping[str, Mapping[str, Any]], target: str, *, reached: Mapping[str, float], launch_s: float, tf32: bool
) -> dict[str, dict[str, Any]]:
    """kinds: name -> {"counts": {stage: Counts}, "evaluations": int, "measured": {stage: seconds}}.

    `measured` are host stages (search, tokenizer) that another GPU does not change: taken as they are here. Stages of
    the UNet count once an evaluation. A fraction of 1 is a lower bound, and is what a stage never measured gets.
    """
    gpu = GPUS[target]
    out: dict[str, dict[str, Any]] = {}
    for name, kind in kinds.items():
        stages: dict[str, float] = {}
        bound: dict[str, str] = {}
        for stage, counts in kind["counts"].items():
            times = kind["evaluations"] if stage in ("encode", "adapter", "decode") else 1
            found = project_stage(
                counts, gpu, fraction=reached.get(stage, 1.0), launch_s=launch_s, tf32=tf32, evaluations=times
            )
            stages[stage], bound[stage] = found.seconds, found.bound_by
        stages |= kind.get("measured", {})
        out[name] = {"seconds": sum(stages.values()), "stages": stages, "bound_by": bound}
    return out


def held_out(counts: Mapping[str, Counts], reached: Mapping[str, float]) -> list[dict[str, Any]]:
    """Our projection of one fp16 image in a graph, which has no launches to wait for, against published figures."""
    rows = []
    for name, published in PUBLISHED.items():
        stages = [s for s in counts if s != "adapter"]
        seconds = sum(floor(counts[s], GPUS[name], tf32=True) / reached.get(s, 1.0) for s in stages)
        rows.append({"gpu": name, "published_s": published, "projected_s": seconds, "error": seconds / published - 1})
    return rows
