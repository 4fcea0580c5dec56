"""Export what was trained as a folder that a Generator loads. Weights are written in fp32."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ragturbo.model import lora
from ragturbo.model.bundle import DATABASE, Bundle
from ragturbo.train.config import LADDConfig
from ragturbo.train.student import Student


def export_adapter(
    folder: Path, config: LADDConfig, student: Student, values: dict[str, Tensor], *, database: Path | None, whole: bool
) -> None:
    """Write adapter.safetensors and decoder_lora/, for `adapter=folder`.

    values: the trained parameters by name, as in `student.trainable()`. whole: also write the rest of the student and a
    copy of `database`, for `from_pretrained(folder)`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    trainable = student.trainable()
    before = {name: parameter.data for name, parameter in trainable.items()}
    try:
        for name, parameter in trainable.items():
            parameter.data = values[name]
        if student.adapter is not None:
            student.adapter.save(folder)
        if lora.has_lora(student.unet):
            lora.save_lora(student.unet, folder / lora.FOLDER)
    finally:
        for name, parameter in trainable.items():
            parameter.data = before[name]
    if whole:
        base = _untrained(config)
        base.load_adapter(folder)
        # With phrase embeddings, training has one neighbour of each phrase.
        if config.student.phrases:
            base.info = replace(base.info, num_neighbors=1, compose=True)
        else:
            base.info = replace(base.info, num_neighbors=config.student.num_neighbors)
        base.save(folder)
        if database is not None:
            shutil.copytree(database, folder / DATABASE, dirs_exist_ok=True)


def export_student(folder: Path, config: LADDConfig, values: dict[str, Tensor], scheduler: Any) -> None:
    """Write the bundle with the trained UNet. It has no database: one built with another UNet does not fit."""
    folder.mkdir(parents=True, exist_ok=True)
    base = _untrained(config)
    base.unet.unet.load_state_dict({name.removeprefix("unet."): value for name, value in values.items()})
    base.info = replace(base.info, distilled=True)
    base.scheduler = scheduler
    base.save(folder)


def _untrained(config: LADDConfig) -> Bundle:
    """The model that training started from, in fp32 on the CPU."""
    return Bundle.load(config.model, device="cpu", dtype=torch.float32, adapter=False, revision=config.revision)
