"""From a trainer to a folder that `Generator` loads."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ragturbo.model import lora
from ragturbo.model.bundle import DATABASE, Bundle

if TYPE_CHECKING:
    from ragturbo.train.ladd import LADDTrainer


def export(trainer: LADDTrainer, folder: Path, *, whole: bool) -> None:
    """Adapter mode: adapter.safetensors and decoder_lora/, for `adapter=folder`; `whole`: the student's bundle with
    them and the database in it. Student mode: the bundle with the trained UNet. In fp32; the average if one is kept."""
    folder.mkdir(parents=True, exist_ok=True)
    if trainer.config.mode == "student":
        _export_student(trainer, folder)
        return
    with _published(trainer, _values(trainer)):
        if trainer.student.adapter is not None:
            trainer.student.adapter.save(folder)
        if lora.has_lora(trainer.student.unet):
            lora.save_lora(trainer.student.unet, folder / lora.FOLDER)
    if whole:
        base = _base(trainer)
        base.load_adapter(folder)
        base.info = replace(base.info, num_neighbors=trainer.config.student.num_neighbors)
        base.save(folder)
        if trainer.data.database is not None:
            shutil.copytree(trainer.data.database.path, folder / DATABASE, dirs_exist_ok=True)


def _export_student(trainer: LADDTrainer, folder: Path) -> None:
    base = _base(trainer)
    weights = {name.removeprefix("unet."): value for name, value in _values(trainer).items()}
    base.unet.unet.load_state_dict(weights)
    # The UNet is another one now: whatever database the folder had no longer belongs to it.
    base.info = replace(base.info, distilled=True)
    base.scheduler = trainer.bundle.scheduler
    base.save(folder)


def _values(trainer: LADDTrainer) -> dict[str, Tensor]:
    return trainer.masters.state() if trainer.ema is None else trainer.ema.values


def _base(trainer: LADDTrainer) -> Bundle:
    """The student as it was before training, in full precision on the CPU."""
    config = trainer.config
    return Bundle.load(config.model, device="cpu", dtype=torch.float32, adapter=False, revision=config.revision)


@contextmanager
def _published(trainer: LADDTrainer, values: dict[str, Tensor]) -> Iterator[None]:
    """The model holds these values, in fp32, for as long as it is saved."""
    working = trainer.student.trainable()
    before = {name: parameter.data for name, parameter in working.items()}
    try:
        for name, parameter in working.items():
            parameter.data = values[name]
        yield
    finally:
        for name, parameter in working.items():
            parameter.data = before[name]
