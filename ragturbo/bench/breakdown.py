"""The paper's Fig. 6 on this machine: who waits how long for an image, and for what.

Profile "paper" runs eager modules in sequence (fp16 UNet, fp32 VAE, search on the CPU), "turbo" runs our engine. Other
GPUs appear as projections alone.
"""

from __future__ import annotations

import copy
import logging
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ragturbo.bench import projection
from ragturbo.bench.ceilings import ceilings
from ragturbo.bench.counts import Counts, stage_counts
from ragturbo.bench.models import clustered_keys, make_bundle, make_database
from ragturbo.bench.paper import ROWS, figure
from ragturbo.bench.peers import equal, generated, latent_agreement, refused, relative_error
from ragturbo.bench.prompts import prompts
from ragturbo.bench.sequence import RETRIEVAL, teacher_evaluations
from ragturbo.bench.sequence import Sequence as EagerSequence
from ragturbo.bench.step_record import write_json
from ragturbo.bench.timing import captured, noise, once, percentiles, sample
from ragturbo.errors import InvalidRequest
from ragturbo.machine import NOISE_LIMIT, describe, gpu, gpu_state, now, throttled

if TYPE_CHECKING:
    from ragturbo.model.bundle import Bundle

log = logging.getLogger("ragturbo")
LABELS = {
    "teacher": "SD 2.1, 50 steps, CFG 7.5",
    "lcm": "LCM, 4 steps",
    "turbo": "SD Turbo, 1 step",
    "ours": "ImageRAGTurbo, 1 step",
    "uncached": "ours, pairs encoded at request",
}
# Reproduced means the paper's own card and its own numbers within this.
REPRODUCED_WITHIN = 0.05


@dataclass(frozen=True)
class Settings:
    config: str = "sd21"
    """"sd21" or "rehearsal", with random weights; or a model's name or folder, whose weights are its own."""
    device: str = "cuda"
    prompts: int = 100
    teacher_prompts: int = 5
    teacher_steps: int = 50
    pairs: int = 4096
    """Rows of the database features are read from."""
    keys: int = 630_000
    """Keys that are searched."""
    profiles: tuple[str, ...] = ("paper", "turbo")
    quick: bool = False

    @property
    def random(self) -> bool:
        return self.config in ("sd21", "rehearsal")


def breakdown(
    settings: Settings, on_row: Callable[[str, str], None] | None = None, out: Path | None = None
) -> dict[str, Any]:
    """Everything Fig. 6 shows, as one JSON-able record. on_row(profile, kind) is called before each measurement.

    out: where the record is written at the end, and before each measurement what is done of it, of kind
    "breakdown-part".
    """
    dtype = torch.float16 if settings.device == "cuda" else torch.float32
    with tempfile.TemporaryDirectory(prefix="ragturbo-breakdown-") as folder, torch.inference_mode():
        bundle = _bundle(settings, dtype)
        database = _database(settings, bundle, Path(folder))
        search = Search(settings, bundle, database)

        def tell(profile: str, kind: str) -> None:
            if out is not None:
                write_json(out, {**record, "kind": "breakdown-part"})
            if on_row is not None:
                on_row(profile, kind)

        record: dict[str, Any] = {
            "kind": "breakdown",
            "datetime": now(),
            "context": describe(),
            "ceilings": {settings.device: ceilings(settings.device, settings.quick)},
            "model": bundle.name,
            "weights": "random" if settings.random else "trained",
            "dtype": str(dtype).removeprefix("torch."),
            "pixels": bundle.default_size,
            "batch": 1,
            "search": search.describe,
            "rows": len(database),
            "profiles": {},
        }
        states = [_gpu_state(settings)]
        if "paper" in settings.profiles:
            _paper(settings, bundle, database, search, tell, record["profiles"].setdefault("paper", {}))
            states.append(_gpu_state(settings))
        # Before the engine lays the weights out anew: a projection is of the eager modules as diffusers has them.
        record["projection"] = _projection(settings, bundle, record)
        if "turbo" in settings.profiles:
            _turbo(settings, bundle, database, search, tell, record["profiles"].setdefault("turbo", {}))
            states.append(_gpu_state(settings))
        record["gpu_states"] = [s for s in states if s]
        record["flags"] = _flags(record, states)
    if out is not None:
        write_json(out, record)
    return record


