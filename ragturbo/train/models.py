"""What a configuration names, opened: models, the discriminator, latent LPIPS, database and data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ragturbo.errors import InvalidRequest, ModelError
from ragturbo.model.bundle import TEACHER, Bundle
from ragturbo.model.source import resolve
from ragturbo.train.augment import Augmentation
from ragturbo.train.config import LADDConfig, OptimConfig
from ragturbo.train.data import TrainingData
from ragturbo.train.discriminator import Backbone, Discriminator
from ragturbo.train.held_out import HeldOut
from ragturbo.train.lpips import LatentLPIPS, load_lpips
from ragturbo.train.shards import Shards
from ragturbo.train.student import Student, trailing_euler
from ragturbo.train.teacher import load_teacher

if TYPE_CHECKING:
    from ragturbo.retrieval.database import Database


def load_models(config: LADDConfig, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any, Bundle]:
    """The teacher's UNet for D (None: the student's own) and its scheduler, and the bundle of the student."""
    # A student that trains whole keeps the digits of its file in its fp32 masters.
    first = torch.float32 if config.mode == "student" else dtype
    own = config.teacher is None
    if own and not (resolve(config.model, revision=config.revision) / TEACHER).is_dir():
        raise InvalidRequest(
            f"{config.model} has no {TEACHER}/: name the teacher (teacher=FOLDER or hub id), or teacher=self to make "
            "the discriminator of the student's own frozen encoder"
        )
    bundle = Bundle.load(config.model, device=device, dtype=first, adapter=False, teacher=own, revision=config.revision)
    scheduler = bundle.scheduler
    if config.mode == "student":
        bundle.scheduler = trailing_euler(scheduler)
    if own:
        teacher, bundle.teacher = bundle.teacher, None
    elif config.teacher == "self":
        teacher = None
    else:
        other, teacher = load_teacher(str(config.teacher), str(device), config.loop.precision)
        scheduler = other.scheduler
        if other.text.width != bundle.text.width:
            raise ModelError(
                f"the teacher {config.teacher} takes text states {other.text.width} wide; the student's are "
                f"{bundle.text.width}: D reads the student's"
            )
    if dtype != first:
        bundle.text.text_encoder.to(dtype)
        bundle.vae.module.to(dtype)
        if teacher is not None:
            teacher.to(dtype)
    if device.type == "cuda":
        for unet in (bundle.unet.unet, teacher):
            if unet is not None:
                unet.to(memory_format=torch.channels_last)
    return teacher, scheduler, bundle


def make_discriminator(teacher: Any, student: Student, config: LADDConfig) -> Discriminator:
    """teacher: its UNet; None: the student's own frozen encoder, in memory once."""
    settings = config.discriminator
    backbone = Backbone(student.unet if teacher is None else teacher, settings.stages, shared=teacher is None)
    backbone.checkpointing = config.loop.gradient_checkpointing
    return Discriminator(backbone, settings.width, settings.spectral_norm, settings.normalise)


def make_adamw(parameters: Any, settings: OptimConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        list(parameters),
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=True,
    )


def make_lpips(config: LADDConfig, channels: int) -> LatentLPIPS | None:
    if not config.loss.beta:
        return None
    augmentation = Augmentation(p=config.loss.augment) if config.loss.augment else None
    return load_lpips(config.loss.lpips_weights, channels, augmentation)


def open_database(config: LADDConfig, bundle: Bundle) -> Database | None:
    if not config.retrieves:
        return None
    from ragturbo.retrieval.database import Database

    path = config.database or bundle.database_path
    if path is None:
        raise InvalidRequest(f"{config.model} has no database of its own: set database=FOLDER")
    # Neighbours are looked up, not searched for: no index is loaded.
    database = Database.open(path, retriever="exact")
    database.check_encoder(bundle.fingerprint(), bundle.text.key_kind)
    return database


def open_data(config: LADDConfig, database: Database | None) -> TrainingData:
    sources = [Shards(source.path) for source in config.data.sources]
    if config.discriminator.real == "images" and all("noise" in source.fields for source in sources):
        raise InvalidRequest(
            "discriminator.real=images, and no source of data.sources has images: all are a teacher's latents. Add a "
            "folder made by `ragturbo data encode`, or set discriminator.real=all"
        )
    return _training_data(config, sources, [source.weight for source in config.data.sources], database)


def open_held_out(config: LADDConfig, database: Database | None) -> HeldOut | None:
    if config.data.held_out is None:
        return None
    return HeldOut(_training_data(config, [Shards(config.data.held_out)], [1.0], database))


def _training_data(
    config: LADDConfig, sources: list[Shards], weights: list[float], database: Database | None
) -> TrainingData:
    return TrainingData(
        sources,
        weights,
        config.seed,
        database=database,
        num_neighbors=config.student.num_neighbors,
        random_neighbors=config.student.neighbors == "random",
    )
