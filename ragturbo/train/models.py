"""Open what a configuration names: models, discriminator, latent LPIPS, database and data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ragturbo.errors import DatabaseMismatch, InvalidRequest, ModelError
from ragturbo.model.bundle import Bundle
from ragturbo.train.augment import Augmentation
from ragturbo.train.config import LADDConfig, OptimConfig
from ragturbo.train.data import TrainingData
from ragturbo.train.discriminator import Backbone, Discriminator
from ragturbo.train.lpips import LatentLPIPS, load_lpips
from ragturbo.train.monitor import HeldOut
from ragturbo.train.shards import Shards
from ragturbo.train.student import Student, trailing_euler
from ragturbo.train.teacher import load_teacher

if TYPE_CHECKING:
    from ragturbo.retrieval.database import Database


def load_models(config: LADDConfig, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any, Bundle]:
    """Return the teacher's UNet for D (None: the student's own), its scheduler, and the student's bundle."""
    # Whole-student training copies the weights in fp32 before they are rounded to `dtype`.
    first = torch.float32 if config.mode == "student" else dtype
    own = config.teacher is None
    bundle = Bundle.load(config.model, device=device, dtype=first, adapter=False, teacher=own, revision=config.revision)
    scheduler = bundle.scheduler
    if config.mode == "student":
        bundle.scheduler = trailing_euler(scheduler)
    if own:
        teacher, bundle.teacher = bundle.teacher, None
    elif config.teacher == "self":
        teacher = None
    else:
        other, teacher = load_teacher(str(config.teacher), str(device), dtype)
        scheduler = other.scheduler
        if other.text.width != bundle.text.width:
            raise ModelError(
                f"the teacher {config.teacher} takes text states of width {other.text.width}, but D gets the "
                f"student's, of width {bundle.text.width}"
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
    """teacher: its UNet; None: share the student's own frozen encoder."""
    settings = config.discriminator
    backbone = Backbone(student.unet if teacher is None else teacher, settings.stages, shared=teacher is None)
    backbone.checkpointing = config.loop.gradient_checkpointing
    return Discriminator(backbone, settings.width, settings.spectral_norm, settings.normalise)


def make_adamw(parameters: Iterable[nn.Parameter], settings: OptimConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        list(parameters), settings.lr, settings.betas, settings.eps, settings.weight_decay, fused=True
    )


def make_lpips(config: LADDConfig, channels: int) -> LatentLPIPS | None:
    if not config.loss.beta:
        return None
    augmentation = Augmentation(p=config.loss.augment) if config.loss.augment else None
    assert config.loss.lpips_weights is not None, "checked in start.check_run"
    return load_lpips(config.loss.lpips_weights, channels, augmentation)


def open_database(config: LADDConfig, bundle: Bundle) -> Database | None:
    if not config.retrieves:
        return None
    from ragturbo.retrieval.database import Database

    path = config.database or bundle.database_path
    assert path is not None, "checked in start.check_run"
    # Rows are looked up by id, so no index is loaded.
    database = Database.open(path, retriever="exact")
    database.check_encoder(bundle.fingerprint(), bundle.text.key_kind)
    return database


def open_data(config: LADDConfig, bundle: Bundle, database: Database | None) -> tuple[TrainingData, HeldOut | None]:
    """The mixture of data.sources, and data.held_out if it is set."""
    student, settings = config.student, config.data
    retrieval: Any = {"database": database, "num_neighbors": student.num_neighbors}
    retrieval["random_neighbors"] = student.neighbors == "random"
    sources = [Shards(source.path) for source in settings.sources]
    for source in sources:
        _check_made_for(source, config, bundle)
    data = TrainingData(sources, [source.weight for source in settings.sources], config.seed, **retrieval)
    held_out = None
    if settings.held_out is not None:
        source = Shards(settings.held_out)
        _check_made_for(source, config, bundle)
        held_out = TrainingData([source], [1.0], config.seed, **retrieval)
    if student.phrases:
        _check_phrases(data)
        if held_out is not None:
            _check_phrases(held_out)
    return data, None if held_out is None else HeldOut(held_out)


def _check_made_for(source: Shards, config: LADDConfig, bundle: Bundle) -> None:
    """Raise DatabaseMismatch if the samples do not fit the student."""
    made, own = source.plan.made_by, bundle.fingerprint()
    # Without stored states, the student encodes the prompts itself.
    parts = {"vae_encoder": "VAE"} | ({"text_encoder": "text encoder"} if "text" in source.fields else {})
    wrong = [what for part, what in parts.items() if made.get(part, own[part]) != own[part]]
    if source.read(0, "latents").shape[0] != bundle.vae.channels:
        wrong.append("number of latent channels")
    if len(source.read(0, "input_ids")) != bundle.text.max_length:
        wrong.append("prompt length")
    if wrong:
        raise DatabaseMismatch(
            f"{source.folder} was made with {made.get('model', 'another model')}, which has another {wrong[0]} than "
            f"{config.model}: make it with that model, or train this one"
        )


def _check_phrases(data: TrainingData) -> None:
    for source, table in zip(data.sources, data.tables, strict=True):
        if table is not None and table.made_by["retriever"] != "given":
            raise InvalidRequest(
                f"student.phrases needs neighbours by phrase, and those of {source.folder} are of whole prompts: write "
                "them with `ragturbo.train.neighbors.write_neighbors`"
            )
