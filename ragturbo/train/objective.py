"""One micro-batch of latent adversarial diffusion distillation: forward, losses (Eqs. 6-10) and gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ragturbo.model.inject import blend_weights, cosine
from ragturbo.model.text import TextStates
from ragturbo.train.config import LADDConfig
from ragturbo.train.data import Batch
from ragturbo.train.discriminator import Discriminator, NoiseSchedule, accuracy
from ragturbo.train.losses import hinge_d, hinge_g, masked_mean, r1, smooth_l1, total
from ragturbo.train.lpips import LatentLPIPS
from ragturbo.train.student import Neighbors, Student


class Objective:
    """The losses of D and G on a batch, and their gradients in D's heads and in the student's trainable parameters."""

    def __init__(
        self,
        config: LADDConfig,
        student: Student,
        discriminator: Discriminator,
        noise: NoiseSchedule,
        lpips: LatentLPIPS | None,
        encode_text: Callable[[Tensor], TextStates],
    ) -> None:
        self.config, self.student, self.discriminator = config, student, discriminator
        self.noise, self.lpips, self.encode_text = noise, lpips, encode_text
        self._student = student
        if config.loop.compile:
            self._student = torch.compile(student)  # type: ignore[assignment]
            discriminator.backbone.compile()

    def backward(self, batch: Batch, generator: torch.Generator | None, accumulation: int = 1) -> dict[str, Tensor]:
        """Add the gradients of one of `accumulation` micro-batches to D's heads and the student.

        D and G are differentiated at the same D, so that accumulation does not change the gradients. `generator`, on
        the device of the batch, draws noise, timesteps and augmentations.

        Returns:
            Detached losses, the hinge loss of every head ("head") and its accuracy ("accuracy").
        """
        config, size, device = self.config, len(batch), batch.z0.device

        # Random draws: noise for samples without their own, t_i of T_n, s of all N, and one ε for both z_s and ẑ_s.
        def integers(high: int) -> Tensor:
            return torch.randint(0, high, (size,), generator=generator, device=device)

        drawn, eps = (torch.randn(batch.z0.shape, generator=generator, device=device) for _ in range(2))
        noise = torch.where(batch.paired.view(-1, 1, 1, 1), batch.noise, drawn)
        i, s = integers(self.student.steps), integers(len(self.noise))
        drop = torch.rand(size, generator=generator, device=device) < config.student.retrieval_dropout

        # Student: ẑ_0. D reads the prompt that the teacher drew.
        text, shown = self.text(batch), self.teacher_text(batch)
        x = self.student.noisy(batch.z0, noise, i)
        z0_hat, h = self._student(x, i, text.hidden_states, self.retrieved(batch, text.key, drop))

        # Discriminator features of z_s and ẑ_s.
        z_s, z_s_hat = self.noise.noised(batch.z0, eps, s), self.noise.noised(z0_hat, eps, s)
        real, fake, own, wrong = self._features(z_s, z_s_hat, s, shown)

        # D, Eq. 6: on detached features.
        penalty = config.discriminator.r1
        if penalty:
            real = [f.detach().requires_grad_() for f in real]
        groups = [real, own or [f.detach() for f in fake], *([wrong] if wrong else [])]
        # One pass of the heads over all groups.
        logits = self.discriminator([torch.cat(stage) for stage in zip(*groups, strict=True)])
        on_real, on_fake = [x[:size] for x in logits], [x[size:] for x in logits]
        real_weight = (~batch.paired).float() if config.discriminator.real == "images" else None
        per_head = hinge_d(on_real, on_fake, self.fake_weight(batch) if wrong else None, real_weight)
        loss_d = per_head.sum() + (r1(on_real, real, penalty) if penalty else 0.0)
        (loss_d / accumulation).backward()

        # G, Eqs. 7-10: through the frozen heads and backbone to ẑ_0.
        adv = hinge_g(self.discriminator.judge(fake))
        distill = masked_mean(smooth_l1(z0_hat, batch.z0), batch.paired)
        lpips = z0_hat.new_zeros(())
        if self.lpips is not None:
            lpips = masked_mean(self.lpips(z0_hat, batch.z0, generator), batch.paired)
        weights = config.loss
        loss_g = total(adv, distill, lpips, adversarial=weights.adversarial, alpha=weights.alpha, beta=weights.beta)
        further: dict[str, Tensor] = {}
        if weights.hspace:
            further["hspace"] = self._hspace(batch, x, i, h, shown, drop)
            loss_g = loss_g + weights.hspace * further["hspace"]
        (loss_g / accumulation).backward()

        right = accuracy(on_real, [x[:size] for x in on_fake], real_weight)
        values = {"d": loss_d, "g": loss_g, "adv": adv, "distill": distill, "lpips": lpips, **further}
        return {name: x.detach() for name, x in {**values, "head": per_head, "accuracy": right}.items()}

    def estimate(self, batch: Batch, noise: Tensor, *, retrieve: bool = True) -> Tensor:
        """ẑ_0 by one step from pure noise. retrieve=False: without neighbours (λ = 0)."""
        first = torch.zeros(len(batch), dtype=torch.int64, device=batch.z0.device)
        text = self.text(batch)
        retrieved = self.retrieved(batch, text.key, torch.full_like(batch.paired, not retrieve))
        return self._student(self.student.noisy(batch.z0, noise, first), first, text.hidden_states, retrieved)[0]

    @torch.no_grad()
    def text(self, batch: Batch) -> TextStates:
        if batch.text is not None and batch.key is not None:
            return TextStates(batch.text, batch.key)
        return self.encode_text(batch.input_ids)

    @torch.no_grad()
    def teacher_text(self, batch: Batch) -> Tensor:
        """(B, L, D): the states of the prompts that the teacher drew."""
        if batch.teacher_ids is None:
            return self.text(batch).hidden_states
        if batch.teacher_text is not None:
            return batch.teacher_text
        return self.encode_text(batch.teacher_ids).hidden_states

    def retrieved(self, batch: Batch, key: Tensor, drop: Tensor) -> Neighbors | None:
        """As in a Generator. Samples in `drop` (B,) get no neighbours."""
        if batch.h_retr is None:
            return None
        assert batch.ids is not None
        fixed = self.config.student.lam
        lam = None if fixed is None else torch.full_like(key[:, 0], fixed)
        weights = batch.lam
        if weights is None:
            assert batch.retr_keys is not None
            weights = cosine(key, batch.retr_keys)
        lam, valid = blend_weights(weights, batch.ids, weights, lam=lam)
        phrases = None
        if self.config.student.phrases:
            assert batch.lam is not None
            phrases = ~batch.lam.isnan()
        return Neighbors(batch.h_retr, torch.where(drop[:, None], 0.0, lam), valid & ~drop[:, None], phrases)

    def _hspace(self, batch: Batch, x: Tensor, i: Tensor, h: Tensor, shown: Tensor, drop: Tensor) -> Tensor:
        """Squared error between the decoded feature and the one of the teacher's prompt, over the latter's variance."""
        with torch.no_grad():
            wanted = self.student.encode(x, i, shown).h.float()
        error = (h.float() - wanted).square().flatten(1).mean(1) / wanted.var()
        return masked_mean(error, batch.paired & ~drop)

    def _features(self, z_s: Tensor, z_s_hat: Tensor, s: Tensor, text: Tensor) -> tuple[list[Tensor], ...]:
        """Features of every stage: of z_s; of ẑ_s with its graph; of ẑ_s without one, for D alone, unless the pass is
        shared; of z_s with other samples' prompts, if misaligned pairs are on. The last two may be empty lists."""
        settings, size = self.config.discriminator, len(z_s)
        parts = {"real": (z_s, text)}
        if not settings.shared_fake:
            parts["own"] = (z_s_hat.detach(), text)
        if settings.misaligned:
            parts["wrong"] = (z_s, text.roll(1, 0))
        with torch.no_grad():
            sample, states = (torch.cat(column) for column in zip(*parts.values(), strict=True))
            together = self.discriminator.backbone(sample, s.repeat(len(parts)), states)
        split = {name: [f[k * size : (k + 1) * size] for f in together] for k, name in enumerate(parts)}
        fake = self.discriminator.backbone(z_s_hat, s, text)
        return split["real"], fake, split.get("own", []), split.get("wrong", [])

    def fake_weight(self, batch: Batch) -> Tensor:
        """(K, 2·B): weights of the fakes, then of the misaligned pairs, for each head. 0 for pairs whose prompt is the
        sample's own, and for heads whose stage does not depend on the prompt: to those a pair is a real image."""
        ids = batch.input_ids if batch.teacher_ids is None else batch.teacher_ids
        differs = (ids != ids.roll(1, 0)).any(1).float()
        reads = self.discriminator.backbone.reads_text
        return torch.stack([torch.cat([torch.ones_like(differs), differs * read]) for read in reads])
