"""Encoders of pairs into keys and features: the protocol, and its implementation by a model bundle."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ragturbo.errors import InvalidRequest, ModelError

if TYPE_CHECKING:
    from ragturbo.model.bundle import Bundle


class PairEncoder(Protocol):
    """Encodes images and captions. The same batch must give the same bits."""

    size: int
    """Side of the images in pixels."""
    height: int
    width: int
    channels: int
    """Grid and width of the features: T = height · width tokens."""
    key_dim: int
    key_kind: str
    fingerprints: dict[str, str]

    def encode(self, images: np.ndarray, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """images (B, size, size, 3) uint8 -> keys (B, K) float32, features (B, T, C) float32."""
        ...


class BundleEncoder:
    """Sec. 3.2: VAE mean, then the UNet's encoder at t = 0 with the caption of the pair."""

    def __init__(self, bundle: Bundle, *, size: int | None = None, key: str | None = None) -> None:
        from ragturbo.model.text import TextEncoder

        self.bundle = bundle
        self.text = bundle.text
        if key == "clip" and bundle.text.key_kind != "clip":
            raise ModelError(f"{bundle.name} has no clip_key.safetensors: use key='pooled'")
        if key == "pooled" and bundle.text.key_kind != "pooled":
            self.text = TextEncoder(bundle.text.tokenizer, bundle.text.text_encoder)
        if key not in (None, "pooled", "clip"):
            raise InvalidRequest(f"key={key!r} must be 'pooled' or 'clip'")
        self.size = size or bundle.default_size
        factor = bundle.vae.factor
        if self.size % factor:
            raise InvalidRequest(f"size={self.size} is not a multiple of the VAE's {factor} pixels")
        self.height, self.width = bundle.unet.grid(self.size // factor, self.size // factor)
        self.channels, self.key_dim = bundle.unet.channels, self.text.key_dim
        self.key_kind = self.text.key_kind
        self.fingerprints = bundle.fingerprint()

    def encode(self, images: np.ndarray, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        import torch

        bundle = self.bundle
        with torch.inference_mode():
            states = self.text.encode(self.text.tokenize(list(captions)).input_ids.to(bundle.device))
            pixels = torch.from_numpy(np.ascontiguousarray(images)).to(bundle.device)
            pixels = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
            latents = bundle.vae.encode(pixels).to(bundle.dtype)
            features = bundle.unet.retrieval_features(latents, states.hidden_states)
        return states.key.float().cpu().numpy(), features.float().cpu().numpy()


def load_encoder(model: Any, *, key: str | None = None, size: int | None = None, **options: Any) -> BundleEncoder:
    """model: a bundle, or the name or folder of one."""
    from ragturbo.model.bundle import Bundle

    if not isinstance(model, Bundle):
        if options.get("device") is None and "LOCAL_RANK" in os.environ:
            import torch

            if torch.cuda.is_available():
                options["device"] = f"cuda:{os.environ['LOCAL_RANK']}"
        # Features do not depend on an adapter or a decoder LoRA.
        model = Bundle.load(model, adapter=False, **options)
    return BundleEncoder(model, size=size, key=key)