def _bundle(settings: Settings, dtype: torch.dtype) -> Bundle:
    from ragturbo.model.bundle import Bundle

    if settings.random:
        return make_bundle(settings.config, settings.device, dtype)
    return Bundle.load(settings.config, device=settings.device, dtype=dtype)


def _database(settings: Settings, bundle: Bundle, folder: Path) -> Any:
    from ragturbo.retrieval import Database

    if bundle.database_path is not None:
        return Database.open(bundle.database_path)
    return make_database(bundle, folder / "db", settings.pairs)


class Search:
    """Search as the paper does it, ScaNN on the CPU over `keys` keys; where ScaNN is missing, exact on the CPU.

    Ids beyond the database's rows are folded into it: the search is over all keys, the rows read are those there are.
    Both profiles search by it: the engine takes it as a retriever.
    """

    name = "breakdown"

    def __init__(self, settings: Settings, bundle: Bundle, database: Any) -> None:
        from ragturbo.retrieval import scann

        self._ids = np.asarray(database.ids)
        own = np.asarray(database.keys(self._ids))
        extra = max(0, settings.keys - len(own))
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
        """One key's best one: all that Fig. 6 asks for."""
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
    settings: Settings, bundle: Bundle, database: Any, search: Search, tell: Callable[[str, str], None],
    rows: dict[str, Any],
) -> None:  # fmt: skip
    """Fills `rows`, kind by kind."""
    dtype = bundle.dtype
    with_search: dict[str, Any] = {"search": search, "database": database}
    pixels = torch.rand((1, 3, bundle.default_size, bundle.default_size), generator=torch.Generator().manual_seed(0))

    def pair(id: int) -> tuple[str, torch.Tensor]:
        return f"the picture of pair {id}", pixels * 2 - 1

    def lcm() -> EagerSequence:
        other = make_bundle("rehearsal-lcm" if settings.config == "rehearsal" else "lcm", settings.device, dtype)
        return EagerSequence(other, "lcm", steps=4)

    kinds: dict[str, Callable[[], EagerSequence]] = {
        "teacher": lambda: EagerSequence(bundle, "teacher", steps=settings.teacher_steps, guidance=7.5),
        "lcm": lcm,
        "turbo": lambda: EagerSequence(bundle, "turbo", steps=1),
        "ours": lambda: EagerSequence(bundle, "ours", steps=1, **with_search),
        "uncached": lambda: EagerSequence(bundle, "ours", steps=1, uncached=pair, **with_search),
    }
    for kind, make in kinds.items():
        if kind in ("ours", "uncached") and bundle.adapter is None:
            rows[kind] = {"skipped": f"{bundle.name} has no adapter"}
            continue
        if kind == "lcm" and not settings.random:
            rows[kind] = {"skipped": f"{bundle.name} has no LCM of its own"}
            continue
        tell("paper", kind)
        count = min(settings.teacher_prompts, settings.prompts) if kind == "teacher" else settings.prompts
        rows[kind] = _time_sequence(make(), prompts(count))


def _time_sequence(run: EagerSequence, words: list[str]) -> dict[str, Any]:
    # Twice before the clock: lazy libraries, convolution plans. The teacher's long way needs it once.
    for i in range(1 if run.kind == "teacher" else 2):
        run(words[-1 - i % len(words)], 10_000 + i)
    timed = [run(word, seed) for seed, word in enumerate(words)]
    return _row([t.seconds for t in timed], [t.stages for t in timed])


