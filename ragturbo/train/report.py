"""What a run says while it runs: stats.jsonl, TensorBoard where asked for, one line of progress on a terminal."""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch

from ragturbo.errors import ModelError

log = logging.getLogger("ragturbo")

STATS = "stats.jsonl"
_SHOWN = ("d", "adv", "distill", "lpips", "held_out", "held_out_alone")
# A head that answers 0 everywhere has a hinge loss of 2: within this share of it, it has learnt nothing.
_STARTING_LOSS, _MARGIN = 2.0, 0.025


class Report:
    """Of the main process; the others have none."""

    def __init__(self, out: Path, max_steps: int, *, tensorboard: bool, start: int) -> None:
        self.path = out / STATS
        _truncate(self.path, start)
        self._board = _board(out) if tensorboard else None
        self._last = (time.perf_counter(), start)
        self._progress: Any = None
        if sys.stderr.isatty():
            self._progress = _progress()
            self._task = self._progress.add_task("", total=max_steps, completed=start, facts="")
            self._progress.start()

    def write(self, step: int, batch: int, values: dict[str, Any]) -> dict[str, Any]:
        """One line of stats after `step` steps; the rate is since the line before."""
        now = time.perf_counter()
        then, before = self._last
        self._last = (now, step)
        samples_per_s = (step - before) * batch / max(now - then, 1e-9)
        memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        line = {"step": step, "kimg": step * batch / 1000, **values, "samples_per_s": samples_per_s, "memory": memory}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(_finite(line), allow_nan=False) + "\n")
        if self._board is not None:
            for name, value in line.items():
                for key, number in value.items() if isinstance(value, dict) else [("", value)]:
                    if isinstance(number, (int, float)):
                        self._board.add_scalar(f"{name}/{key}" if key else name, number, step)
        text = f"{line['kimg']:.1f} kimg  {samples_per_s:.1f} samples/s"
        text += "".join(f"  {name} {values[name]:.3f}" for name in _SHOWN if name in values)
        text += f"  {memory / 2**30:.1f} GiB" if memory else ""
        if self._progress is not None:
            self._progress.update(self._task, completed=step, facts=text)
        else:
            log.info("step %d  %s", step, text)
        return line

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
        if self._board is not None:
            self._board.close()


class HeadWatch:
    """Which of D's heads have left their starting loss. One that has not after `after` steps gives G no signal."""

    def __init__(self, names: list[str], after: int) -> None:
        self.names, self.after = names, after
        self._reported: set[str] = set()

    def check(self, step: int, losses: list[float]) -> list[str]:
        """Names of the heads still at their starting loss at `step`; each is warned of once."""
        if step < self.after:
            return []
        dead = [
            name
            for name, loss in zip(self.names, losses, strict=True)
            if abs(loss - _STARTING_LOSS) <= _MARGIN * _STARTING_LOSS
        ]
        for name in dead:
            if name not in self._reported:
                self._reported.add(name)
                log.warning(
                    "discriminator head %s is at its starting loss of %g after %d steps: it gives no signal. Show D "
                    "real images (`ragturbo data encode`, discriminator.real=images: a student soon looks like its "
                    "teacher's latents) and misaligned pairs, normalise its features, or leave the stage out.",
                    name, _STARTING_LOSS, step,
                )  # fmt: skip
        return dead


def _finite(value: Any) -> Any:
    """JSON has no NaN: null."""
    if isinstance(value, dict):
        return {name: _finite(v) for name, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _progress() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (MofNCompleteColumn(), BarColumn(bar_width=20), TextColumn("{task.fields[facts]}"), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True))


def _board(out: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ModelError("loop.tensorboard needs tensorboard: pip install 'ragturbo[train]'") from error
    return SummaryWriter(str(out / "tensorboard"))


def _truncate(path: Path, start: int) -> None:
    """A resumed run says its steps again; what the killed one said of them goes."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text("utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= start:
                kept.append(line + "\n")
        # The last line of a killed process may be half a line.
        except (ValueError, KeyError):
            continue
    path.write_text("".join(kept), "utf-8")
