"""Train the student's encoder and an adapter in H-space alone, so that pictures can explain names.

A student that was told everything in words does not look: at t = 0 its h holds the colours of a picture, but hardly a
shape that the caption does not mention, because the skips carry the picture past the middle block. Both targets are
what the same student makes of descriptions:

* h_retr of a lesson, whose caption only names the thing, becomes h_retr of the lesson with a description;
* h_tgt + λ·g of a prompt with names becomes h of the prompt with descriptions, at the same noise.

h of ordinary prompts and the skips of pure noise stay as they are, and the decoder is not trained.
"""

from __future__ import annotations

import copy
from pathlib import Path

import parallel
import torch
from data import batches
from device import DEVICE, attention, autocast
from diffusers import UNet2DConditionModel
from loop import Average, rate, run, set_rate
from networks import LATENT_SIDE
from sampling import TextStates
from settings import Settings
from stage_bundle import save_bundle
from stage_names import LESSONS, NAMED, PAIRS, K, Names, make_names
from torch import Tensor, nn

from ragturbo.model.adapter import HSpaceAdapter
from ragturbo.model.tokens import to_tokens
from ragturbo.model.unet import HSpaceUNet
from ragturbo.train.shards import Shards

STUDENT, ADAPTER = "student_base", "aligned_adapter"


def name_pairs(work: Path, s: Settings, minutes: float | None = None) -> None:
    """Save the student to start from, and give the pairs names and neighbours."""
    if parallel.RANK == 0:
        save_bundle(work, work / "unet", work / STUDENT)
    parallel.barrier()
    make_names(work, s, str(work / STUDENT))


