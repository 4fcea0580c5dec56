"""Stage 1: the text encoder, CLIP's way, so that distances between keys mean something.

Two contrastive terms on the end-of-text state: caption against image, and caption against a second caption that
names the same kinds and shares nothing else, which is what retrieval is asked for.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from data import to_float, tokenize
from device import DEVICE, Table, autocast
from loop import rate, run, set_rate
from networks import ImageEncoder, make_text_encoder
from settings import Settings
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer

from ragturbo.evaluate.world import RARE, all_kind_sets, sample_scene, vocabulary


def train_text(work: Path, s: Settings, minutes: float | None = None) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    images, tokens = Table(work / "images.npy"), Table(work / "tokens.npy")
    first, second = (ids.to(DEVICE) for ids in _same_kinds(tokenizer, s))
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
        group = torch.randint(len(first), (s.text_batch,), generator=generator)
        column = torch.randint(first.shape[1], (2, s.text_batch), generator=generator)
        with autocast():
            ids = torch.cat([tokens[index].long(), first[group, column[0]], second[group, column[1]]])
            keys, one, two = text(input_ids=ids).pooler_output.float().chunk(3)
            seen = image(to_float(images[index])).float()
        temperature = scale.exp().clamp(max=100)
        matched = contrast(keys, seen, temperature)
        same = contrast(one, two, temperature, group.to(DEVICE))
        optimizer.zero_grad(set_to_none=True)
        (matched + same).backward()
        torch.nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        optimizer.step()
        return {"image_text": matched.item(), "text_text": same.item(), "scale": temperature.item()}

    state = {"both": both, "optimizer": optimizer}
    run("text", work, update, state, steps=s.text_steps, seed=s.seed + 3, minutes=minutes)
    _forget_pieces(text, tokenizer)
    text.save_pretrained(work / "text_encoder")


def contrast(a: Tensor, b: Tensor, scale: Tensor, group: Tensor | None = None) -> Tensor:
    """InfoNCE both ways; rows of one group are not each other's negatives."""
    logits = scale * F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T
    if group is not None:
        twin = (group[:, None] == group[None, :]) & ~torch.eye(len(group), dtype=torch.bool, device=group.device)
        logits = logits.masked_fill(twin, float("-inf"))
    target = torch.arange(len(a), device=a.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def _same_kinds(tokenizer: CLIPTokenizer, s: Settings, each: int = 6) -> tuple[Tensor, Tensor]:
    """Two (groups, each, L) stacks of captions; row g of both names the same kinds, none of them rare."""
    sets = [kinds for kinds in all_kind_sets() if RARE.isdisjoint(kinds)]
    seeds = iter(range(s.seed * 7_000_000, s.seed * 7_000_000 + 2 * each * len(sets)))
    captions = [sample_scene(next(seeds), "train", kinds=kinds).caption for kinds in sets for _ in range(2 * each)]
    ids = tokenize(tokenizer, captions).view(len(sets), 2, each, -1)
    return ids[:, 0], ids[:, 1]


@torch.no_grad()
def _forget_pieces(text: CLIPTextModel, tokenizer: CLIPTokenizer) -> None:
    """Parts of words never occurred in training: a word made of them reads as the unknown token."""
    known = {tokenizer(word)["input_ids"][1] for word in vocabulary()} | set(range(3))
    table = text.get_input_embeddings().weight
    for row in set(range(len(table))) - known:
        table[row] = table[tokenizer.unk_token_id]
