"""What a run is started with: its settings, and checks of the folders they name. Imports no torch."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ragturbo.config import RETRIEVERS, one_of
from ragturbo.errors import DatabaseError, InvalidRequest, ModelError
from ragturbo.folders import check_writable, make_folder
from ragturbo.model.find import check_model, resolve
from ragturbo.train import checkpoint
from ragturbo.train.config import LADDConfig, built_in_configs, load_config, settle
from ragturbo.train.folder import (
    INDEX,
    NEIGHBORS,
    check_complete,
    read_json,
    read_plan,
    shard_path,
)
from ragturbo.train.settings import or_list

CONFIG, CHECKPOINTS = "config.yaml", "checkpoints"
TEACHER = "teacher_unet"


def read_settings(
    source: str | Path | None, out: Path, changes: Sequence[str] = (), *, resume: bool = False, processes: int = 1
) -> LADDConfig:
    """Return the settings of a run, settled for a number of processes.

    Args:
        source: a YAML file or a built-in configuration; None on resuming: the settings saved in `out`.
        changes: settings to replace, such as "loop.max_steps=400".
    """
    saved = out / CONFIG
    if source is None and not resume:
        names = or_list(built_in_configs())
        raise InvalidRequest(f"give a configuration, {names} or a YAML file; or --resume to continue a run in {out}")
    if source is None and not saved.is_file():
        raise InvalidRequest(
            f"there is no run to resume in {out}: it has no {CONFIG}. Start one with a configuration, such as "
            f"`ragturbo train one-gpu --out {out}`"
        )
    settings = load_config(saved if source is None else source, changes)
    if not (resume and saved.is_file()):
        return settle(settings, processes)
    before = load_config(saved)
    if settings.loop.micro_batch is None:
        settings = replace(settings, loop=replace(settings.loop, micro_batch=before.loop.micro_batch))
    settings = settle(settings, processes)
    checkpoint.check_same_settings(saved, before, settings)
    return settings


def count_processes() -> int:
    """The number of processes, as torchrun and `accelerate launch` set it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def check_run(settings: LADDConfig, out: Path, *, resume: bool = False) -> None:
    """Make the folder `out`, or raise an error if the run cannot start, as far as packages and files tell it."""
    check_writable(out)
    newest = checkpoint.latest(out / CHECKPOINTS)
    if newest and not resume:
        raise InvalidRequest(f"{out} already holds {newest.name}: continue it with --resume, or choose another --out")
    packages = ["accelerate", *(["peft"] if settings.mode == "adapter" and settings.student.lora.rank else [])]
    check_packages(*packages, *(["tensorboard"] if settings.loop.tensorboard else []))
    _check_models(settings)
    _check_data(settings)
    _check_lpips(settings)
    make_folder(out)


def _check_lpips(settings: LADDConfig) -> None:
    weights = settings.loss.lpips_weights
    if not settings.loss.beta or weights == "random":
        return
    if weights is None:
        raise InvalidRequest(
            "loss.lpips_weights is not set: make the file with `ragturbo data lpips`, set it to random, or set "
            "loss.beta=0 to train without latent LPIPS"
        )
    if not Path(weights).expanduser().is_file():
        raise ModelError(f"loss.lpips_weights: there is no file {weights}; `ragturbo data lpips` makes it")


def check_packages(*names: str) -> None:
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ModelError(f"training needs {name}: pip install 'ragturbo[train]'")


def check_database(path: str | Path) -> None:
    folder = Path(path).expanduser()
    if not (folder / "CURRENT").is_file():
        raise DatabaseError(f"there is no database {folder}: `ragturbo db build` makes one")


def check_neighbor_retriever(name: str) -> None:
    if name == "bm25":
        raise InvalidRequest(
            "retriever='bm25': the neighbours of samples are found by their keys, which bm25 does not read; use auto, "
            "scann, exact or hybrid",
            option="retriever",
        )
    one_of("retriever", name, tuple(other for other in RETRIEVERS if other != "bm25"))


def _check_models(settings: LADDConfig) -> None:
    folder = resolve(settings.model, revision=settings.revision)
    check_model(folder)
    if settings.teacher is None and not (folder / TEACHER).is_dir():
        raise InvalidRequest(
            f"{settings.model} has no {TEACHER}/: set teacher to a folder or hub id, or to self to use the student's "
            "own frozen encoder in the discriminator"
        )
    if settings.teacher not in (None, "self"):
        check_model(resolve(str(settings.teacher)))
    if not settings.retrieves:
        return
    if settings.database is None and not (folder / "database" / "CURRENT").is_file():
        raise InvalidRequest(f"{settings.model} has no database: set `database=FOLDER`; `ragturbo db build` makes one")
    check_database(settings.database or folder / "database")


def _check_data(settings: LADDConfig) -> None:
    kinds = [_check_source(Path(source.path).expanduser(), settings) for source in settings.data.sources]
    if settings.discriminator.real == "images" and "encoded" not in kinds:
        raise InvalidRequest(
            "discriminator.real=images, but no source of data.sources has images: all hold teacher latents. Add a "
            "folder made by `ragturbo data encode`, or set discriminator.real=all"
        )
    held_out = settings.data.held_out
    if held_out is not None and _check_source(Path(held_out).expanduser(), settings) != "teacher":
        raise InvalidRequest(f"data.held_out={held_out} has no stored noise: make it with `ragturbo data teacher`")


def _check_source(folder: Path, settings: LADDConfig) -> str:
    """Check a data folder and the neighbours in it; returns the kind of its samples."""
    plan = read_plan(folder)
    if not settings.retrieves or settings.student.neighbors == "random":
        return plan.kind
    table = folder / NEIGHBORS
    if not (table / INDEX).is_file():
        raise InvalidRequest(f"{folder} has no neighbours: run `ragturbo data neighbors {folder} --database …` first")
    check_complete(table, [shard_path(table, i) for i in range(plan.shards)])
    if (k := read_json(table / INDEX)["k"]) < settings.student.num_neighbors:
        raise InvalidRequest(
            f"{folder} has {k} neighbours a sample, not {settings.student.num_neighbors}: lower "
            "student.num_neighbors, or delete its folder neighbors/ and run `ragturbo data neighbors` with a larger -k"
        )
    return plan.kind
