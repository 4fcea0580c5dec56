"""Latent adversarial diffusion distillation (Sec. 3.4): the training loop."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ragturbo.errors import InvalidRequest, NonFiniteOutput
from ragturbo.model.inject import blend_weights, cosine
from ragturbo.model.text import TextStates
from ragturbo.train import checkpoint
from ragturbo.train.config import LADDConfig, to_yaml
from ragturbo.train.data import Batch, Prefetcher
from ragturbo.train.discriminator import NoiseSchedule, accuracy
from ragturbo.train.extras import require
from ragturbo.train.losses import R1, HingeD, HingeG, SmoothL1, Total, masked_mean
from ragturbo.train.models import (
    load_models,
    make_adamw,
    make_discriminator,
    make_lpips,
    open_data,
    open_database,
    open_held_out,
)
from ragturbo.train.report import HeadWatch, Report
from ragturbo.train.state import load_state, save_state
from ragturbo.train.student import EMA, Masters, Student

log = logging.getLogger("ragturbo")

CONFIG, CHECKPOINTS, SAMPLES, EXPORT = "config.yaml", "checkpoints", "samples", "export"


class LADDTrainer:
    """One process of a training run. `accelerate launch` or torchrun starts several; each holds the whole model."""

    def __init__(
        self, config: LADDConfig, out: str | Path, *, device: torch.device | str | None = None, resume: bool = False
    ) -> None:
        self.config, self.out = config, Path(out)
        # Setup: processes
        cpu = str(device or "").startswith("cpu") or not torch.cuda.is_available()
        self.processes = require("accelerate").PartialState(cpu=cpu)
        self.device = torch.device(device) if device is not None else self.processes.device
        self.rank, self.world = self.processes.process_index, self.processes.num_processes
        self.accumulation = config.loop.accumulation(self.world)
        self._check_out(resume)

        # Setup: models. The same seed everywhere gives every process the same start.
        torch.manual_seed(config.seed)
        self.dtype = torch.bfloat16 if config.loop.precision == "bf16" else torch.float32
        teacher, scheduler, self.bundle = load_models(config, self.device, self.dtype)
        self.noise = NoiseSchedule(scheduler, self.device)
        self.student = Student(self.bundle.unet, self.bundle.scheduler, config).to(self.device)
        self.masters = Masters(self.student.trainable())
        for parameter in self.student.parameters():
            parameter.data = parameter.data.to(self.dtype)
        self.discriminator = make_discriminator(teacher, self.student, config).to(self.device)
        self.lpips = make_lpips(config, self.bundle.vae.channels)
        if self.lpips is not None:
            self.lpips.to(self.device, self.dtype)
        self.ema = EMA(self.masters, config.loop.ema) if config.loop.ema else None

        # Setup: data
        database = open_database(config, self.bundle)
        self.data, self.held_out = open_data(config, database), open_held_out(config, database)

        # Setup: optimisers, each with its own options
        self.optimizer_g = make_adamw(self.masters.parameters.values(), config.optim)
        self.optimizer_d = make_adamw(self.discriminator.parameters(), config.discriminator.optim)
        self.total = Total(config.loss.alpha, config.loss.beta, config.loss.adversarial)
        self.hinge_d, self.hinge_g, self.smooth_l1 = HingeD(), HingeG(), SmoothL1()
        self.r1 = R1(config.discriminator.r1) if config.discriminator.r1 else None
        if config.loop.compile:
            self._compile()

        self.step, self.updates, self.skipped = 0, 0, 0
        self.skipped_in_a_row = 0
        self._meters: dict[str, Tensor] = {}
        self._metered = 0
        self._watch = HeadWatch(self.discriminator.stages, config.loop.dead_after)
        if resume and (path := checkpoint.latest(self.out / CHECKPOINTS)):
            load_state(self, path)

    # The loop

    def train(self, max_steps: int | None = None) -> Path:
        """Runs up to `max_steps` optimiser steps in all, saves, exports, and returns the exported folder."""
        loop = self.config.loop
        last = loop.max_steps if max_steps is None else max_steps
        report = self._start_report(last)
        prefetcher = Prefetcher(self._load, self._numbers(last), self.config.data.prefetch)
        try:
            while self.step < last:
                # Update
                self._update([prefetcher.next() for _ in range(self.accumulation)])
                # Report
                if self.step % loop.log_every == 0 or self.step == last:
                    self._log(report)
                # Save
                if self.step % loop.save_every == 0 or self.step == last:
                    self._save()
                # Show
                if loop.sample_every and (self.step % loop.sample_every == 0 or self.step == last):
                    self._show()
        finally:
            prefetcher.close()
            if report is not None:
                report.close()
        return self.export(self.out / EXPORT)

    def _numbers(self, last: int) -> Iterator[range]:
        """Sample numbers of this process's micro-batches, from the next step on."""
        size = self.config.loop.micro_batch
        for step in range(self.step, last):
            for m in range(self.accumulation):
                start = step * self.config.loop.batch + (self.rank * self.accumulation + m) * size
                yield range(start, start + size)

    def _load(self, numbers: range) -> Batch:
        batch = self.data.batch(numbers)
        return batch.pin() if self.device.type == "cuda" else batch

    def _update(self, batches: list[Batch]) -> None:
        """One optimiser step of D and of G on the gradients of all micro-batches. Both see the same D: with and without
        accumulation, G's gradient is taken before D moves."""
        self.student.train()
        self.discriminator.train()
        for m, batch in enumerate(batches):
            self._micro_batch(batch.to(self.device), self._generator(m))
            self.masters.accumulate()
        g = list(self.masters.parameters.values())
        d = list(self.discriminator.parameters())
        self._average_gradients(g + d)
        norm_g, norm_d = _clip(g, self.config.optim.clip), _clip(d, self.config.discriminator.optim.clip)
        self._meter(norm_g=norm_g * self.accumulation, norm_d=norm_d * self.accumulation)
        # The one wait for the device in a step: was anything in it not finite? Every process has the same norms.
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

    def _micro_batch(self, batch: Batch, generator: torch.Generator) -> None:
        """Adds one micro-batch's gradients to D's heads and to what trains in the student."""
        config, size = self.config, len(batch)

        # What is drawn: the noise where none is stored, t_i of T_n, s of all N, and one ε for both z_s and ẑ_s
        def integers(high: int) -> Tensor:
            return torch.randint(0, high, (size,), generator=generator, device=self.device)

        drawn, eps = (torch.randn(batch.z0.shape, generator=generator, device=self.device) for _ in range(2))
        noise = torch.where(batch.paired.view(-1, 1, 1, 1), batch.noise, drawn)
        i, s = integers(self.student.steps), integers(len(self.noise))
        drop = torch.rand(size, generator=generator, device=self.device) < config.student.retrieval_dropout

        # Student: ẑ_0
        text = self._text(batch)
        retrieved = self._retrieved(batch, text.key, drop)
        z0_hat = self._denoise(self.student.noisy(batch.z0, noise, i), i, text.hidden_states, *retrieved)

        # Discriminator: features of both, noised alike
        z_s, z_s_hat = self.noise.noised(batch.z0, eps, s), self.noise.noised(z0_hat, eps, s)
        real, fake, extra = self._features(z_s, z_s_hat, s, text.hidden_states)

        # D's step, Eq. 6: the gradient stops at the features
        if self.r1 is not None:
            real = [f.detach().requires_grad_() for f in real]
        seen = [f.detach() for f in fake] if config.discriminator.shared_fake else extra.pop(0)
        wrong = extra[0] if extra else None
        logits = self.discriminator(_join(real, seen, wrong))
        on_real, on_fake = [x[:size] for x in logits], [x[size:] for x in logits]
        real_weight = (~batch.paired).float() if config.discriminator.real == "images" else None
        per_head = self.hinge_d.per_head(on_real, on_fake, self._fake_weight(batch, wrong), real_weight)
        loss_d = per_head.sum()
        if self.r1 is not None:
            loss_d = loss_d + self.r1(on_real, real)
        (loss_d / self.accumulation).backward()

        # G's step, Eqs. 7-10: through the frozen heads and the frozen encoder to ẑ_0
        adv = self.hinge_g(self.discriminator.judge(fake))
        distill = masked_mean(self.smooth_l1(z0_hat, batch.z0), batch.paired)
        lpips = self._lpips_loss(z0_hat, batch, generator)
        loss_g = self.total(adv, distill, lpips)
        (loss_g / self.accumulation).backward()

        right = accuracy(on_real, [x[:size] for x in on_fake], real_weight)
        self._meter(d=loss_d, g=loss_g, adv=adv, distill=distill, lpips=lpips, head=per_head, accuracy=right)

    # Its parts

    def estimate(self, batch: Batch, noise: Tensor, i: Tensor, *, alone: bool = False) -> Tensor:
        """ẑ_0 of a batch on the device, with its neighbours or alone."""
        text = self._text(batch)
        drop = torch.full((len(batch),), alone, device=self.device)
        retrieved = self._retrieved(batch, text.key, drop)
        return self._denoise(self.student.noisy(batch.z0, noise, i), i, text.hidden_states, *retrieved)

    def _generator(self, m: int) -> torch.Generator:
        """Draws of micro-batch m of this step on this process, whatever happened before."""
        words = np.random.SeedSequence([self.config.seed, self.step, self.rank, m]).generate_state(1, np.uint64)
        seed = int(words[0]) >> 1
        # Dropout in the LoRA draws from the global state.
        torch.manual_seed(seed)
        return torch.Generator(self.device).manual_seed(seed)

    @torch.no_grad()
    def _text(self, batch: Batch) -> TextStates:
        if batch.text is not None and batch.key is not None:
            return TextStates(batch.text, batch.key)
        return self.bundle.text.encode(batch.input_ids)

    def _retrieved(self, batch: Batch, key: Tensor, drop: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """h_retr (B, k, S, C), λ (B,) and valid (B, k), as a Generator would have them."""
        if batch.h_retr is None:
            return None, None, None
        assert batch.ids is not None and batch.scores is not None and batch.retr_keys is not None
        fixed = self.config.student.lam
        lam = None if fixed is None else torch.full_like(key[:, 0], fixed)
        lam, valid = blend_weights(cosine(key, batch.retr_keys), batch.ids, batch.scores, lam=lam)
        return batch.h_retr, torch.where(drop, 0.0, lam), valid & ~drop[:, None]

    def _denoise(self, *inputs: Any) -> Tensor:
        return self.student(*inputs)

    def _features(self, z_s: Tensor, z_s_hat: Tensor, s: Tensor, text: Tensor) -> tuple[list, list, list[list]]:
        """Features of z_s, of ẑ_s with its graph, and what else D looks at: its own pass of ẑ_s where the pass is not
        shared, and z_s with other samples' prompts."""
        settings, size = self.config.discriminator, len(z_s)
        parts = [(z_s, text)]
        if not settings.shared_fake:
            parts.append((z_s_hat.detach(), text))
        if settings.misaligned:
            parts.append((z_s, text.roll(1, 0)))
        with torch.no_grad():
            sample, states = (torch.cat([part[k] for part in parts]) for k in (0, 1))
            together = self.discriminator.features(sample, s.repeat(len(parts)), states)
        split = [[f[k * size : (k + 1) * size] for f in together] for k in range(len(parts))]
        fake = self.discriminator.features(z_s_hat, s, text)
        return split[0], fake, split[1:]

    def _fake_weight(self, batch: Batch, wrong: Any) -> Tensor | None:
        """(K, 2·B): how much each head's fakes count. A prompt that its neighbour in the batch has too is not
        misaligned, and to a head that cannot read it a wrong one is the same picture called fake: neither counts."""
        if wrong is None:
            return None
        differs = (batch.input_ids != batch.input_ids.roll(1, 0)).any(1).float()
        reads = self.discriminator.backbone.reads_text
        return torch.stack([torch.cat([torch.ones_like(differs), differs * read]) for read in reads])

    def _lpips_loss(self, z0_hat: Tensor, batch: Batch, generator: torch.Generator) -> Tensor:
        """Eq. 9. Only samples with a noise of their own have an estimate to compare."""
        if self.lpips is None:
            return z0_hat.new_zeros(())
        return masked_mean(self.lpips(z0_hat, batch.z0, generator), batch.paired)

    def _average_gradients(self, parameters: Sequence[Tensor]) -> None:
        """One all-reduce a step over one flat buffer: what trains is small, and nothing waits for it in between."""
        if self.world == 1:
            return
        grads = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([grad.flatten() for grad in grads])
        torch.distributed.all_reduce(flat)
        flat /= self.world
        for grad, mean in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(mean.view_as(grad))

    def _set_rates(self) -> None:
        for optimizer, settings in (
            (self.optimizer_g, self.config.optim),
            (self.optimizer_d, self.config.discriminator.optim),
        ):
            for group in optimizer.param_groups:
                group["lr"] = settings.rate(self.updates, self.config.loop.max_steps)

    def _skip(self) -> None:
        self.skipped += 1
        self.skipped_in_a_row += 1
        log.warning("step %d: the gradient is not finite; skipped (%d in all)", self.step, self.skipped)
        if self.skipped_in_a_row >= self.config.loop.max_skipped:
            raise NonFiniteOutput(
                f"{self.skipped_in_a_row} steps in a row had a gradient that is not finite, up to step {self.step}. "
                "Resume from the last checkpoint with a lower optim.lr, or look at the data for NaN"
            )

    # Reporting

    def _meter(self, **values: Tensor) -> None:
        for name, value in values.items():
            value = value.detach().float()
            self._meters[name] = self._meters[name] + value if name in self._meters else value
        self._metered += "d" in values

    def _log(self, report: Report | None) -> None:
        """Means since the last line, over all processes."""
        means = {name: value / max(1, self._metered) for name, value in self._meters.items()}
        self._meters, self._metered = {}, 0
        if self.world > 1:
            for value in means.values():
                torch.distributed.all_reduce(value)
                value /= self.world
        values: dict[str, Any] = {
            name: value.item() for name, value in means.items() if name not in ("head", "accuracy")
        }
        names, losses = self.discriminator.stages, means["head"].tolist()
        values["d_heads"] = dict(zip(names, losses, strict=True))
        values["d_accuracy"] = dict(zip(names, means["accuracy"].tolist(), strict=True))
        if report is not None:
            values["dead_heads"] = self._watch.check(self.step, losses)
            values |= {"skipped": self.skipped, "lr": self.optimizer_g.param_groups[0]["lr"]}
            if self.held_out is not None and self.step % self.config.loop.held_out_every == 0:
                values |= self.held_out.measure(self)
            report.write(self.step, self.config.loop.batch, values)

    def _start_report(self, last: int) -> Report | None:
        if not self.processes.is_main_process:
            return None
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / CONFIG).write_text(to_yaml(self.config), "utf-8")
        return Report(self.out, last, tensorboard=self.config.loop.tensorboard, start=self.step)

    def _show(self) -> None:
        from ragturbo.train.samples import sample_grid

        if self.processes.is_main_process:
            path = self.out / SAMPLES / f"{self.step:06d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            sample_grid(self).save(path)

    # Saving

    def _save(self) -> None:
        """Every process has the same state; the main one writes it."""
        if self.processes.is_main_process:
            save_state(self, self.out / CHECKPOINTS)
        self.processes.wait_for_everyone()

    def _check_out(self, resume: bool) -> None:
        if not resume and (found := checkpoint.latest(self.out / CHECKPOINTS)):
            raise InvalidRequest(f"{self.out} already holds {found.name}: pass --resume, or another --out")

    def export(self, folder: str | Path, *, whole: bool = False) -> Path:
        """Writes what was trained (its average, where one is kept) as a folder that Generator loads; see `export`."""
        from ragturbo.train.export import export

        if self.processes.is_main_process:
            export(self, Path(folder), whole=whole or self.config.mode == "student")
        self.processes.wait_for_everyone()
        return Path(folder)

    def _compile(self) -> None:
        self._denoise = torch.compile(self.student)  # type: ignore[method-assign]
        backbone = self.discriminator.backbone
        backbone._features = torch.compile(backbone._features)  # type: ignore[method-assign]


def _clip(parameters: Sequence[Tensor], largest: float) -> Tensor:
    """The norm before clipping."""
    return torch.nn.utils.clip_grad_norm_(parameters, largest if largest > 0 else float("inf"))


def _join(real: list[Tensor], fake: list[Tensor], wrong: list[Tensor] | None) -> list[Tensor]:
    """Heads see everything in one batch."""
    groups = [real, fake] + ([wrong] if wrong is not None else [])
    return [torch.cat(stage) for stage in zip(*groups, strict=True)]
