"""CLIP score: the raw cosine of image and prompt in a CLIP's joint space (the paper: OpenCLIP ViT-bigG-14)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ragturbo.errors import ModelError
from ragturbo.evaluate.scores import Scored
from ragturbo.evaluate.suites import Prompt

MODEL = "ViT-bigG-14"
WEIGHTS = "laion2b_s39b_b160k"


class ClipScore:
    name = "clip"

    def __init__(self, clip: Any, preprocess: Any, tokenizer: Any, device: Any = "cpu", about: str = "") -> None:
        self.clip = clip.to(device).eval()
        self.preprocess, self.tokenizer, self.device, self.about = preprocess, tokenizer, torch.device(device), about

    @classmethod
    def load(cls, model: str = MODEL, weights: str | Path | None = None, device: Any = "cpu") -> ClipScore:
        """weights: an open_clip .safetensors file or tag; None is the paper's."""
        try:
            import open_clip
        except ImportError as error:
            raise ModelError("the CLIP score needs open_clip: pip install 'ragturbo[eval]'") from error
        tag = str(weights or WEIGHTS)
        if Path(tag).suffix in (".pt", ".bin", ".pth"):
            raise ModelError(f"{tag} is a pickle; run `ragturbo convert {tag} {Path(tag).with_suffix('.safetensors')}`")
        try:
            clip, _, preprocess = open_clip.create_model_and_transforms(model, pretrained=tag)
            tokenizer = open_clip.get_tokenizer(model)
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            raise ModelError(
                f"open_clip cannot load {model} with weights {tag!r}: {error}. Download open_clip's weights of it and "
                "give their .safetensors file as --clip-weights."
            ) from error
        return cls(clip, preprocess, tokenizer, device, f"open_clip {open_clip.__version__}, {model}, {tag}")

    @torch.inference_mode()
    def score(self, prompts: Sequence[Prompt], images: Sequence[Image.Image]) -> list[Scored]:
        seen = self.images(images)
        read = _unit(self.clip.encode_text(self.tokenizer([p.text for p in prompts]).to(self.device)).float())
        cosines = (seen * read).sum(-1).tolist()
        return [Scored(prompt.id, value) for prompt, value in zip(prompts, cosines, strict=True)]

    @torch.inference_mode()
    def images(self, images: Sequence[Image.Image]) -> Tensor:
        """Unit vectors (B, D)."""
        batch = torch.stack([self.preprocess(image) for image in images]).to(self.device)
        return _unit(self.clip.encode_image(batch).float())


def _unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)
