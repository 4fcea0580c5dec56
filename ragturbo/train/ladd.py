"""Latent adversarial diffusion distillation (Sec. 3.4): the training loop."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from ragturbo.errors import InvalidRequest, NonFiniteOutput
from ragturbo.retrieval import durable
from ragturbo.train import checkpoint, models, require
from ragturbo.train.config import LADDConfig, settle, to_dict, to_yaml
from ragturbo.train.data import Batch, Prefetcher
from ragturbo.train.discriminator import NoiseSchedule
from ragturbo.train.export import export_adapter, export_student
from ragturbo.train.folder import writing
from ragturbo.train.monitor import sample_grid
from ragturbo.train.objective import Objective
from ragturbo.train.start import CHECKPOINTS, CONFIG, check_run
from ragturbo.train.stats import HeadWatch, StatsWriter
from ragturbo.train.student import EMA, Masters, Student

log = logging.getLogger("ragturbo")

SAMPLES, EXPORT = "samples", "export"


class LADDTrainer:
    """One process of a training run. `accelerate launch` or torchrun starts several; each holds the whole model."""

    def __init__(
        self, config: LADDConfig, out: str | Path, *, device: torch.device | str | None = None, resume: bool = False
    ) -> None:
        """device: None: the launcher's. resume: continue from the newest checkpoint in `out`, if there is one."""
        self.out = Path(out).expanduser()
        cpu = str(device or "").startswith("cpu") or not torch.cuda.is_available()
        self.processes = require("accelerate").PartialState(cpu=cpu)
        self.device = torch.device(device) if device is not None else self.processes.device
        self.rank, self.world = self.processes.process_index, self.processes.num_processes
        self.config = config = settle(config, self.world)
        check_run(config, self.out, resume=resume)
        assert config.loop.micro_batch is not None
        self.micro_batch = config.loop.micro_batch
        self.accumulation = config.loop.batch // (self.micro_batch * self.world)
        newest = checkpoint.latest(self.out / CHECKPOINTS)

        # Models. The seed is the same in all processes, and so are the initial weights.
        torch.manual_seed(config.seed)
        dtype = torch.bfloat16 if config.loop.precision == "bf16" else torch.float32
        teacher, scheduler, self.bundle = models.load_models(config, self.device, dtype)
        self.student = Student(self.bundle.unet, self.bundle.scheduler, config).to(self.device)
        self.masters = Masters(self.student.trainable())
        for parameter in self.student.parameters():
            parameter.data = parameter.data.to(dtype)
        self.discriminator = models.make_discriminator(teacher, self.student, config).to(self.device)
        lpips = models.make_lpips(config, self.bundle.vae.channels)
        if lpips is not None:
            lpips.to(self.device, dtype)
        self.ema = EMA(self.masters, config.loop.ema) if config.loop.ema else None
        noise = NoiseSchedule(scheduler, self.device)
        self.objective = Objective(config, self.student, self.discriminator, noise, lpips, self.bundle.text.encode)

        # Data.
        self.data, self.held_out = models.open_data(config, self.bundle, models.open_database(config, self.bundle))

        # Optimisers.
        self.optimizer_g = models.make_adamw(self.masters.parameters.values(), config.optim)
        self.optimizer_d = models.make_adamw(self.discriminator.parameters(), config.discriminator.optim)

        self.step = self.updates = self.skipped = self.skipped_in_a_row = 0
        self._sums: dict[str, Tensor] = {}
        self._micro_batches = 0
        self._watch = HeadWatch(self.discriminator.backbone.stages, config.loop.dead_after)
        if newest:
            self._load_checkpoint(newest)

    def train(self, max_steps: int | None = None) -> Path:
        """Run until step `max_steps` of the run (loop.max_steps by default); returns the folder of the export."""
        loop = self.config.loop
        last = loop.max_steps if max_steps is None else max_steps
        if last < 1:
            raise InvalidRequest(f"max_steps={last} must be at least 1", option="max_steps")
        stats = None
        if self.processes.is_main_process:
            with durable.naming(self.out / CONFIG, "writing"):
                (self.out / CONFIG).write_text(to_yaml(self.config), "utf-8")
            stats = StatsWriter(self.out, last, tensorboard=loop.tensorboard, start=self.step)
        prefetcher = Prefetcher(self.load_batch, self.sample_numbers(last), self.config.data.prefetch)
        try:
            while self.step < last:
                self.update([prefetcher.next() for _ in range(self.accumulation)])
                if self.step % loop.log_every == 0 or self.step == last:
                    self._log(stats)
                if self.step % loop.save_every == 0 or self.step == last:
                    self._save_checkpoint()
                if loop.sample_every and (self.step % loop.sample_every == 0 or self.step == last):
                    self._save_samples()
        finally:
            prefetcher.close()
            if stats is not None:
                stats.close()
        return self.export(self.out / EXPORT)

    def sample_numbers(self, last: int) -> Iterator[range]:
        """Sample numbers of this process's micro-batches, from the next step to step `last`."""
        size = self.micro_batch
        for step in range(self.step, last):
            for m in range(self.accumulation):
                start = step * self.config.loop.batch + (self.rank * self.accumulation + m) * size
                yield range(start, start + size)

    def load_batch(self, numbers: range) -> Batch:
        batch = self.data.batch(numbers)
        return batch.pin() if self.device.type == "cuda" else batch

    def update(self, batches: list[Batch]) -> None:
        """One optimiser step of D and G on the gradients of all micro-batches."""
        self.student.train()
        self.discriminator.train()
        for m, batch in enumerate(batches):
            self._add(self.objective.backward(batch.to(self.device), self.generator(m), self.accumulation))
            self._micro_batches += 1
            self.masters.accumulate()
        g = list(self.masters.parameters.values())
        d = list(self.discriminator.parameters())
        self._average_gradients(g + d)
        # The norms before clipping.
        norm_g = clip_grad_norm_(g, self.config.optim.clip or math.inf)
        norm_d = clip_grad_norm_(d, self.config.discriminator.optim.clip or math.inf)
        # Once per step, divided by the number of micro-batches in _log.
        self._add({"norm_g": norm_g * self.accumulation, "norm_d": norm_d * self.accumulation})
        # The only device synchronisation of a step. The norms are the same in all processes.
        if bool(torch.isfinite(norm_g) & torch.isfinite(norm_d)):
            self._set_rates()
            self.optimizer_d.step()
            self.optimizer_g.step()
            self.masters.publish()
            self.updates += 1
            self.skipped_in_a_row = 0
            if self.ema is not None:
                self.ema.update(self.masters, self.updates)
        else:
            self._skip()
        self.masters.zero_grad()
        self.optimizer_d.zero_grad(set_to_none=True)
        self.step += 1

    def generator(self, m: int) -> torch.Generator:
        """The random numbers of micro-batch m of this step on this process, a function of (seed, step, rank, m)."""
        words = np.random.SeedSequence([self.config.seed, self.step, self.rank, m]).generate_state(1, np.uint64)
        seed = int(words[0]) >> 1
        # Dropout in the LoRA draws from the global state.
        torch.manual_seed(seed)
        return torch.Generator(self.device).manual_seed(seed)

    def export(self, folder: str | Path, *, whole: bool = False) -> Path:
        """Write the trained weights (their moving average, if one is kept) as a folder that a Generator loads.

        whole: in adapter mode, write the student with the database, not only the adapter and LoRA.
        """
        folder, config = Path(folder), self.config
        if self.processes.is_main_process:
            values = self.masters.state() if self.ema is None else self.ema.values
            with writing(folder):
                if config.mode == "student":
                    export_student(folder, config, values, self.bundle.scheduler)
                else:
                    database = self.data.database.path if self.data.database is not None else None
                    export_adapter(folder, config, self.student, values, database=database, whole=whole)
        self.processes.wait_for_everyone()
        return folder

    def _average_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Average over processes by one all-reduce of a flat buffer."""
        if self.world == 1:
            return
        grads = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([grad.flatten() for grad in grads])
        torch.distributed.all_reduce(flat)
        flat /= self.world
        for grad, mean in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(mean.view_as(grad))

    def _set_rates(self) -> None:
        steps = self.config.loop.max_steps
        self.optimizer_g.param_groups[0]["lr"] = self.config.optim.rate(self.updates, steps)
        self.optimizer_d.param_groups[0]["lr"] = self.config.discriminator.optim.rate(self.updates, steps)

    def _skip(self) -> None:
        self.skipped += 1
        self.skipped_in_a_row += 1
        log.warning("step %d: the gradient is not finite; skipped (%d in all)", self.step, self.skipped)
        if self.skipped_in_a_row >= self.config.loop.max_skipped:
            raise NonFiniteOutput(
                f"{self.skipped_in_a_row} steps in a row had a gradient that is not finite, up to step {self.step}. "
                "Resume from the last checkpoint with a lower optim.lr, or check the data for NaN"
            )

    def _add(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.float()

    def _log(self, stats: StatsWriter | None) -> None:
        """Write the means since the last line, over all processes."""
        means = {name: value / max(1, self._micro_batches) for name, value in self._sums.items()}
        self._sums, self._micro_batches = {}, 0
        if self.world > 1:
            for value in means.values():
                torch.distributed.all_reduce(value)
                value /= self.world
        if stats is None:
            return
        losses, accuracies = means.pop("head").tolist(), means.pop("accuracy").tolist()
        values: dict[str, Any] = {name: value.item() for name, value in means.items()}
        stages = self.discriminator.backbone.stages
        values["d_heads"] = dict(zip(stages, losses, strict=True))
        values["d_accuracy"] = dict(zip(stages, accuracies, strict=True))
        values["dead_heads"] = self._watch.check(self.step, losses)
        values |= {"skipped": self.skipped, "lr": self.optimizer_g.param_groups[0]["lr"]}
        if self.held_out is not None and self.step % self.config.loop.held_out_every == 0:
            self.student.eval()
            values |= self.held_out.measure(self.objective.estimate, self.micro_batch, self.device)
        stats.write(self.step, self.config.loop.batch, values)

    def _save_samples(self) -> None:
        if self.processes.is_main_process:
            path = self.out / SAMPLES / f"{self.step:06d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            batch = self.data.batch(range(self.config.loop.samples)).to(self.device)
            sample_grid(batch, self.objective.estimate, self.bundle.vae.decode, self.config.seed).save(path)

    def _save_checkpoint(self) -> None:
        """All processes have the same state; the main one writes it."""
        if self.processes.is_main_process:
            states = {
                "trainable": self.masters.state(),
                "heads": self.discriminator.heads.state_dict(),
                "optimizer_g": checkpoint.optimizer_state(self.optimizer_g, self.masters.parameters),
                "optimizer_d": checkpoint.optimizer_state(
                    self.optimizer_d, dict(self.discriminator.named_parameters())
                ),
            }
            if self.ema is not None:
                states["ema"] = self.ema.values
            facts = {
                "updates": self.updates,
                "skipped": self.skipped,
                "skipped_in_a_row": self.skipped_in_a_row,
                "samples": self.step * self.config.loop.batch,
                "processes": self.world,
                "fingerprints": self.bundle.fingerprint(),
                "config": to_dict(self.config),
                "torch": torch.__version__,
            }
            checkpoint.save(self.out / CHECKPOINTS, self.step, states, facts, self.config.loop.keep)
        self.processes.wait_for_everyone()

    def _load_checkpoint(self, path: Path) -> None:
        states, facts = checkpoint.load(path)
        checkpoint.check_same_run(path, facts, self.config, self.bundle.fingerprint())
        self.masters.load(states["trainable"])
        self.discriminator.heads.load_state_dict(states["heads"])
        checkpoint.load_optimizer(self.optimizer_g, self.masters.parameters, states["optimizer_g"])
        checkpoint.load_optimizer(self.optimizer_d, dict(self.discriminator.named_parameters()), states["optimizer_d"])
        if self.ema is not None:
            self.ema.load(states["ema"])
        self.step, self.updates = facts["step"], facts["updates"]
        self.skipped, self.skipped_in_a_row = facts["skipped"], facts["skipped_in_a_row"]
        log.info("resumed from %s", path)
