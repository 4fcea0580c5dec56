"""Encoders of pairs into keys and features: the protocol, and its implementation by a model bundle."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ragturbo.config import check_dtype, one_of
from ragturbo.errors import InvalidRequest
from ragturbo.messages import short
from ragturbo.model.find import Hub, check_model, read_json, resolve

if TYPE_CHECKING:
    from ragturbo.model.bundle import Bundle
    from ragturbo.model.text import TextEncoder

KEYS = ("pooled", "clip")
CLIP_KEY = "clip_key.safetensors"
_DEVICE = re.compile(r"cpu|cuda(:\d+)?")


class PairEncoder(Protocol):
    """Encodes images and captions. The same batch must give the same bits.

    An optional method `unread(captions) -> [(tokens cut off, unknown words), …]` is used for the report of a build.
    """

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
        self.bundle = bundle
        self.text = text_for(bundle, key)
        self.size = size or bundle.default_size
        factor = bundle.vae.factor
        _check_size(self.size, factor)
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

    def unread(self, captions: Sequence[str]) -> list[tuple[int, tuple[str, ...]]]:
        """Of each caption, the number of tokens that are cut off and the words that the model does not know."""
        tokens = self.text.tokenize(list(captions))
        return list(zip(tokens.dropped, tokens.unknown, strict=True))


def text_for(bundle: Bundle, key: str | None) -> TextEncoder:
    """Return the text encoder of a bundle for keys of this kind; None: the bundle's own."""
    from ragturbo.model.text import TextEncoder

    check_key(key)
    if key == "clip" and bundle.text.key_kind != "clip":
        raise InvalidRequest(f"{bundle.name} has no {CLIP_KEY}: use key='pooled'", option="key")
    if key == "pooled" and bundle.text.key_kind != "pooled":
        return TextEncoder(bundle.text.tokenizer, bundle.text.text_encoder)
    return bundle.text


def _check_size(size: int, factor: int) -> None:
    if size % factor:
        raise InvalidRequest(f"size={size} is not a multiple of the VAE's {factor} pixels", option="size")


def check_key(key: Any) -> None:
    if key is not None:
        one_of("key", key, KEYS)


def check_pair_encoder(encoder: Any) -> None:
    """Raise InvalidRequest unless this is None or has what a `PairEncoder` has."""
    if encoder is None:
        return
    names = ("encode", *PairEncoder.__annotations__)
    if missing := [name for name in names if not hasattr(encoder, name)]:
        raise InvalidRequest(
            f"encoder={short(encoder)} has no {missing[0]}: an encoder has {', '.join(names)} (see PairEncoder)",
            option="encoder",
        )


def check_loading(device: Any, dtype: Any) -> None:
    """Raise InvalidRequest for a device or dtype that no model can have, without torch."""
    check_dtype(dtype)
    if isinstance(device, str) and not _DEVICE.fullmatch(device):
        raise InvalidRequest(f"device={short(device)} is not cpu, cuda or cuda:0, cuda:1, …", option="device")


def load_encoder(
    model: Any, *, key: str | None = None, size: int | None = None, device: Any = None, dtype: Any = None,
    vae: str = "full", hub: Hub = Hub(),  # noqa: B008 (frozen)
) -> BundleEncoder:  # fmt: skip
    """Load a model as an encoder of pairs.

    Args:
        model: a bundle, the name or folder of one, or a loaded pipeline of diffusers.
        device, dtype, vae: as in `Generator.from_pretrained`.
        hub: where to look for the model.

    Raises:
        ModelError: there is no such model.
        InvalidRequest: it has no such key or size, or torch no such device.
    """
    check_loading(device, dtype)
    by_name = isinstance(model, (str, os.PathLike))
    if by_name:
        # Before torch is imported, which takes seconds.
        folder = resolve(model, hub)
        check_model(folder)
        if key == "clip" and not (folder / CLIP_KEY).is_file():
            raise InvalidRequest(f"{model} has no {CLIP_KEY}: use key='pooled'", option="key")
        channels = read_json(folder / "vae" / "config.json").get("block_out_channels")
        if size is not None and isinstance(channels, list):
            _check_size(size, 2 ** (len(channels) - 1))
    import torch

    from ragturbo.model.bundle import Bundle

    if device is None and "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    if device is not None and torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise InvalidRequest(f"device={device!r}: torch sees no CUDA GPU here; see `ragturbo info`", option="device")
    kind = None if dtype is None else getattr(torch, str(dtype).removeprefix("torch."))
    # Features do not depend on an adapter or a decoder LoRA.
    if by_name:
        model = Bundle.load(model, device=device, dtype=kind, vae=vae, adapter=False, **vars(hub))
    elif not isinstance(model, Bundle):
        model = Bundle.from_pipeline(model, device=device, dtype=kind)
    return BundleEncoder(model, size=size, key=key)
