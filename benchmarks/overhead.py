"""`python -m benchmarks.overhead`: the overhead of generate() over the same modules called by hand.

Both generate the same images in pairs, in random order, with one torch thread. CPU time of the process and wall time
are compared. In the same way, what search by names and the adapter add to mode "none".
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from benchmarks.timing import summary
from ragturbo.bench.agreement import noise_of
from ragturbo.bench.prompts import prompts
from ragturbo.machine import describe, now
from ragturbo.model.inject import blend_weights, cosine, inject
from ragturbo.model.onestep import make_schedule

if TYPE_CHECKING:
    from ragturbo.model.bundle import Bundle

Draw = Callable[[str, int], np.ndarray]


def by_hand(bundle: Bundle, database: Any = None) -> Draw:
    """Return a function of prompt and seed to uint8 (1, H, W, 3). With a database it computes mode "adapter"."""
    schedule = make_schedule(bundle.scheduler, 1, distilled=bundle.info.distilled, device=bundle.device)

    @torch.inference_mode()
    def draw(prompt: str, seed: int) -> np.ndarray:
        states = bundle.text.encode(bundle.text.tokenize([prompt]).input_ids.to(bundle.device))
        x = noise_of(bundle, [seed]).to(bundle.device) * schedule.init_sigma
        sample = schedule.scale_input(x, 0).to(bundle.dtype)
        if database is None:
            out = bundle.unet.unet(sample, schedule.timesteps[0], states.hidden_states).sample
        else:
            ids, scores = database.search(states.key, bundle.info.num_neighbors)
            similarity = cosine(states.key, database.keys(ids))
            lam, valid = blend_weights(similarity, ids, scores)
            rows = database.features(ids).to(bundle.dtype)
            state = bundle.unet.encode(sample, schedule.timesteps[0], states.hidden_states)
            out = bundle.unet.decode(
                state, inject("adapter", state.h, rows, lam=lam, valid=valid, adapter=bundle.adapter)
            )
        image = bundle.vae.decode(schedule.step(x, out.float(), 0)).float()
        return (image * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()

    return draw


def pairs(library: Draw, hand: Draw, words: Sequence[str], rounds: int, warmups: int = 5) -> dict[str, Any]:
    """Return CPU and wall seconds of `rounds` pairs, and the overhead with its confidence interval."""
    for i in range(warmups):
        library(words[i % len(words)], i), hand(words[i % len(words)], i)
    seconds: dict[str, dict[str, list[float]]] = {clock: {"library": [], "hand": []} for clock in ("processor", "wall")}
    turn = [("library", library), ("hand", hand)]
    chance = random.Random(0)
    for i in range(rounds):
        chance.shuffle(turn)
        for name, draw in turn:
            word = words[i % len(words)]
            begin = time.process_time(), time.perf_counter()
            draw(word, i)
            end = time.process_time(), time.perf_counter()
            seconds["processor"][name].append(end[0] - begin[0])
            seconds["wall"][name].append(end[1] - begin[1])
    out: dict[str, Any] = {"rounds": rounds}
    for clock, taken in seconds.items():
        hand_p50 = statistics.median(taken["hand"])
        added = [a - b for a, b in zip(taken["library"], taken["hand"], strict=True)]
        # 95 % interval of the median: two standard deviations of its rank.
        ordered, half = sorted(added), len(added) ** 0.5
        low, high = (ordered[round(max(0, min(rounds - 1, rounds / 2 + sign * half)))] for sign in (-1, 1))
        out[clock] = {
            "overhead": statistics.median(added) / hand_p50,
            "overhead_95": [low / hand_p50, high / hand_p50],
            # Less sensitive to other processes than the median.
            "overhead_p10": _p10(taken["library"]) / _p10(taken["hand"]) - 1,
            "library_p50_s": statistics.median(taken["library"]),
            "hand_p50_s": hand_p50,
        }
    return {**out, "seconds": seconds}


def _p10(seconds: list[float]) -> float:
    return sorted(seconds)[len(seconds) // 10]


def measure(model: str = "shapes", rounds: int = 200) -> dict[str, Any]:
    """Measure modes "none" and "adapter" of a model on the CPU and return the record."""
    from ragturbo.generate import Generator

    torch.set_num_threads(1)
    words, found = prompts(64), {}
    with Generator.from_pretrained(
        model, device="cpu", dtype="float32", batch_sizes=(1,), retriever="exact", compose=False
    ) as gen:
        bundle = gen._bundle
        if gen.database is not None:
            # Captions of the database, so that the model knows every word.
            words = [record.caption for record in gen.database.records(gen.database.ids[:64])]
        for mode, database in (("none", None), ("adapter", gen.database)):
            if mode == "adapter" and (bundle.adapter is None or database is None):
                continue
            hand = by_hand(bundle, database)

            def library(prompt: str, seed: int, mode: str = mode) -> np.ndarray:
                output: Any = gen(prompt, seed=seed, mode=mode, output_type="uint8")
                return output.images

            difference = int(np.abs(library(words[0], 7).astype(int) - hand(words[0], 7).astype(int)).max())
            assert difference <= 1, f"mode {mode}: the images differ by {difference}"
            found[mode] = pairs(library, hand, words, rounds)
    worst = max(result["wall"]["overhead"] for result in found.values())
    added = None
    if "adapter" in found:
        found[SEARCH] = search_and_adapter(model, words, rounds)
        added = found[SEARCH]["wall"]["overhead"]
    flags = [f"{mode}: {flag}" for mode, result in found.items()
             for flag in summary(result["seconds"]["wall"]["library"])["flags"]]  # fmt: skip
    measured = {"library_overhead": worst, "search_and_adapter": added}
    return {"kind": "overhead", "datetime": now(), "context": describe(), "model": model, "threads": 1,
            "measured": measured, "flags": flags, "modes": found}  # fmt: skip


SEARCH = "adapter with hybrid search by phrase, against mode none"


def search_and_adapter(model: str, words: Sequence[str], rounds: int) -> dict[str, Any]:
    """Pairs of generate() with the adapter and hybrid search by phrase, and in mode "none"."""
    from ragturbo.generate import Generator

    with Generator.from_pretrained(
        model, device="cpu", dtype="float32", batch_sizes=(1,), retriever="hybrid", compose=True
    ) as gen:

        def draw(mode: str) -> Draw:
            def images(prompt: str, seed: int) -> np.ndarray:
                output: Any = gen(prompt, seed=seed, mode=mode, output_type="uint8")
                return output.images

            return images

        return pairs(draw("adapter"), draw("none"), words, rounds)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__)
    parser.add_argument("--model", default="shapes")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--out", type=Path, help="write the record as JSON")
    options = parser.parse_args()
    record = measure(options.model, options.rounds)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    for mode, result in record["modes"].items():
        for clock in ("processor", "wall"):
            at, (low, high) = result[clock], result[clock]["overhead_95"]
            other = "without" if mode == SEARCH else "by hand"
            print(f"{mode}, {clock}: {1e3 * at['library_p50_s']:.2f} ms, {1e3 * at['hand_p50_s']:.2f} ms {other}: "
                  f"{100 * at['overhead']:+.1f} % ({100 * low:+.1f} to {100 * high:+.1f}), "
                  f"{100 * at['overhead_p10']:+.1f} % at the tenth percentile")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