def _turbo(
    settings: Settings, bundle: Bundle, database: Any, search: Search, tell: Callable[[str, str], None],
    rows: dict[str, Any],
) -> None:  # fmt: skip
    """Fills `rows`, kind by kind."""
    from ragturbo.config import GeneratorConfig
    from ragturbo.generate import Generator

    words = prompts(settings.prompts)
    config = GeneratorConfig(batch_sizes=(1,), retriever=search)
    with Generator(bundle, database=database, config=config) as gen:
        modes = {"turbo": "none", "ours": "adapter"}
        agreement = {}
        for kind, mode in modes.items():
            if mode == "adapter" and bundle.adapter is None:
                rows[kind] = {"skipped": f"{bundle.name} has no adapter"}
                continue
            # Two prompts even where one is timed: the second is the control.
            agreement[kind] = found = _agreement(bundle, gen, mode, prompts(2))
            tell("turbo", kind)
            for i in range(3):
                gen(words[-1 - i % len(words)], seed=10_000 + i, mode=mode, output_type="pil")
            seconds, stages = [], []
            for seed, word in enumerate(words):
                start = time.perf_counter()
                out: Any = gen(word, seed=seed, mode=mode)
                seconds.append(time.perf_counter() - start)
                timings = dict(out.timings)
                timings.pop("total", None)
                stages.append(timings)
            rows[kind] = {**_row(seconds, stages), "engine": gen.info["engine"]}
            if why := refused(gen.info, "graph" if settings.device == "cuda" else "auto", bundle.dtype):
                # A time of plain torch is not the engine's.
                rows[kind] = {"skipped": why}
            elif why := equal(found, bundle.dtype):
                # Not the same work: the time is kept, and does not stand beside the paper's.
                rows[kind] = {"skipped": why, "unverified": rows[kind]}
        if gen.info["engine"] == "graph" and all("seconds" in rows[kind] for kind in modes):
            # Search and gathering run beside the encoder there: what they cost is what the whole takes longer.
            _split(rows["ours"], max(0.0, rows["ours"]["seconds"]["mean"] - rows["turbo"]["seconds"]["mean"]))
    rows["agreement"] = agreement


def _agreement(bundle: Bundle, gen: Any, mode: str, words: list[str]) -> dict[str, float]:
    """The engine's latents against plain torch's, with the controls that must fail; in mode none, against the eager
    sequence's as well, the larger error of the two."""
    found = latent_agreement(bundle, gen, mode, words)
    if mode == "none":
        sequence = EagerSequence(bundle, "turbo", steps=1)(words[0], 0).latents
        error = relative_error(generated(gen, mode)(words[0], 0, 0), sequence)
        found["error"] = max(found["error"], error)
    return found


def _row(seconds: list[float], stages: Sequence[dict[str, float]]) -> dict[str, Any]:
    names = list(dict.fromkeys(name for entry in stages for name in entry))
    mean = {name: sum(entry.get(name, 0.0) for entry in stages) / len(stages) for name in names}
    row = {"seconds": percentiles(seconds), "images": len(seconds), "noise": noise(seconds), "stages": mean}
    return _split(row, sum(mean.get(name, 0.0) for name in RETRIEVAL))


def _split(row: dict[str, Any], retrieval: float) -> dict[str, Any]:
    """Fig. 6's two parts: what is not retrieval is denoising."""
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


