"""How like the real images of its class a drawing is: cosines of image features (CLIP, SigLIP, DINO …)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ragturbo.errors import ModelError
from ragturbo.evaluate.fid import folder_images
from ragturbo.evaluate.scores import Scored
from ragturbo.evaluate.suites import Prompt


class ClassSimilarity:
    """The mean cosine between a drawing and the first `references` real images of its class's folder."""

    def __init__(self, name: str, model: Any, processor: Any, *, references: int, device: Any, about: str) -> None:
        self.name, self.about, self.references = f"similarity-{name}", about, references
        self.model, self.processor, self.device = model.to(device).eval(), processor, torch.device(device)
        self._of_class = lru_cache(maxsize=64)(self._class_features)

    @classmethod
    def load(
        cls, name: str, path: str | Path, references: int = 32, device: Any = "cpu", local_files_only: bool = True
    ) -> ClassSimilarity:
        """name: what the table calls it; path: a transformers folder or id of CLIP, SigLIP, DINOv2 …"""
        import transformers
        from transformers import AutoImageProcessor, AutoModel

        options: dict[str, Any] = {"local_files_only": local_files_only}
        try:
            model = AutoModel.from_pretrained(path, use_safetensors=True, **options)
            processor = AutoImageProcessor.from_pretrained(path, **options)
        except (OSError, ValueError) as error:
            raise ModelError(f"{path} cannot be loaded as an image encoder: {error}") from error
        about = f"transformers {transformers.__version__}, {path}, against {references} images a class"
        return cls(name, model, processor, references=references, device=device, about=about)

    @torch.inference_mode()
    def score(self, prompts: Sequence[Prompt], images: Sequence[Image.Image]) -> list[Scored]:
        drawn = self.features(images)
        real = [self._of_class(prompt.meta["class"]) for prompt in prompts]
        return [
            Scored(prompt.id, float((row @ held.T).mean()))
            for prompt, row, held in zip(prompts, drawn, real, strict=True)
        ]

    @torch.inference_mode()
    def features(self, images: Sequence[Image.Image]) -> Tensor:
        """Unit vectors (B, D)."""
        inputs = self.processor(images=list(images), return_tensors="pt").to(self.device)
        if hasattr(self.model, "get_image_features"):
            out = self.model.get_image_features(**inputs)
        else:
            out = self.model(**inputs)
        features = out if isinstance(out, Tensor) else out.pooler_output
        return torch.nn.functional.normalize(features.float(), dim=-1)

    def _class_features(self, folder: str) -> Tensor:
        images = [image for image, _ in zip(folder_images(Path(folder)), range(self.references), strict=False)]
        return self.features(images)
