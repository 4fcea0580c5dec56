"""`ragturbo data lpips`: train the network of latent LPIPS on captioned latents.

The public weights are those of an ImageNet classifier on latents. Here the labels are the words of each caption: the
network predicts which words of a vocabulary the caption of a latent has.
"""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ragturbo.errors import InvalidRequest
from ragturbo.train.augment import Augmentation
from ragturbo.train.lpips import LatentVGG, save_vgg
from ragturbo.train.progress import local_device, track
from ragturbo.train.shards import Shards

log = logging.getLogger("ragturbo")

# No flips or turns: words such as "left of" could not be learnt.
_AUGMENTATION = Augmentation(flip=False, quarter_turns=False, max_angle=0.1, scale_std=0.1, max_shift=0.06, cutout=0.25)


def train_vgg(
    data: str | Path,
    out: str | Path,
    *,
    width: int = 64,
    words: int = 512,
    steps: int = 20_000,
    batch: int = 64,
    lr: float = 1e-3,
    seed: int = 0,
    device: str | None = None,
) -> dict[str, float]:
    """Train a LatentVGG on all but every 16th sample and write it to `out` (safetensors). Returns "average_precision"
    of the words of held-out captions, the same "by_frequency" alone, and the number of "words"."""
    place = torch.device(device or local_device())
    shards = Shards(data)
    texts = [record["caption"] for shard in range(len(shards.files)) for record in shards.records(shard)]
    captions = [set(re.findall(r"\w+", text.casefold())) for text in texts]
    vocabulary = most_informative_words(captions, words)
    if len(vocabulary) < 2:
        raise InvalidRequest(f"{data}: its {len(captions)} captions have no words in common that distinguish them")
    targets = torch.zeros(len(captions), len(vocabulary))
    for i, caption in enumerate(captions):
        targets[i, [vocabulary[word] for word in caption if word in vocabulary]] = 1
    held = torch.arange(len(captions)) % 16 == 15
    train = (~held).nonzero().flatten() if held.any() else torch.arange(len(captions))

    torch.manual_seed(seed)
    channels = shards.read(0, "latents").shape[0]
    vgg = LatentVGG(channels, width).to(place).train()
    head = nn.Linear(vgg.widths[-1], len(vocabulary)).to(place)
    # Start at the frequencies of the words.
    frequency = targets[train].mean(0).clamp(1e-4, 1 - 1e-4)
    head.bias.data.copy_(torch.logit(frequency))
    optimizer = torch.optim.AdamW([*vgg.parameters(), *head.parameters()], lr=lr, weight_decay=0.01, fused=True)
    decay = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, steps))))
    )

    def read(rows: Tensor) -> Tensor:
        return torch.stack([shards.read(int(i), "latents") for i in rows]).float().to(place)

    generator, draws = torch.Generator().manual_seed(seed), torch.Generator(place).manual_seed(seed)
    for _ in track(range(steps), steps, "latent VGG"):
        rows = train[torch.randint(len(train), (batch,), generator=generator)]
        z = _AUGMENTATION.draw(batch, draws, place)(read(rows))
        loss = F.binary_cross_entropy_with_logits(head(vgg(z)[-1].mean((2, 3))), targets[rows].to(place))
        loss.backward()
        optimizer.step()
        decay.step()
        optimizer.zero_grad(set_to_none=True)

    test = held.nonzero().flatten()[:1024] if held.any() else train[:1024]
    vgg.eval()
    with torch.no_grad():
        scores = torch.cat([head(vgg(read(rows))[-1].mean((2, 3))).cpu() for rows in test.split(batch)])
    ours, base = (average_precision(x, targets[test]) for x in (scores, frequency.expand(len(test), -1)))
    log.info("mean average precision on %d held-out samples: %.3f; by frequency alone %.3f", len(test), ours, base)
    save_vgg(vgg, out, words=str(len(vocabulary)), steps=str(steps), average_precision=f"{ours:.4f}")
    return {"average_precision": ours, "by_frequency": base, "words": float(len(vocabulary))}


def most_informative_words(captions: list[set[str]], most: int) -> dict[str, int]:
    """{word: number} of the words of highest entropy, without those in over 95 % or under 0.1 % of the captions."""
    counts = Counter(word for caption in captions for word in caption)
    total = len(captions)
    shares = {word: n / total for word, n in counts.items() if 0.001 * total <= n <= 0.95 * total and n > 1}
    entropy = {word: -(p * math.log(p) + (1 - p) * math.log(1 - p)) for word, p in shares.items()}
    chosen = sorted(entropy, key=lambda word: (-entropy[word], word))[:most]
    return {word: i for i, word in enumerate(sorted(chosen))}


def average_precision(scores: Tensor, targets: Tensor) -> float:
    """Mean over samples of the average precision of their ranking of words. scores, targets: (N, W)."""
    order = scores.argsort(dim=1, descending=True, stable=True)
    hits = targets.gather(1, order)
    precision = hits.cumsum(1) / torch.arange(1, hits.shape[1] + 1)
    each = (precision * hits).sum(1) / hits.sum(1).clamp(min=1)
    return float(each[targets.any(1)].mean()) if targets.any() else 0.0
