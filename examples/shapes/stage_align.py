"""Train the student's encoder and an adapter in H-space alone, so that pictures can explain names.

Captions tell a student everything. So at t = 0 its h holds the colours of a picture, but hardly a shape that the
caption does not mention: the skips carry the picture past the middle block. Both targets are what the same student
makes of descriptions:

* h_retr of a lesson, whose caption only names the thing, becomes h_retr of the lesson with a description;
* h_tgt + λ·g of a prompt with names becomes h of the prompt with descriptions, at the same noise.

With two things the adapter must know which lesson belongs where. Its phrase embeddings tell which noun of the prompt a
lesson explains, and h_tgt must tell which noun is where: that can be read from its tokens over the things, whose places
the teacher's latents show.

A caption without a relation, "a red circle and a blue square", leaves the places open. One step cannot choose and draws
the mean of all choices; so its target is h of "a red circle to the left of a blue square".

Otherwise h of ordinary prompts and the skips of pure noise stay as they are, and the decoder is not trained.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import NamedTuple

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
from torch.nn import functional

from ragturbo.evaluate.names import describe_names, named
from ragturbo.evaluate.world import JOINS, Meaning, parse
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


class Batch(NamedTuple):
    """The named prompts come first, and of those the `len(places)` whose noise is that of their teacher latents.
    Neighbours are in the order of the prompt's nouns."""

    text: Tensor
    """(B, L, D): of the student's prompts."""
    shown: Tensor
    """(B, L, D): of the prompts that h is to be that of, with descriptions and relations."""
    noise: Tensor
    ids: Tensor
    """(B, K): rows of the batch's lessons, -1 for none."""
    lam: Tensor
    phrases: Tensor
    """(B, K) bool: as the adapter takes it."""
    latents: Tensor
    names: Tensor
    """(M, L, D): text of the lessons, which only names."""
    targets: Tensor
    """(M, T, C): features of the lessons with descriptions."""
    places: Tensor
    """(P, K, T) bool: the tokens of h over the things of each noun, if the prompt states their relation."""

    def to(self, device: torch.device) -> Batch:
        return Batch(*(v.to(device).float() if v.is_floating_point() else v.to(device) for v in self))


