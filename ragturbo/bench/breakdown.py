"""The paper's Fig. 6 measured on this machine: latency of teacher, LCM, SD Turbo and ImageRAGTurbo, by stage.

Profile "paper" runs eager modules in sequence (fp16 UNet, fp32 VAE, search on the CPU), profile "turbo" a Generator.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ragturbo.bench.agreement import disagreement, engine_mismatch, generator_latents, latent_agreement, relative_error
from ragturbo.bench.eager import RETRIEVAL, EagerPipeline
from ragturbo.bench.models import clustered_keys, make_bundle, make_database
from ragturbo.bench.paper import PROFILES, RANDOM_WEIGHTS
from ragturbo.bench.prompts import prompts
from ragturbo.bench.timing import noise, percentiles
from ragturbo.config import GeneratorConfig
from ragturbo.errors import InvalidRequest
from ragturbo.generate import Generator
from ragturbo.machine import NOISE_LIMIT, describe, gpu_state, now, throttled
from ragturbo.model.bundle import Bundle
from ragturbo.retrieval import Database


@dataclass(frozen=True)
class Settings:
    """
    Args:
        config: "sd21" or "rehearsal", with random weights; or the name or folder of a trained model.
        pairs: size of the database that features are read from, with random weights.
        keys: number of keys to search.
    """

    config: str = "sd21"
    device: str = "cuda"
    prompts: int = 100
    teacher_prompts: int = 5
    teacher_steps: int = 50
    pairs: int = 4096
    keys: int = 630_000
    profiles: tuple[str, ...] = PROFILES

    @property
    def random(self) -> bool:
        return self.config in RANDOM_WEIGHTS


# Called before each measurement with the profile, the kind and the record so far.
Progress = Callable[[str, str, dict[str, Any]], None]


def breakdown(settings: Settings, progress: Progress = lambda profile, kind, record: None) -> dict[str, Any]:
    """Measure every bar of Fig. 6 and return a JSON-serializable record.

    Args:
        progress: called before each measurement with the profile, the kind and the record so far, of kind
            "breakdown-part".
    """
    dtype = torch.float16 if settings.device == "cuda" else torch.float32
    with tempfile.TemporaryDirectory(prefix="ragturbo-breakdown-") as folder, torch.inference_mode():
        if settings.random:
            bundle = make_bundle(settings.config, settings.device, dtype)
        else:
            bundle = Bundle.load(settings.config, device=settings.device, dtype=dtype)
        if bundle.database_path is not None:
            database = Database.open(bundle.database_path)
        else:
            database = make_database(bundle, Path(folder) / "db", settings.pairs)
        search = Search(settings.keys, database)
        record: dict[str, Any] = {
            "kind": "breakdown",
            "datetime": now(),
            "context": describe(),
            "model": bundle.name,
            "weights": "random" if settings.random else "trained",
            "dtype": str(dtype).removeprefix("torch."),
            "pixels": bundle.default_size,
            "batch": 1,
            "search": search.describe,
            "rows": len(database),
            "profiles": {},
        }

        def before(profile: str, kind: str) -> None:
            progress(profile, kind, {**record, "kind": "breakdown-part"})

        states = [_gpu_state(settings)]
        # The eager profile first: the engine changes the layout of the weights.
        for profile, measure in (("paper", _paper), ("turbo", _turbo)):
            if profile in settings.profiles:
                measure(settings, bundle, database, search, before, record["profiles"].setdefault(profile, {}))
                states.append(_gpu_state(settings))
    record["gpu_states"] = [s for s in states if s]
    record["flags"] = _flags(record, states)
    return record


class Search:
    """The paper's search: ScaNN on the CPU over `count` keys, or exact search if ScaNN is not installed.

    Both profiles use it; the engine takes it as a retriever. Ids beyond the database's rows are folded into them.
    """

    name = "breakdown"

    def __init__(self, count: int, database: Database) -> None:
        from ragturbo.retrieval import scann

        self._ids = np.asarray(database.ids)
        own = np.asarray(database.keys(self._ids))
        extra = max(0, count - len(own))
        more = clustered_keys(extra, own.shape[1], np.random.default_rng(1)) if extra else own[:0]
        keys = np.concatenate([own, more])
        self._searcher: Any = None
        if scann.available():
            self._searcher = scann.build_searcher(keys, scann.ScannConfig.by_size(len(keys)))
        else:
            self._keys = torch.from_numpy(keys)
        self.describe = {
            "keys": len(keys),
            "by": "ScaNN on the CPU" if self._searcher is not None else "exact on the CPU: scann is not installed",
        }

    def search(self, keys: torch.Tensor, k: int, *, exclude: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
        if keys.shape[0] != 1 or k != 1 or exclude is not None:
            raise InvalidRequest("the breakdown searches one neighbour of one prompt")
        key = keys[0].float().cpu()
        if self._searcher is not None:
            found, scores = self._searcher.search(key.numpy(), final_num_neighbors=1)
            row, score = int(found[0]), float(scores[0])
        else:
            best = (self._keys @ key).max(0)
            row, score = int(best.indices), float(best.values)
        return torch.tensor([[int(self._ids[row % len(self._ids)])]]), torch.tensor([[score]])


def _paper(
    settings: Settings, bundle: Bundle, database: Any, search: Search, before: Callable[[str, str], None],
    rows: dict[str, Any],
) -> None:  # fmt: skip
    with_search: dict[str, Any] = {"search": search, "database": database}
    pixels = torch.rand((1, 3, bundle.default_size, bundle.default_size), generator=torch.Generator().manual_seed(0))

    def pair(id: int) -> tuple[str, torch.Tensor]:
        return f"the picture of pair {id}", pixels * 2 - 1

    def lcm() -> EagerPipeline:
        config = "rehearsal-lcm" if settings.config == "rehearsal" else "lcm"
        return EagerPipeline(make_bundle(config, settings.device, bundle.dtype), "lcm", steps=4)

    kinds: dict[str, Callable[[], EagerPipeline]] = {
        "teacher": lambda: EagerPipeline(bundle, "teacher", steps=settings.teacher_steps, guidance=7.5),
        "lcm": lcm,
        "turbo": lambda: EagerPipeline(bundle, "turbo", steps=1),
        "ours": lambda: EagerPipeline(bundle, "ours", steps=1, **with_search),
        "uncached": lambda: EagerPipeline(bundle, "ours", steps=1, uncached=pair, **with_search),
    }
    for kind, make in kinds.items():
        if kind in ("ours", "uncached") and bundle.adapter is None:
            rows[kind] = {"skipped": f"{bundle.name} has no adapter"}
            continue
        if kind == "lcm" and not settings.random:
            rows[kind] = {"skipped": f"{bundle.name} has no LCM of its own"}
            continue
        before("paper", kind)
        run = make()
        words = prompts(min(settings.teacher_prompts, settings.prompts) if kind == "teacher" else settings.prompts)
        # Warm-up: lazy loading and convolution plans.
        for i in range(1 if kind == "teacher" else 2):
            run(words[-1 - i % len(words)], 10_000 + i)
        timed = [run(word, seed) for seed, word in enumerate(words)]
        rows[kind] = _row([t.seconds for t in timed], [t.stages for t in timed])


def _turbo(
    settings: Settings, bundle: Bundle, database: Any, search: Search, before: Callable[[str, str], None],
    rows: dict[str, Any],
) -> None:  # fmt: skip
    words = prompts(settings.prompts)
    config = GeneratorConfig(batch_sizes=(1,), retriever=search, dtype=bundle.dtype)
    with Generator(bundle, database=database, config=config) as gen:
        modes = {"turbo": "none", "ours": "adapter"}
        agreement = {}
        for kind, mode in modes.items():
            if mode == "adapter" and bundle.adapter is None:
                rows[kind] = {"skipped": f"{bundle.name} has no adapter"}
                continue
            agreement[kind] = found = _agreement(bundle, gen, mode, prompts(2))
            before("turbo", kind)
            for i in range(3):
                gen(words[-1 - i % len(words)], seed=10_000 + i, mode=mode, output_type="pil")
            seconds, stages = [], []
            for seed, word in enumerate(words):
                start = time.perf_counter()
                out: Any = gen(word, seed=seed, mode=mode)
                seconds.append(time.perf_counter() - start)
                stages.append({name: value for name, value in out.timings.items() if name != "total"})
            rows[kind] = {**_row(seconds, stages), "engine": gen.info["engine"]}
            if why := engine_mismatch(gen.info, "graph" if settings.device == "cuda" else "auto", bundle.dtype):
                rows[kind] = {"skipped": why}
            elif why := disagreement(found, bundle.dtype):
                # Different work: the time is kept in the record but not shown beside the paper's.
                rows[kind] = {"skipped": why, "unverified": rows[kind]}
        if gen.info["engine"] == "graph" and all("seconds" in rows[kind] for kind in modes):
            # Search and gathering overlap the encoder there, so their cost is the difference of the two totals.
            _split(rows["ours"], max(0.0, rows["ours"]["seconds"]["mean"] - rows["turbo"]["seconds"]["mean"]))
    rows["agreement"] = agreement


def _agreement(bundle: Bundle, gen: Any, mode: str, words: list[str]) -> dict[str, float]:
    """Compare with plain torch and, in mode "none", with the eager pipeline; return the larger error."""
    found = latent_agreement(bundle, gen, mode, words)
    if mode == "none":
        eager = EagerPipeline(bundle, "turbo", steps=1)(words[0], 0).latents
        found["error"] = max(found["error"], relative_error(generator_latents(gen, mode)(words[0], 0, 0), eager))
    return found


def _row(seconds: list[float], stages: Sequence[dict[str, float]]) -> dict[str, Any]:
    names = list(dict.fromkeys(name for entry in stages for name in entry))
    mean = {name: sum(entry.get(name, 0.0) for entry in stages) / len(stages) for name in names}
    row = {"seconds": percentiles(seconds), "images": len(seconds), "noise": noise(seconds), "stages": mean}
    return _split(row, sum(mean.get(name, 0.0) for name in RETRIEVAL))


def _split(row: dict[str, Any], retrieval: float) -> dict[str, Any]:
    """Set the two parts that Fig. 6 shows."""
    row |= {"retrieval": retrieval, "denoising": row["seconds"]["mean"] - retrieval}
    return row


def _flags(record: dict[str, Any], states: list[Any]) -> list[str]:
    flags = [f"throttled: {reason}" for reason in throttled(states)]
    for profile, rows in record["profiles"].items():
        for kind, row in rows.items():
            if row.get("noise", 0.0) > NOISE_LIMIT:
                flags.append(f"{profile} {kind}: noise {row['noise']:.1%}")
    if record["weights"] == "random":
        flags.append("random weights: latency does not depend on their values")
    return flags


def _gpu_state(settings: Settings) -> Any:
    return gpu_state() if settings.device == "cuda" else None
