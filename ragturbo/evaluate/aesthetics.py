"""LAION's aesthetic predictor v2: five linear layers on the unit image feature of OpenAI's CLIP ViT-L/14."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from ragturbo.errors import ModelError
from ragturbo.evaluate.clipscore import ClipScore
from ragturbo.evaluate.scores import Scored
from ragturbo.evaluate.suites import Prompt

CLIP_MODEL, CLIP_WEIGHTS = "ViT-L-14-quickgelu", "openai"
# The widths between the layers; dropout in between does nothing when it is used.
_WIDTHS = (1024, 128, 64, 16, 1)


class Head(nn.Module):
    """The layers under the published file's own names: layers.0, 2, 4, 6, 7."""

    def __init__(self, width: int = 768) -> None:
        super().__init__()
        a, b, c, d, e = _WIDTHS
        self.layers = nn.Sequential(
            nn.Linear(width, a), nn.Dropout(0.2), nn.Linear(a, b), nn.Dropout(0.2), nn.Linear(b, c), nn.Dropout(0.1),
            nn.Linear(c, d), nn.Linear(d, e),
        )  # fmt: skip

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features)[..., 0]


class Aesthetic:
    name = "aesthetic"

    def __init__(self, head: Head, clip: ClipScore, about: str = "") -> None:
        self.head, self.clip, self.about = head.to(clip.device).eval(), clip, about

    @classmethod
    def load(cls, weights: str | Path | None, clip_weights: str | Path | None = None, device: Any = "cpu") -> Aesthetic:
        if weights is None:
            raise ModelError(
                "the aesthetic score needs sac+logos+ava1-l14-linearMSE.pth of LAION's improved-aesthetic-predictor, "
                "made into safetensors by `ragturbo convert`: give the file as --aesthetic-weights"
            )
        path = Path(weights)
        if path.suffix != ".safetensors":
            raise ModelError(f"{path} is a pickle; run `ragturbo convert {path} {path.with_suffix('.safetensors')}`")
        head = Head()
        try:
            head.load_state_dict(load_file(path))
        except (OSError, RuntimeError, ValueError) as error:
            raise ModelError(f"{path} is no aesthetic head: {error}") from error
        clip = ClipScore.load(CLIP_MODEL, clip_weights or CLIP_WEIGHTS, device)
        return cls(head, clip, f"{path.name} on {clip.about}")

    @torch.inference_mode()
    def score(self, prompts: Sequence[Prompt], images: Sequence[Image.Image]) -> list[Scored]:
        values = self.head(self.clip.images(images)).tolist()
        return [Scored(prompt.id, value) for prompt, value in zip(prompts, values, strict=True)]