def _projection(settings: Settings, bundle: Bundle, record: dict[str, Any]) -> dict[str, Any]:
    """To an L40S, from counts at the published sizes; with this GPU's own fractions where one was measured on them."""
    # fp32 convolutions run in TF32 unless told otherwise, and the fp32 VAE is convolutions.
    tf32 = bool(torch.backends.cudnn.allow_tf32)
    config, other = ("rehearsal", "rehearsal-lcm") if settings.config == "rehearsal" else ("sd21", "lcm")
    real = settings.config == "sd21"
    eager = stage_counts(config, torch.float16, vae_dtype=torch.float32)
    guided = stage_counts(config, torch.float16, batch=2, vae_dtype=torch.float32)
    lcm = stage_counts(other, torch.float16, vae_dtype=torch.float32)
    single = stage_counts(config, torch.float16)
    # The teacher decodes one image, whatever its guidance doubles.
    teacher = {**guided, "vae": eager["vae"]}
    here = gpu()
    short = projection.known(here["name"]) if here else None
    reached: dict[str, float] = {}
    launch_s = record["ceilings"][settings.device]["launch_s"]
    basis = "a lower bound: no GPU with a datasheet was measured at these sizes"
    if here and short and real:
        try:
            reached, launch_s = _measure_fractions(bundle, eager, projection.GPUS[short], tf32)
            basis = f"made with fractions and host time a launch measured on {here['name']}"
            if "adapter" not in reached:
                basis += "; the adapter's is a lower bound: this bundle has none"
        except RuntimeError as error:  # a stage that cannot be captured must not cost the measurements before it
            basis = f"a lower bound: measuring {here['name']}'s fractions failed ({error})"
    host = {s: t for s, t in record["profiles"].get("paper", {}).get("ours", {}).get("stages", {}).items()
            if real and s in ("search", "tokenize")}  # fmt: skip
    tokenizer = {s: t for s, t in host.items() if s == "tokenize"}

    def kind(counts: dict[str, Counts], evaluations: int, measured: dict[str, float], adapter: bool) -> dict[str, Any]:
        chosen = {s: c for s, c in counts.items() if adapter or s != "adapter"}
        return {"counts": chosen, "evaluations": evaluations, "measured": measured}

    kinds = {
        "teacher": kind(teacher, teacher_evaluations(50), tokenizer, False),
        "lcm": kind(lcm, 4, tokenizer, False),
        "turbo": kind(eager, 1, tokenizer, False),
        "ours": kind(eager, 1, host, True),
    }
    rows = projection.project(kinds, "L40S", reached=reached, launch_s=launch_s, tf32=tf32)
    for name in ROWS if config == "sd21" else ():
        rows[name]["error_to_paper"] = rows[name]["seconds"] / (figure(f"latency.{name}") / 1e3) - 1
    return {
        "target": "L40S",
        "basis": basis,
        "tf32": tf32,
        "fractions": reached,
        "launch_s": launch_s,
        "rows": rows,
        "held_out": projection.held_out(single, reached) if config == "sd21" else [],
    }


def _measure_fractions(
    bundle: Bundle, counts: dict[str, Counts], here: projection.Datasheet, tf32: bool
) -> tuple[dict[str, float], float]:
    """Device time of each eager stage as a graph's replay, and host time a launch as what its enqueuing takes."""
    from ragturbo.model.vae import VAE

    size = bundle.unet.unet.config.sample_size
    where, dtype = bundle.device, bundle.dtype
    ids = bundle.text.tokenize(prompts(1)).input_ids.to(where)
    text = bundle.text.encode(ids).hidden_states
    noise_in = torch.randn((1, bundle.vae.channels, size, size), device=where, dtype=dtype)
    timestep = torch.full((1,), 999.0, device=where)
    state = bundle.unet.encode(noise_in, timestep, text)
    vae = VAE(torch.nn.Module.to(copy.deepcopy(bundle.vae.module), torch.float32))
    calls: dict[str, Callable[[], Any]] = {
        "text": lambda: bundle.text.text_encoder(input_ids=ids),
        "encode": lambda: bundle.unet.encode(noise_in, timestep, text),
        "decode": lambda: bundle.unet.decode(state),
        "vae": lambda: vae.decode(noise_in),
    }
    if (adapter := bundle.adapter) is not None:
        h_tgt = state.h.flatten(2).transpose(1, 2)
        h_retr = torch.randn_like(h_tgt)[:, None]
        lam, valid = torch.full((1,), 0.5, device=where), torch.ones((1, 1), dtype=torch.bool, device=where)
        # As counted: torch's own layers, not the fused ops.
        calls["adapter"] = lambda: adapter(h_tgt, h_retr, lam, valid, impl="sdpa")
    device_seconds, host = {}, 0.0
    for stage, call in calls.items():
        replay = captured(call, [()], 1)
        device_seconds[stage] = percentiles(sample(replay, seconds=0.3))["p50"]
        torch.cuda.synchronize()
        enqueue = min(_enqueue(call) for _ in range(10))
        if stage in ("encode", "decode"):
            host += enqueue
    launches = counts["encode"].launches + counts["decode"].launches
    return projection.fractions(device_seconds, counts, here, tf32=tf32), host / launches


def _enqueue(call: Callable[[], Any]) -> float:
    """Host seconds until the call returns, the device idle before and left to finish after."""
    torch.cuda.synchronize()
    seconds = once(call)
    torch.cuda.synchronize()
    return seconds