class Samples:
    """Batches of prompts with and without names, and the lessons that are their neighbours."""

    def __init__(self, work: Path, s: Settings, start: HSpaceUNet) -> None:
        """start: the student whose features of described lessons are the targets."""
        self.s = s
        self.named, self.shown = (_column(work / NAMED, name) for name in ("text", "teacher_text"))
        self.ordinary = _column(work / PAIRS, "text")
        self.lessons, self.lesson_text = (_column(work / LESSONS, name) for name in ("latents", "text"))
        names, texts = Names(work, s), TextStates(work)
        self.neighbours = names.neighbour_rows()
        captions, targets = names.described_lessons(), []
        with torch.no_grad():
            for part in batches(len(captions), 128):
                latents, states = self.lessons[part].to(DEVICE).float(), texts.states(captions[part])
                targets.append(start.retrieval_features(latents, states).half().cpu())
        self.targets = torch.cat(targets)

    def draw(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Return text of the student's and of the described prompts; rows of the batch's lessons and λ (B, k); latents,
        text and targets of the lessons. The named prompts come first."""
        s = self.s
        picks = {NAMED: torch.randint(len(self.named), (s.align_named,), generator=generator)}
        rest = s.align_batch - s.align_named
        picks[PAIRS] = torch.randint(len(self.ordinary), (rest,), generator=generator)
        rows = [self.neighbours[name][i] for name in (NAMED, PAIRS) for i in picks[name].tolist()]
        ids = torch.full((s.align_batch, K), -1)
        lam, lessons = torch.zeros(ids.shape), []
        for i, row in enumerate(rows):
            for j, (lesson, value) in enumerate(row):
                if lesson >= 0 and len(lessons) < s.align_lessons:
                    ids[i, j], lam[i, j] = len(lessons), value
                    lessons.append(lesson)
        # Of one size, so that a compiled encoder sees one shape.
        more = torch.randint(len(self.lessons), (s.align_lessons - len(lessons),), generator=generator)
        lessons += more.tolist()
        own = torch.cat([self.named[picks[NAMED]], self.ordinary[picks[PAIRS]]])
        shown = torch.cat([self.shown[picks[NAMED]], self.ordinary[picks[PAIRS]]])
        tables = (self.lessons[lessons], self.lesson_text[lessons], self.targets[lessons])
        floats = [value.to(DEVICE).float() for value in (own, shown, lam, *tables)]
        return (*floats[:2], ids.to(DEVICE), *floats[2:])


def align(work: Path, s: Settings, minutes: float | None = None) -> None:
    """Replace work/unet by the aligned student and write its adapter to work/aligned_adapter."""
    parallel.start()
    start = UNet2DConditionModel.from_pretrained(work / STUDENT / "unet", torch_dtype=torch.float32).to(DEVICE)
    unet = copy.deepcopy(start).train()
    start.requires_grad_(False)
    samples = Samples(work, s, HSpaceUNet(start))
    for part in (unet.up_blocks, unet.conv_norm_out, unet.conv_out):
        part.requires_grad_(False)
    torch.manual_seed(s.seed + 40)
    adapter = HSpaceAdapter(s.unet_channels[-1], s.adapter_heads).to(DEVICE).train()
    both = nn.ModuleDict({"unet": unet, "adapter": adapter})
    mean = Average(both, 0.995)
    encoder = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    # The adapter starts at zero and takes larger steps than the encoder.
    optimizers = [
        torch.optim.AdamW(p, weight_decay=0.01, betas=(0.9, 0.99), fused=True) for p in (encoder, adapter.parameters())
    ]
    old, new = (torch.compile(_encode_with(HSpaceUNet(u)), dynamic=False) for u in (start, unet))
    noisy, clean = torch.tensor([999], device=DEVICE), torch.tensor([0], device=DEVICE)

    def update(step: int, generator: torch.Generator) -> dict[str, float]:
        for optimizer, peak in zip(optimizers, (s.align_rate, s.align_adapter_rate), strict=True):
            set_rate(optimizer, rate(step, s.align_steps, peak))
        # Each process draws its own samples.
        generator.manual_seed(generator.initial_seed() * parallel.WORLD + parallel.RANK)
        own, shown, ids, lam, latents, names, described = samples.draw(generator)
        named = s.align_named
        noise = torch.randn((len(own), 4, LATENT_SIDE, LATENT_SIDE), generator=generator).to(DEVICE)
        with attention(), autocast():
            with torch.no_grad():
                wanted, kept = old(noise, noisy, shown)
            h, skips = new(noise, noisy, own)
            h_retr, _ = new(latents, clean, names)
        h_retr, plain = to_tokens(h_retr.float()), to_tokens(h.float())
        blended = adapter(plain, h_retr[ids.clamp(min=0)], lam, ids >= 0)
        wanted = to_tokens(wanted.float())
        losses = {
            "named": _error(blended[:named], wanted[:named], wanted),
            "ordinary": _error(blended[named:], wanted[named:], wanted),
            "alone": _error(plain[named:], wanted[named:], wanted),
            "lessons": _error(h_retr, described),
            "skips": torch.stack([_error(a.float(), b.float()) for a, b in zip(skips, kept, strict=True)]).sum(),
        }
        loss = torch.stack(list(losses.values())).sum()
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        parallel.mean_gradients(both.parameters())
        torch.nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        mean.update(both, step)
        return {name: value.item() for name, value in losses.items()}

    state = {"both": both, "mean": mean, "encoder_optimizer": optimizers[0], "adapter_optimizer": optimizers[1]}
    run("align", work, update, state, steps=s.align_steps, seed=s.seed + 41, minutes=minutes)
    if parallel.RANK == 0:
        mean.module["unet"].save_pretrained(work / "unet")
        (work / ADAPTER).mkdir(exist_ok=True)
        mean.module["adapter"].save(work / ADAPTER)


def _encode_with(unet: HSpaceUNet):
    def encode(sample: Tensor, timestep: Tensor, text: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        state = unet.encode(sample, timestep, text)
        return state.h, state.skips

    return encode


def _error(value: Tensor, wanted: Tensor, scale: Tensor | None = None) -> Tensor:
    """Mean squared error, as a share of the variance of the wanted values (or of `scale`)."""
    return (value - wanted).square().mean() / (wanted if scale is None else scale).var()


def _column(folder: Path, name: str) -> Tensor:
    shards = Shards(folder)
    return torch.cat([shards.tensor(i, name) for i in range(len(shards.files))])
