"""Metrics on image features: the CLIP score, LAION's aesthetic score, and similarity to real images of a class."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize

from ragturbo.errors import ModelError
from ragturbo.evaluate.fid import folder_images
from ragturbo.evaluate.scores import ImageScore
from ragturbo.evaluate.suites import Prompt


class ClipScore:
    """The cosine of image and prompt features, not rescaled (the paper: OpenCLIP ViT-bigG-14)."""

    name = "clip"

    def __init__(self, clip: Any, preprocess: Any, tokenizer: Any, device: Any = "cpu", about: str = "") -> None:
        self.clip = clip.to(device).eval()
        self.preprocess, self.tokenizer, self.device, self.about = preprocess, tokenizer, torch.device(device), about

    @classmethod
    def load(cls, model: str = "ViT-bigG-14", weights: str | Path | None = None, device: Any = "cpu") -> ClipScore:
        """Load a model of open_clip; `weights` is a .safetensors file or open_clip's tag (default: the paper's)."""
        try:
            import open_clip
        except ImportError as error:
            raise ModelError("the CLIP score needs open_clip: pip install 'ragturbo[eval]'") from error
        tag = str(weights or "laion2b_s39b_b160k")
        if Path(tag).suffix in (".pt", ".bin", ".pth"):
            raise _pickle_error(Path(tag))
        try:
            clip, _, preprocess = open_clip.create_model_and_transforms(model, pretrained=tag)
            tokenizer = open_clip.get_tokenizer(model)
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            raise ModelError(
                f"open_clip cannot load {model} with weights {tag!r}: {error}. Download its weights and give the "
                ".safetensors file as --clip-weights."
            ) from error
        return cls(clip, preprocess, tokenizer, device, f"open_clip {open_clip.__version__}, {model}, {tag}")

    @torch.inference_mode()
    def score(self, prompts: Sequence[Prompt], images: Sequence[Image.Image]) -> list[ImageScore]:
        tokens = self.tokenizer([p.text for p in prompts]).to(self.device)
        texts = normalize(self.clip.encode_text(tokens).float(), dim=-1)
        cosines = (self.image_features(images) * texts).sum(-1).tolist()
        return [ImageScore(prompt.id, value) for prompt, value in zip(prompts, cosines, strict=True)]

    @torch.inference_mode()
    def image_features(self, images: Sequence[Image.Image]) -> Tensor:
        """Return unit vectors (B, D)."""
        batch = torch.stack([self.preprocess(image) for image in images]).to(self.device)
        return normalize(self.clip.encode_image(batch).float(), dim=-1)


class AestheticHead(nn.Module):
    """LAION's aesthetic predictor v2; the names of the parameters are those of the published file."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(768, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2), nn.Linear(128, 64),
            nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1),
        )  # fmt: skip

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features)[..., 0]


class Aesthetic:
    """LAION's aesthetic score, on image features of OpenAI's CLIP ViT-L/14."""

    name = "aesthetic"

    def __init__(self, head: AestheticHead, clip: ClipScore, about: str = "") -> None:
        self.head, self.clip, self.about = head.to(clip.device).eval(), clip, about

    @classmethod
    def load(cls, weights: str | Path | None, clip_weights: str | Path | None = None, device: Any = "cpu") -> Aesthetic:
        from safetensors.torch import load_file

        if weights is None:
            raise ModelError(
                "the aesthetic score needs sac+logos+ava1-l14-linearMSE.pth of LAION's improved-aesthetic-predictor: "
                "convert it with `ragturbo convert` and give the .safetensors file as --aesthetic-weights"
            )
        path = Path(weights)
        if path.suffix != ".safetensors":
            raise _pickle_error(path)
        head = AestheticHead()
        try:
            head.load_state_dict(load_file(path))
        except (OSError, RuntimeError, ValueError) as error:
            raise ModelError(f"{path} is not an aesthetic head: {error}") from error
        clip = ClipScore.load("ViT-L-14-quickgelu", clip_weights or "openai", device)
        return cls(head, clip, f"{path.name} on {clip.about}")

    @torch.inference_mode()
    def score(self, prompts: Sequence[Prompt], images: Sequence[Image.Image]) -> list[ImageScore]:
        values = self.head(self.clip.image_features(images)).tolist()
        return [ImageScore(prompt.id, value) for prompt, value in zip(prompts, values, strict=True)]


class ClassSimilarity:
    """The mean cosine of an image to the first `references` real images of its class (CLIP, SigLIP, DINOv2)."""

    def __init__(
        self, name: str, path: str | Path, references: int = 32, device: Any = "cpu", local_files_only: bool = True
    ) -> None:
        import transformers
        from transformers import AutoImageProcessor, AutoModel

        try:
            model = AutoModel.from_pretrained(path, use_safetensors=True, local_files_only=local_files_only)
            self.processor = AutoImageProcessor.from_pretrained(path, local_files_only=local_files_only)
        except (OSError, ValueError) as error:
            raise ModelError(f"{path} cannot be loaded as an image encoder: {error}") from error
        self.model, self.device, self.references = model.to(device).eval(), torch.device(device), references
        self.name = f"similarity-{name}"
        self.about = f"transformers {transformers.__version__}, {path}, against {references} images a class"
        self._class_features = lru_cache(maxsize=64)(self._read_class_features)

    def score(self, prompts: Sequence[Prompt], images: Sequence[Image.Image]) -> list[ImageScore]:
        drawn = self.features(images)
        real = [self._class_features(prompt.meta["class"]) for prompt in prompts]
        means = [float((row @ features.T).mean()) for row, features in zip(drawn, real, strict=True)]
        return [ImageScore(prompt.id, mean) for prompt, mean in zip(prompts, means, strict=True)]

    @torch.inference_mode()
    def features(self, images: Sequence[Image.Image]) -> Tensor:
        """Return unit vectors (B, D)."""
        inputs = self.processor(images=list(images), return_tensors="pt").to(self.device)
        if hasattr(self.model, "get_image_features"):
            out = self.model.get_image_features(**inputs)
        else:
            out = self.model(**inputs)
        features = out if isinstance(out, Tensor) else out.pooler_output
        return normalize(features.float(), dim=-1)

    def _read_class_features(self, folder: str) -> Tensor:
        return self.features(list(islice(folder_images(Path(folder)), self.references)))


def _pickle_error(path: Path) -> ModelError:
    return ModelError(f"{path} is a pickle; run `ragturbo convert {path} {path.with_suffix('.safetensors')}`")
