"""A resumable training loop: step i depends only on the seed, i and the checkpoint."""

from __future__ import annotations

import copy
import json
import logging
import os
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import parallel
import torch
from device import DEVICE, attention
from torch import Tensor, nn

from ragturbo.train.config import OptimConfig

log = logging.getLogger("ragturbo.recipe")


def run(
    name: str, work: Path, update: Callable[[int, torch.Generator], Mapping[str, float]], state: Mapping[str, Any], *,
    steps: int, seed: int, save_every: int = 100, minutes: float | None = None,
) -> bool:  # fmt: skip
    """Call `update(step, generator)` until `steps` is reached, resuming from `<name>.pt`; returns whether it is."""
    checkpoint = work / f"{name}.pt"
    step = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True, map_location=DEVICE)
        step = saved.pop("step")
        for key, part in state.items():
            part.load_state_dict(saved[key])
        log.info("%s: resumed at step %d of %d", name, step, steps)
    parallel.start()
    begun, sums, since, mark = time.monotonic(), {}, 0, time.monotonic()
    threads, commit = Threads(), head()
    while step < steps and not (minutes and time.monotonic() - begun > 60 * minutes):
        with threads, attention():
            losses = update(step, torch.Generator().manual_seed(seed * 1_000_003 + step))
        step, since = step + 1, since + 1
        for key, value in losses.items():
            sums[key] = sums.get(key, 0.0) + float(value)
        if parallel.RANK == 0 and (step % 50 == 0 or step == steps):
            row = {"step": step, **{k: round(v / since, 5) for k, v in sums.items()}}
            row["seconds_a_step"] = round((time.monotonic() - mark) / since, 4)
            row |= {"threads": threads.now, "processes": parallel.WORLD, "commit": commit}
            log.info("%s %s", name, row)
            with open(work / f"{name}.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
            sums, since, mark = {}, 0, time.monotonic()
        if parallel.RANK == 0 and step % save_every == 0:
            _save(checkpoint, step, state)
    if parallel.RANK == 0:
        _save(checkpoint, step, state)
    return step >= steps


def head() -> str:
    """Return the recipe's commit, with a "+" if its files have uncommitted changes."""
    git = ["git", "-C", str(Path(__file__).parent)]
    commit, changes = (
        subprocess.run([*git, *words], capture_output=True, text=True).stdout.strip()
        for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "."))
    )
    return commit + ("+" if changes else "")


class Threads:
    """Switches between one and all threads, whichever was faster in the last trial.

    On a busy machine one thread can be faster than several that wait for each other.
    """

    trial, every = 4, 120

    def __init__(self) -> None:
        self.most = torch.get_num_threads()
        self.count = 0
        self.spent = {1: 0.0, self.most: 0.0}

    def __enter__(self) -> None:
        position = self.count % self.every
        if position == 0:
            self.spent = dict.fromkeys(self.spent, 0.0)
        best = min(self.spent, key=self.spent.__getitem__)
        now = 1 if position < self.trial else self.most if position < 2 * self.trial else best
        torch.set_num_threads(now)
        self.now, self.begun = now, time.monotonic()

    def __exit__(self, *_: object) -> None:
        if self.count % self.every < 2 * self.trial:
            self.spent[self.now] += time.monotonic() - self.begun
        self.count += 1


def rate(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    """Return the learning rate: linear warm-up, then cosine decay to a fiftieth."""
    return OptimConfig(lr=peak, warmup=warmup, decay="cosine").rate(step, steps)


def set_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = value


class Average(nn.Module):
    """An exponential moving average of a module's weights."""

    def __init__(self, module: nn.Module, decay: float = 0.999) -> None:
        super().__init__()
        self.module = copy.deepcopy(module).requires_grad_(False).eval()
        self.decay = decay

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.module.parameters()), list(module.parameters()), 1 - decay)


class Levels(nn.Module):
    """A running mean of the loss per noise level, and weights that give every level the same influence.

    Unweighted, the highest levels dominate, where positions are undetermined, over the middle ones, which form shapes.
    """

    def __init__(self, count: int = 20, pace: float = 0.02) -> None:
        super().__init__()
        self.count, self.pace = count, pace
        self.register_buffer("seen", torch.zeros(count, device=DEVICE))

    @torch.no_grad()
    def weights(self, t: Tensor, errors: Tensor) -> Tensor:
        level = t * self.count // 1000
        sums = torch.zeros(2, self.count, device=DEVICE)
        sums.index_add_(1, level, torch.stack([errors.detach(), torch.ones_like(errors)]))
        parallel.add(sums)
        now = sums[0] / sums[1]
        # The first value of a level is taken as is; a level without samples keeps its value.
        now = torch.where(self.seen > 0, torch.lerp(self.seen, now, self.pace), now)
        self.seen.copy_(torch.where(sums[1] > 0, now, self.seen))
        return self.seen.mean() / self.seen[level]


def _save(path: Path, step: int, state: Mapping[str, Any]) -> None:
    part = path.with_suffix(".part")
    torch.save({"step": step, **{key: value.state_dict() for key, value in state.items()}}, part)
    os.replace(part, path)
