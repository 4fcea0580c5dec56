"""A model of the embedded world whose key is a projection of its own, CLIP's way, to compare with the pooled state.

The pooled state is also trained to name the kinds (stage 1's last term); the projection sees captions and their
pictures alone, as CLIP's does. The text encoder stays as it is, so the same UNet and adapter serve both.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path

import numpy as np
import torch
from data import to_float, training_scene
from device import DEVICE
from loop import rate, set_rate
from networks import ImageEncoder
from settings import Settings
from stage_text import contrast
from torch import nn

from ragturbo.evaluate.drawing import render_array
from ragturbo.model.bundle import Bundle
from ragturbo.model.clip_key import ClipKey

log = logging.getLogger("ragturbo.recipe")
SCENES, BATCH, RATE = 20_000, 128, 1e-3


def make_projected(model: str, folder: Path, steps: int) -> Path:
    """Writes `model` with a clip key of a block and a projection, trained for `steps`, and no database."""
    if folder.exists():
        return folder
    s = Settings()
    bundle = Bundle.load(model, device=str(DEVICE), dtype=torch.float32)
    scenes = [training_scene(i, s) for i in range(SCENES)]
    images = torch.from_numpy(np.stack([render_array(scene) for scene in scenes]))
    ids = bundle.text.tokenize([scene.caption for scene in scenes]).input_ids

    config = bundle.text.text_encoder.config
    torch.manual_seed(s.seed + 20)
    width = config.hidden_size
    key = ClipKey(width, config.num_attention_heads, width, config.intermediate_size, config.hidden_act)
    nn.init.normal_(key.text_projection, std=width**-0.5)
    both = nn.ModuleDict({"key": key, "image": ImageEncoder(width)})
    both.register_parameter("scale", nn.Parameter(torch.tensor(math.log(1 / 0.07))))
    both.to(DEVICE)
    optimizer = torch.optim.AdamW(both.parameters(), lr=RATE, weight_decay=0.02, betas=(0.9, 0.98))
    generator = torch.Generator().manual_seed(s.seed + 21)
    for step in range(steps):
        set_rate(optimizer, rate(step, steps, RATE))
        index = torch.randint(SCENES, (BATCH,), generator=generator)
        tokens = ids[index].to(DEVICE)
        with torch.no_grad():
            states = bundle.text.text_encoder(input_ids=tokens, output_hidden_states=True).hidden_states[-1]
        keys = both["key"](states, bundle.text.end_of_text(tokens))
        loss = contrast(keys, both["image"](to_float(images[index])), both.scale.exp().clamp(max=100))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if (step + 1) % 50 == 0:
            log.info("projected key: step %d of %d, contrast %.4f", step + 1, steps, loss.item())
    bundle.text.clip_key = key.requires_grad_(False).eval()
    part = folder.with_name(f".{folder.name}.part")
    bundle.save(part)
    part.rename(folder)
    return folder
