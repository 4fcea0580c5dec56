"""Stages 4 and 5: (noise, teacher latent) pairs, and the one-step student that learns to jump from one to the other.

Three losses: smooth L1 to the teacher's latent; the distance of normalised teacher features, which blurs cannot
satisfy; and a light hinge game on noised latents against real pictures and misaligned pairs, which keeps edges.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import parallel
import torch
from data import batches
from device import DEVICE, Table, autocast
from diffusers import UNet2DConditionModel
from loop import Average, rate, run, set_rate
from networks import LATENT_SIDE
from sampling import Texts, noise_levels, noise_of, student_latents, teacher_latents
from settings import Settings
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

log = logging.getLogger("ragturbo.recipe")
PAIRS_AT_ONCE = 1000 if DEVICE.type == "cuda" else 100


def make_pairs(work: Path, s: Settings, minutes: float | None = None) -> None:
    """pairs.npy: row i is the teacher's latent for the caption `pair_caption(i)` and the noise of `pair_seed(i)`."""
    captions, texts = json.loads((work / "captions.json").read_text()), Texts(work)
    teacher = UNet2DConditionModel.from_pretrained(work / "teacher_unet").to(DEVICE).eval()
    path = work / "pairs.npy"
    done = np.load(path) if path.exists() else np.zeros((0, 4, 16, 16), np.float16)
    for chunk in batches(s.pairs, PAIRS_AT_ONCE):
        if chunk.start < len(done):
            continue
        rows = range(chunk.start, chunk.stop)
        states = texts.states([captions[pair_caption(i, s)] for i in rows])
        noise = noise_of(range(pair_seed(rows.start, s), pair_seed(rows.stop, s)))
        latents = teacher_latents(teacher, noise, states, texts.empty, steps=s.pair_steps, guidance=s.guidance, order=2)
        done = np.concatenate([done, latents.half().cpu().numpy()])
        if chunk.stop % 1000 == 0 or chunk.stop == s.pairs:
            np.save(path, done)
            log.info("pairs %d of %d", len(done), s.pairs)


def pair_caption(i: int, s: Settings) -> int:
    # A stride coprime to the number of scenes: the pairs' captions are all different, and spread over the set.
    return (i * 7_919) % s.scenes


def pair_seed(i: int, s: Settings) -> int:
    return s.seed * 10_000_000 + i


class TeacherFeatures(nn.Module):
    """The teacher's encoder, frozen: its levels' outputs at 16×16, 8×8 and 4×4, normalised over groups of channels."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet.eval().requires_grad_(False)
        self.widths = unet.config.block_out_channels

    def forward(self, x: Tensor, t: Tensor, states: Tensor) -> list[Tensor]:
        unet = self.unet
        emb = unet.time_embedding(unet.time_proj(t).to(x.dtype))
        h, kept = unet.conv_in(x), []
        for block in unet.down_blocks:
            h, skips = block(h, emb)
            kept.append(skips[-1 if block.downsamplers is None else -2])
        kept.append(unet.mid_block(h, emb, encoder_hidden_states=states))
        return [F.group_norm(f.float(), 8) for f in kept]


class Heads(nn.Module):
    """One small convolutional judge a feature level; spectral norm everywhere but on the last 1×1 convolution."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Sequential(
                spectral_norm(nn.Conv2d(width, 64, 3, padding=1)), nn.SiLU(),
                spectral_norm(nn.Conv2d(64, 64, 4, 2, 1)), nn.SiLU(), nn.Conv2d(64, 1, 1),
            )
            for width in widths
        )  # fmt: skip

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        return [head(f) for head, f in zip(self.heads, features, strict=True)]


