"""Checkpoints: a folder that is written whole or not at all, even if the process is killed while it writes.

    checkpoints/step-000500/
      trainable.safetensors  ema.safetensors  heads.safetensors  optimizer_g.safetensors  optimizer_d.safetensors
      state.json             step, samples, skipped steps, the configuration, sha256 of every file

There is no random state: what a step draws, and which samples it reads, are functions of (seed, step, process).
Finding a checkpoint imports no torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ragturbo.errors import InvalidRequest, ModelError
from ragturbo.folders import make_folder
from ragturbo.retrieval import durable
from ragturbo.train.config import LADDConfig, from_dict, to_dict
from ragturbo.train.folder import writing
from ragturbo.train.settings import changed_settings

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FACTS = "state.json"
_NAME = re.compile(r"step-(\d{6,})")
_PART = re.compile(r"\.step-\d{6,}\.part")
# Settings that may change when a run is resumed: they do not affect what is trained.
_FREE_LOOP = (
    "max_steps", "log_every", "held_out_every", "save_every", "keep", "sample_every", "samples", "dead_after",
    "tensorboard", "compile",
)  # fmt: skip
_FREE = {f"loop.{name}" for name in _FREE_LOOP} | {"data.prefetch", "data.held_out"}


def save(folder: Path, step: int, states: dict[str, dict[str, Tensor]], facts: dict[str, Any], keep: int) -> Path:
    """Write `states`, a file each, and `facts` as state.json; then delete all but the newest `keep` checkpoints."""
    from safetensors.torch import save_file

    make_folder(folder)
    for path in folder.iterdir():
        # Left behind by a killed process.
        if _PART.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)
    target = folder / f"step-{step:06d}"
    if not target.is_dir():
        part = folder / f".{target.name}.part"
        part.mkdir()
        sums = {}
        for name, state in states.items():
            path = part / f"{name}.safetensors"
            with writing(path):
                save_file({key: value.detach().cpu().contiguous() for key, value in state.items()}, path)
            durable.sync_file(path)
            sums[path.name] = durable.sum_file(path).sha256
        durable.write_file(part / FACTS, json.dumps({**facts, "step": step, "sha256": sums}, indent=2).encode())
        durable.sync_folder(part)
        os.rename(part, target)
        durable.sync_folder(folder)
    for old in checkpoints(folder)[:-keep]:
        # Renamed first, so that a half-deleted checkpoint is never taken for a whole one.
        doomed = folder / f".{old.name}.part"
        with contextlib.suppress(OSError):
            os.rename(old, doomed)
        shutil.rmtree(doomed, ignore_errors=True)
    return target


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def latest(folder: Path) -> Path | None:
    return next(reversed(checkpoints(folder)), None)


def load(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Return the states and facts given to `save`, after checking the sha256 of every file."""
    from ragturbo.model.weights import read_safetensors

    try:
        facts: dict[str, Any] = json.loads((path / FACTS).read_text("utf-8"))
        sums: dict[str, str] = facts["sha256"]
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{path} is not a checkpoint: {error!r}") from error
    states = {}
    for name, expected in sums.items():
        if not (path / name).is_file() or durable.sum_file(path / name).sha256 != expected:
            raise ModelError(f"{path / name} is missing or damaged; delete {path} to resume from an older checkpoint")
        states[name.removesuffix(".safetensors")] = read_safetensors(path / name)
    return states, facts


def check_same_run(path: Path, facts: dict[str, Any], config: LADDConfig, fingerprints: dict[str, str]) -> None:
    """Raise InvalidRequest or ModelError if the checkpoint has other settings or another model than this run."""
    # Read as a configuration: a setting that is newer than the checkpoint gets its default.
    check_same_settings(path, from_dict(facts["config"]), config)
    if facts["fingerprints"] != fingerprints:
        raise ModelError(f"{path} was trained on another model than {config.model} is now")


def check_same_settings(path: Path, before: LADDConfig, now: LADDConfig) -> None:
    """Raise InvalidRequest if a setting differs that a resumed run must keep."""
    changed = changed_settings(to_dict(before), to_dict(now))
    if what := ", ".join(f"{name} ({text})" for name, text in changed.items() if name not in _FREE):
        raise InvalidRequest(
            f"{path} has other settings: {what}. A resumed run may change how long it runs and what it logs and saves, "
            "but not what it trains: leave these settings as they were, or choose another --out"
        )


def optimizer_state(optimizer: torch.optim.Optimizer, names: Iterable[str]) -> dict[str, Tensor]:
    """{"name/exp_avg": …}, `names` in the order of the optimiser's parameters. Empty before the first step."""
    state = optimizer.state_dict()["state"]
    return {f"{name}/{key}": value for i, name in enumerate(names) for key, value in state.get(i, {}).items()}


def load_optimizer(optimizer: torch.optim.Optimizer, names: Iterable[str], state: dict[str, Tensor]) -> None:
    numbers = {name: i for i, name in enumerate(names)}
    by_number: dict[int, dict[str, Tensor]] = {}
    for full, value in state.items():
        name, _, key = full.rpartition("/")
        by_number.setdefault(numbers[name], {})[key] = value
    optimizer.load_state_dict({"state": by_number, "param_groups": optimizer.state_dict()["param_groups"]})