class Samples:
    """Prompts with and without names, and the lessons that are their neighbours."""

    def __init__(self, work: Path, s: Settings, start: HSpaceUNet) -> None:
        """start: the student whose features of described lessons are the targets."""
        self.s = s
        self.named, self.noise = (_column(work / NAMED, name) for name in ("text", "noise"))
        self.ordinary = _column(work / PAIRS, "text")
        self.lessons, self.lesson_text = (_column(work / LESSONS, name) for name in ("latents", "text"))
        names, texts = Names(work, s), TextStates(work)

        def states(prompts: list[str]) -> Tensor:
            return torch.cat([texts.states(prompts[part]).half().cpu() for part in batches(len(prompts), 256)])

        meanings = [meaning for meaning in names.meanings if meaning]
        prompts = [prompt for prompt in names.prompts if prompt]
        told = (describe_names(p, named(m)) for p, m in zip(prompts, meanings, strict=True))
        self.shown = states([_placed(p, m) for p, m in zip(told, meanings, strict=True)])
        self.ordinary_shown = states([_placed(caption, parse(caption)) for caption in names.captions])
        self.several, self.ordinary_several = (
            torch.tensor([len(m.nouns) > 1 for m in some]) for some in (meanings, map(parse, names.captions))
        )
        self.two = torch.tensor([len(named(m)) == 2 for m in meanings]).nonzero().flatten()
        related = torch.tensor([m.relation is not None for m in meanings])
        self.places = names.places(work) & related[:, None, None]
        self.neighbours = names.neighbour_rows()
        # A picture shows its sizes: half of the lessons do not mention them.
        self.short_text = states(names.short_lessons())
        targets, described = [], names.described_lessons()
        for part in batches(len(described), 128):
            latents, text = self.lessons[part].to(DEVICE).float(), texts.states(described[part])
            with torch.no_grad():
                targets.append(start.retrieval_features(latents, text).half().cpu())
        self.targets = torch.cat(targets)

    def draw(self, generator: torch.Generator) -> Batch:
        s = self.s
        i = torch.randint(len(self.named), (s.align_named,), generator=generator)
        if len(self.two):
            # More prompts with two names, which are harder.
            harder = self.two[torch.randint(len(self.two), i.shape, generator=generator)]
            i = torch.where(torch.rand(i.shape, generator=generator) < s.align_two, harder, i)
        j = torch.randint(len(self.ordinary), (s.align_batch - s.align_named,), generator=generator)
        rows = [self.neighbours[name][n] for name, picks in ((NAMED, i), (PAIRS, j)) for n in picks.tolist()]
        ids = torch.full((s.align_batch, K), -1)
        lam, lessons = torch.zeros(ids.shape), []
        for b, row in enumerate(rows):
            for k, (lesson, value) in enumerate(row):
                if lesson >= 0 and len(lessons) < s.align_lessons:
                    ids[b, k], lam[b, k] = len(lessons), value
                    lessons.append(lesson)
        # Of one size, so that a compiled encoder sees one shape.
        lessons += torch.randint(len(self.lessons), (s.align_lessons - len(lessons),), generator=generator).tolist()
        noise = torch.randn((s.align_batch, 4, LATENT_SIDE, LATENT_SIDE), generator=generator)
        known = i[: 2 * s.align_named // 3]
        noise[: len(known)] = self.noise[known].float()
        # Without the phrase embeddings, too: a search by the whole prompt gives none.
        told = torch.rand(s.align_batch, generator=generator) > 0.2
        several = torch.cat([self.several[i], self.ordinary_several[j]]) & told
        short = torch.rand((len(lessons), 1, 1), generator=generator) < 0.5
        return Batch(
            text=torch.cat([self.named[i], self.ordinary[j]]),
            shown=torch.cat([self.shown[i], self.ordinary_shown[j]]),
            noise=noise,
            ids=ids,
            lam=lam,
            phrases=torch.stack([torch.ones_like(several), several], 1),
            latents=self.lessons[lessons],
            names=torch.where(short, self.short_text[lessons], self.lesson_text[lessons]),
            targets=self.targets[lessons],
            places=self.places[known],
        ).to(DEVICE)


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
    adapter = HSpaceAdapter(s.unet_channels[-1], s.adapter_heads, phrases=K).to(DEVICE).train()
    # Reads from a token of h which noun's thing is there; only training uses it.
    reader = nn.Linear(s.unet_channels[-1], 1).to(DEVICE)
    both = nn.ModuleDict({"unet": unet, "adapter": adapter, "reader": reader})
    mean = Average(both, 0.995)
    encoder = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    # The adapter starts at zero and takes larger steps than the encoder.
    groups = (encoder, [*adapter.parameters(), *reader.parameters()])
    optimizers = [torch.optim.AdamW(group, weight_decay=0.01, betas=(0.9, 0.99), fused=True) for group in groups]
    old, new = (torch.compile(_encode_with(HSpaceUNet(u)), dynamic=False) for u in (start, unet))
    noisy, clean = torch.tensor([999], device=DEVICE), torch.tensor([0], device=DEVICE)

    def update(step: int, generator: torch.Generator) -> dict[str, float]:
        for optimizer, peak in zip(optimizers, (s.align_rate, s.align_adapter_rate), strict=True):
            set_rate(optimizer, rate(step, s.align_steps, peak))
        # Each process draws its own samples.
        generator.manual_seed(generator.initial_seed() * parallel.WORLD + parallel.RANK)
        batch, first = samples.draw(generator), s.align_named
        with attention(), autocast():
            with torch.no_grad():
                wanted, kept = old(batch.noise, noisy, batch.shown)
            h, skips = new(batch.noise, noisy, batch.text)
            h_retr, _ = new(batch.latents, clean, batch.names)
        h_retr, plain, wanted = (to_tokens(value.float()) for value in (h_retr, h, wanted))
        blended = adapter(plain, h_retr[batch.ids.clamp(min=0)], batch.lam, batch.ids >= 0, phrases=batch.phrases)
        losses = {
            "named": 1.5 * _error(blended[:first], wanted[:first], wanted),
            "ordinary": _error(blended[first:], wanted[first:], wanted),
            "alone": 2 * _error(plain[first:], wanted[first:], wanted),
            "lessons": _error(h_retr, batch.targets),
            "skips": 2 * torch.stack([_error(a.float(), b.float()) for a, b in zip(skips, kept, strict=True)]).sum(),
            "places": s.align_places * _places_error(reader(plain[: len(batch.places)]), batch.places),
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


def _placed(caption: str, meaning: Meaning) -> str:
    """The caption; if it has two nouns without a relation, with the first left of the second."""
    if len(meaning.nouns) < 2 or meaning.relation:
        return caption
    return re.sub(rf"\b({'|'.join(JOINS)})\b", "to the left of", caption, count=1)


def _places_error(read: Tensor, places: Tensor) -> Tensor:
    """read: (P, T, 1), the logit of "the second noun"; places: (P, 2, T). Cross-entropy where the things are."""
    second = torch.tensor([0.0, 1.0], device=read.device)[:, None].expand(places.shape)
    errors = functional.binary_cross_entropy_with_logits(read.mT.expand(places.shape), second, reduction="none")
    return (errors * places).sum() / places.sum().clamp(min=1)


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