def distil_student(work: Path, s: Settings, minutes: float | None = None) -> None:
    texts, captions = Texts(work), json.loads((work / "captions.json").read_text())
    targets, real_latents = Table(work / "pairs.npy"), Table(work / "latents.npy")
    count = len(targets)
    noises = torch.cat([noise_of(range(pair_seed(c.start, s), pair_seed(c.stop, s))) for c in batches(count, 500)])
    rows = torch.tensor([pair_caption(i, s) for i in range(count)], device=DEVICE)
    states_of = [texts.states([captions[i] for i in rows[chunk].tolist()]).half() for chunk in batches(count, 500)]
    all_states = torch.cat(states_of)
    alpha, sigma = noise_levels()

    torch.manual_seed(s.seed + 6)
    student = UNet2DConditionModel.from_pretrained(work / "teacher_unet").to(DEVICE).train()
    features = TeacherFeatures(UNet2DConditionModel.from_pretrained(work / "teacher_unet").to(DEVICE))
    heads, mean = Heads((*features.widths, features.widths[-1])).to(DEVICE), Average(student, 0.998)
    generator_step = torch.optim.AdamW(student.parameters(), lr=s.student_rate, weight_decay=0.01, betas=(0.9, 0.99))
    heads_step = torch.optim.AdamW(heads.parameters(), lr=s.discriminator_rate, weight_decay=0.0, betas=(0.0, 0.99))

    def update(step: int, generator: torch.Generator) -> dict[str, float]:
        pace = rate(step, s.student_steps, 1.0)
        set_rate(generator_step, s.student_rate * pace)
        set_rate(heads_step, s.discriminator_rate * pace)
        i = torch.randint(count, (s.student_batch,), generator=generator)
        t = torch.randint(1000, (len(i),), generator=generator)
        eps = torch.randn((len(i), 4, LATENT_SIDE, LATENT_SIDE), generator=generator)
        i, t, eps = (parallel.part(drawn).to(DEVICE) for drawn in (i, t, eps))
        told, target = all_states[i].float(), targets[i].float()
        a, b = alpha[t].view(-1, 1, 1, 1), sigma[t].view(-1, 1, 1, 1)

        def seen(latents: Tensor, states: Tensor = told) -> list[Tensor]:
            with autocast():
                return features(a * latents + b * eps, t, states)

        with autocast():
            made = student_latents(student, noises[i], told)
        made = made.float()
        features_made = seen(made)
        with torch.no_grad():
            features_target = seen(target)
        copy = F.smooth_l1_loss(made, target, beta=0.5)
        likeness = sum((f - g).abs().mean() for f, g in zip(features_made, features_target, strict=True)) / 4
        losses = {"copy": copy.item(), "likeness": likeness.item()}
        loss = copy + 0.5 * likeness

        if step >= s.adversarial_from:
            heads.requires_grad_(False)
            fool = -sum(verdict.mean() for verdict in heads(features_made)) / 4
            heads.requires_grad_(True)
            loss = loss + s.adversarial * min(1.0, (step - s.adversarial_from) / 200) * fool
            losses["fool"] = fool.item()
        generator_step.zero_grad(set_to_none=True)
        loss.backward()
        parallel.mean_gradients(student.parameters())
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        generator_step.step()
        mean.update(student, step)

        if step >= s.adversarial_from:
            # A real picture of the caption, against the student's, and against a real picture told another caption.
            real = real_latents[rows[i]].float()
            with torch.no_grad():
                features_real, features_other = seen(real), seen(real, told.roll(1, 0))
            on_real, on_other = heads(features_real), heads(features_other)
            on_made = heads([f.detach() for f in features_made])
            hinges = [
                F.relu(1 - r).mean() + 0.5 * F.relu(1 + m).mean() + 0.5 * F.relu(1 + o).mean()
                for r, m, o in zip(on_real, on_made, on_other, strict=True)
            ]
            d_loss = sum(hinges) / 4
            heads_step.zero_grad(set_to_none=True)
            d_loss.backward()
            parallel.mean_gradients(heads.parameters())
            heads_step.step()
            losses["hinge"] = d_loss.item()
            for n, (r, m) in enumerate(zip(on_real, on_made, strict=True)):
                losses[f"right_{n}"] = ((r > 0).float().mean() + (m < 0).float().mean()).item() / 2
        return losses

    state = {"student": student, "mean": mean, "heads": heads, "g": generator_step, "d": heads_step}
    run("student", work, update, state, steps=s.student_steps, seed=s.seed + 7, minutes=minutes)
    if parallel.RANK == 0:
        mean.module.save_pretrained(work / "unet")
