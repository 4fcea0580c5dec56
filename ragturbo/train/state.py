"""A trainer's state to a checkpoint and back."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ragturbo.errors import InvalidRequest, ModelError
from ragturbo.train import checkpoint
from ragturbo.train.config import from_dict, to_dict

if TYPE_CHECKING:
    from ragturbo.train.ladd import LADDTrainer

log = logging.getLogger("ragturbo")

# What may differ between a run and its resumption without changing what is trained.
_FREE_LOOP = (
    "max_steps", "log_every", "held_out_every", "save_every", "keep", "sample_every", "samples", "dead_after",
    "tensorboard", "compile",
)  # fmt: skip
_FREE = {f"loop.{name}" for name in _FREE_LOOP} | {"data.prefetch", "data.held_out"}


def save_state(trainer: LADDTrainer, folder: Path) -> Path:
    states = {
        "trainable": trainer.masters.state(),
        "heads": trainer.discriminator.heads.state_dict(),
        "optimizer_g": checkpoint.optimizer_state(trainer.optimizer_g, trainer.masters.parameters),
        "optimizer_d": checkpoint.optimizer_state(trainer.optimizer_d, _head_names(trainer)),
    }
    if trainer.ema is not None:
        states["ema"] = trainer.ema.values
    facts = {
        "updates": trainer.updates,
        "skipped": trainer.skipped,
        "skipped_in_a_row": trainer.skipped_in_a_row,
        "samples": trainer.step * trainer.config.loop.batch,
        "processes": trainer.world,
        "fingerprints": trainer.bundle.fingerprint(),
        "config": to_dict(trainer.config),
        "torch": torch.__version__,
    }
    return checkpoint.save(folder, trainer.step, states, facts, trainer.config.loop.keep)


def load_state(trainer: LADDTrainer, path: Path) -> None:
    states, facts = checkpoint.load(path)
    _check_same(trainer, facts, path)
    trainer.masters.load(states["trainable"])
    trainer.discriminator.heads.load_state_dict(states["heads"])
    checkpoint.load_optimizer(trainer.optimizer_g, trainer.masters.parameters, states["optimizer_g"])
    checkpoint.load_optimizer(trainer.optimizer_d, _head_names(trainer), states["optimizer_d"])
    if trainer.ema is not None:
        trainer.ema.load(states["ema"])
    trainer.step, trainer.updates = facts["step"], facts["updates"]
    trainer.skipped, trainer.skipped_in_a_row = facts["skipped"], facts["skipped_in_a_row"]
    log.info("resumed from %s", path)


def _head_names(trainer: LADDTrainer) -> list[str]:
    return [name for name, _ in trainer.discriminator.named_parameters()]


def _check_same(trainer: LADDTrainer, facts: dict[str, Any], path: Path) -> None:
    # Read as a configuration: a setting that came after the checkpoint has its default there.
    theirs, mine = _flat(to_dict(from_dict(facts["config"]))), _flat(to_dict(trainer.config))
    changed = [k for k in sorted(theirs.keys() | mine.keys()) if theirs.get(k) != mine.get(k) and k not in _FREE]
    if changed:
        what = ", ".join(f"{name} ({theirs.get(name)!r} there, {mine.get(name)!r} now)" for name in changed)
        raise InvalidRequest(f"{path} was trained with other settings: {what}. Use those, or another --out")
    if facts["fingerprints"] != trainer.bundle.fingerprint():
        raise ModelError(f"{path} was trained on another model than {trainer.config.model} is now")


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings as {"loop.batch": …}."""
    if not isinstance(values, dict):
        return {prefix: values}
    return {k: v for name, value in values.items() for k, v in _flat(value, f"{prefix}.{name}".strip(".")).items()}
