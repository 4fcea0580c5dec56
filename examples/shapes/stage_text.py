"""Train the text encoder with contrastive losses on the end-of-text state, as CLIP's.

1. Caption against image, among random scenes.
2. Caption against image, among scenes of the same kinds, some of which differ only in their relation. Without this term
   the states of "left of" and "right of" differ by 3 % of their norm, and no teacher can learn the difference.
3. Caption against another caption that names the same kinds, for retrieval.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from data import to_float, tokenize
from device import DEVICE, Table, autocast
from loop import rate, run, set_rate
from networks import ImageEncoder, make_text_encoder
from settings import Settings
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer

from ragturbo.evaluate.rendering import render
from ragturbo.evaluate.world import OPPOSITE, RARE, Scene, all_kind_sets, arrange, phrase, sample_scene, vocabulary

# Number of scenes for each set of kinds.
MEMBERS = 12


def train_text(work: Path, s: Settings, minutes: float | None = None) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    images, tokens = Table(work / "images.npy"), Table(work / "tokens.npy")
    family = _families(tokenizer, s)
    torch.manual_seed(s.seed + 2)
    text, image = make_text_encoder(work / "tokenizer", s), ImageEncoder(s.text_width)
    scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
    both = nn.ModuleDict({"text": text, "image": image})
    both.register_parameter("scale", scale)
    both.to(DEVICE)
    optimizer = torch.optim.AdamW(both.parameters(), lr=s.text_rate, weight_decay=0.02, betas=(0.9, 0.98))

    def update(step: int, generator: torch.Generator) -> dict[str, float]:
        set_rate(optimizer, rate(step, s.text_steps, s.text_rate))
        index = torch.randint(len(tokens), (s.text_batch,), generator=generator)
        group = torch.randint(len(family.ids), (s.text_batch,), generator=generator)
        one, two = torch.rand((s.text_batch, MEMBERS), generator=generator).argsort(-1)[:, :2].T
        # Near misses: two couples from each of a quarter of the families.
        near = group[: s.text_batch // 4].repeat_interleave(4)
        couple = torch.rand((s.text_batch // 4, MEMBERS // 2), generator=generator).argsort(-1)[:, :2, None]
        member = (2 * couple + torch.arange(2)).flatten()
        with autocast():
            ids = [tokens[index].long(), family.ids[group, one], family.ids[group, two], family.ids[near, member]]
            keys, left, right, near_keys = text(input_ids=torch.cat(ids)).pooler_output.float().chunk(4)
            pictures = torch.cat([to_float(images[index]), to_float(family.images[near, member])])
            seen, near_seen = image(pictures).float().chunk(2)
        temperature = scale.exp().clamp(max=100)
        random_loss = contrast(keys, seen, temperature)
        near_loss = contrast(near_keys, near_seen, temperature, family.meanings[near, member])
        same_loss = contrast(left, right, temperature, group.to(DEVICE))
        optimizer.zero_grad(set_to_none=True)
        (random_loss + near_loss + same_loss).backward()
        torch.nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        optimizer.step()
        losses = {"matched": random_loss.item(), "near": near_loss.item(), "same": same_loss.item()}
        return {**losses, "scale": temperature.item()}

    state = {"both": both, "optimizer": optimizer}
    run("text", work, update, state, steps=s.text_steps, seed=s.seed + 3, minutes=minutes)
    _forget_pieces(text, tokenizer)
    text.save_pretrained(work / "text_encoder")


def contrast(a: Tensor, b: Tensor, scale: Tensor, group: Tensor | None = None) -> Tensor:
    """Symmetric InfoNCE; rows of the same group are not used as negatives of each other."""
    logits = scale * F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T
    if group is not None:
        twin = (group[:, None] == group[None, :]) & ~torch.eye(len(group), dtype=torch.bool, device=group.device)
        logits = logits.masked_fill(twin, float("-inf"))
    target = torch.arange(len(a), device=a.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


class _Family(NamedTuple):
    """Scenes without rare kinds; all scenes of a row name the same kinds."""

    ids: Tensor
    """(families, MEMBERS, L)"""
    images: Tensor
    """(families, MEMBERS, 64, 64, 3) uint8"""
    meanings: Tensor
    """(families, MEMBERS); equal numbers for captions with the same meaning."""


def _families(tokenizer: CLIPTokenizer, s: Settings) -> _Family:
    sets = [kinds for kinds in all_kind_sets() if RARE.isdisjoint(kinds)]
    seeds = itertools.count(s.seed * 7_000_000)
    scenes = [scene for kinds in sets for _ in range(MEMBERS // 2) for scene in _couple(kinds, seeds)]
    number: dict[str, int] = {}
    meanings = [number.setdefault(scene.meaning.canonical, len(number)) for scene in scenes]
    images = torch.from_numpy(np.stack([render(scene) for scene in scenes]))
    ids = tokenize(tokenizer, [scene.caption for scene in scenes])
    tables = (ids, images, torch.tensor(meanings))
    return _Family(*(table.unflatten(0, (len(sets), MEMBERS)).to(DEVICE) for table in tables))


def _couple(kinds: tuple[tuple[str, str], ...], seeds: Iterator[int]) -> tuple[Scene, Scene]:
    """Return two scenes of the same kinds; if the first has a relation, the second differs only in that relation."""
    scene = sample_scene(next(seeds), "train", kinds=kinds)
    meaning = replace(scene.meaning, relation=OPPOSITE.get(scene.meaning.relation or ""))
    if meaning.relation is None or meaning.split != "train":
        return scene, sample_scene(next(seeds), "train", kinds=kinds)
    rng = np.random.default_rng(next(seeds))
    return scene, Scene(meaning, phrase(meaning, rng), arrange(meaning, rng))


@torch.no_grad()
def _forget_pieces(text: CLIPTextModel, tokenizer: CLIPTokenizer) -> None:
    """Replace the embeddings of word pieces, which never occur in training, by that of the unknown token."""
    known = {tokenizer(word)["input_ids"][1] for word in vocabulary()} | set(range(3))
    table = text.get_input_embeddings().weight
    for row in set(range(len(table))) - known:
        table[row] = table[tokenizer.unk_token_id]
