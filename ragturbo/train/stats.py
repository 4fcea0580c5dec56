"""Statistics of a run: stats.jsonl, TensorBoard on request, and a progress line on a terminal."""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

import torch

from ragturbo.train import require

log = logging.getLogger("ragturbo")

STATS = "stats.jsonl"
_SHOWN = ("d", "adv", "distill", "lpips", "held_out", "held_out_alone")
# The hinge loss of a head that outputs 0 everywhere; a head within this margin has not learnt anything yet.
_STARTING_LOSS, _MARGIN = 2.0, 0.025


class StatsWriter:
    """Writes the statistics of a run; used by the main process only."""

    def __init__(self, out: Path, max_steps: int, *, tensorboard: bool, start: int) -> None:
        """start: steps done before; lines of later steps, left by a killed run, are removed."""
        self.path = out / STATS
        _truncate(self.path, start)
        self._tensorboard: Any = None
        if tensorboard:
            require("tensorboard")
            self._tensorboard = require("torch.utils.tensorboard").SummaryWriter(str(out / "tensorboard"))
        self._last = (time.perf_counter(), start)
        self._progress: Any = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            facts = TextColumn("{task.fields[facts]}")
            columns = (MofNCompleteColumn(), BarColumn(bar_width=20), facts, TimeRemainingColumn())
            self._progress = Progress(*columns, console=Console(stderr=True))
            self._task = self._progress.add_task("", total=max_steps, completed=start, facts="")
            self._progress.start()

    def write(self, step: int, batch: int, values: dict[str, Any]) -> None:
        """Append a line for `step`. samples_per_s is measured since the previous line."""
        now = time.perf_counter()
        then, before = self._last
        self._last = (now, step)
        samples_per_s = (step - before) * batch / max(now - then, 1e-9)
        memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        line = {"step": step, "kimg": step * batch / 1000, **values, "samples_per_s": samples_per_s, "memory": memory}
        with open(self.path, "a", encoding="utf-8") as file:
            # JSON has no NaN: write null.
            file.write(json.dumps(json.loads(json.dumps(line), parse_constant=lambda _: None)) + "\n")
        if self._tensorboard is not None:
            for name, value in line.items():
                for key, number in value.items() if isinstance(value, dict) else [("", value)]:
                    if isinstance(number, (int, float)):
                        self._tensorboard.add_scalar(f"{name}/{key}" if key else name, number, step)
        text = f"{line['kimg']:.1f} kimg  {samples_per_s:.1f} samples/s"
        text += "".join(f"  {name} {values[name]:.3f}" for name in _SHOWN if name in values)
        text += f"  {memory / 2**30:.1f} GiB" if memory else ""
        if self._progress is not None:
            self._progress.update(self._task, completed=step, facts=text)
        else:
            log.info("step %d  %s", step, text)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
        if self._tensorboard is not None:
            self._tensorboard.close()


class HeadWatch:
    """Finds discriminator heads that are still at their starting loss after `after` steps and warns once about each."""

    def __init__(self, names: list[str], after: int) -> None:
        self.names, self.after = names, after
        self._warned: set[str] = set()

    def check(self, step: int, losses: list[float]) -> list[str]:
        """Names of the heads at their starting loss."""
        if step < self.after:
            return []
        margin = _MARGIN * _STARTING_LOSS
        dead = [n for n, loss in zip(self.names, losses, strict=True) if abs(loss - _STARTING_LOSS) <= margin]
        for name in dead:
            if name not in self._warned:
                self._warned.add(name)
                log.warning(
                    "discriminator head %s is still at its starting loss of %g after %d steps and gives no signal. "
                    "Train D with real images (`ragturbo data encode`, discriminator.real=images), with misaligned "
                    "pairs or with normalised features, or leave this stage out.",
                    name, _STARTING_LOSS, step,
                )  # fmt: skip
        return dead


def _truncate(path: Path, start: int) -> None:
    """Remove the lines of steps after `start`."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text("utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= start:
                kept.append(line + "\n")
        # A killed process may leave half a line.
        except (ValueError, KeyError):
            continue
    path.write_text("".join(kept), "utf-8")
