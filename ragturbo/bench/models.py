"""Bundles and databases of published configurations with random weights, created on the device.

Latency does not depend on the values of weights; every output that shows such a number says that they are random.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from ragturbo.model.bundle import Bundle
    from ragturbo.retrieval import Database

_DOWN = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
_UP = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
_VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "latent_channels": 4,
    "scaling_factor": 0.18215,
}
_SD_UNET = {
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": _DOWN,
    "up_block_types": _UP,
    "sample_size": 64,
}
_SD_VAE = {**_VAE, "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "sample_size": 512}
_SD_TEXT = {"vocab_size": 49408, "max_position_embeddings": 77}
_TINY_UNET = {**_SD_UNET, "block_out_channels": (32, 32, 64, 64), "cross_attention_dim": 32, "norm_num_groups": 8,
              "sample_size": 16, "layers_per_block": 1}  # fmt: skip
_TINY_VAE = {**_VAE, "block_out_channels": (8, 8, 16, 16), "norm_num_groups": 4, "sample_size": 128}
_TINY_TEXT = {"hidden_size": 32, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 600,
              "max_position_embeddings": 77}  # fmt: skip

# "sd21" is the configuration of SD 2.1-base and sd-turbo, "lcm" that of the Latent Consistency Model (an SD 1.5 with a
# guidance embedding). "rehearsal" has sd21's blocks at a tiny size, to test the benchmarks.
CONFIGS: dict[str, dict[str, dict[str, Any]]] = {
    "sd21": {
        "unet": {**_SD_UNET, "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20),
                 "use_linear_projection": True},
        "text": {**_SD_TEXT, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23,
                 "num_attention_heads": 16, "hidden_act": "gelu"},
        "vae": _SD_VAE,
    },
    "lcm": {
        "unet": {**_SD_UNET, "cross_attention_dim": 768, "attention_head_dim": 8, "time_cond_proj_dim": 256},
        "text": {**_SD_TEXT, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
                 "num_attention_heads": 12, "hidden_act": "quick_gelu"},
        "vae": _SD_VAE,
    },
    "rehearsal": {
        "unet": {**_TINY_UNET, "attention_head_dim": (2, 2, 4, 4), "use_linear_projection": True},
        "text": {**_TINY_TEXT, "num_hidden_layers": 3, "hidden_act": "gelu"},
        "vae": _TINY_VAE,
    },
    "rehearsal-lcm": {
        "unet": {**_TINY_UNET, "attention_head_dim": 4, "time_cond_proj_dim": 16},
        "text": {**_TINY_TEXT, "num_hidden_layers": 2, "hidden_act": "quick_gelu"},
        "vae": _TINY_VAE,
    },
}  # fmt: skip


def modules(config: str, special: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return text encoder, UNet, VAE and adapter of a configuration on the meta device.

    Args:
        special: ids of the tokenizer's special tokens.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from ragturbo.model.adapter import HSpaceAdapter

    parts = CONFIGS[config]
    with torch.device("meta"):
        return {
            "text": CLIPTextModel(CLIPTextConfig(**parts["text"], **(special or {}))),
            "unet": UNet2DConditionModel(**parts["unet"]),
            "vae": AutoencoderKL(**parts["vae"]),
            "adapter": HSpaceAdapter(parts["unet"]["block_out_channels"][-1]),
        }


def make_bundle(
    config: str, device: str | torch.device, dtype: torch.dtype, *, seed: int = 0, adapter: bool = True
) -> Bundle:
    """Return a Bundle with random weights, whose adapter's output projection is not zero."""
    from diffusers import EulerDiscreteScheduler

    from ragturbo.model.bundle import Bundle
    from ragturbo.model.info import BundleInfo
    from ragturbo.model.text import TextEncoder
    from ragturbo.model.unet import HSpaceUNet
    from ragturbo.model.vae import VAE

    tokenizer = byte_tokenizer(CONFIGS[config]["text"]["max_position_embeddings"])
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    generator = torch.Generator(device).manual_seed(seed)
    parts = modules(config, special)
    if not adapter:
        del parts["adapter"]
    made = {name: fill(module, device, dtype, generator) for name, module in parts.items()}
    return Bundle(
        name=f"{config} (random weights)",
        info=BundleInfo(distilled=True, adapter_kind="transformer" if adapter else None),
        text=TextEncoder(tokenizer, made["text"]),
        unet=HSpaceUNet(made["unet"]),
        vae=VAE(made["vae"]),
        scheduler=EulerDiscreteScheduler(**SCHEDULE, timestep_spacing="trailing", steps_offset=1),
        adapter=made.get("adapter"),
    )


SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}


@torch.no_grad()
def fill(module: Any, device: str | torch.device, dtype: torch.dtype, generator: torch.Generator) -> Any:
    """Move a module from the meta device to `device`, with weights drawn as by torch's layers and norms at one."""
    # torch's `to`: diffusers' own warns about an empty list of fp32 modules.
    module = torch.nn.Module.to(module, dtype).to_empty(device=device)
    for name, parameter in module.named_parameters():
        if parameter.ndim == 1:
            # The only one-dimensional weights are norm scales.
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
        else:
            bound = 1 / math.sqrt(parameter[0].numel())
            parameter.uniform_(-bound, bound, generator=generator)
    for name, buffer in module.named_buffers():
        if not name.endswith("position_ids"):
            raise RuntimeError(f"{type(module).__name__} has a buffer {name} that cannot be initialized")
        buffer.copy_(torch.arange(buffer.shape[-1], device=device).expand(buffer.shape))
    return module.requires_grad_(False).eval()


def byte_tokenizer(length: int = 77) -> Any:
    """Return CLIP's tokenizer without merges: every letter is a token, so that prompts fill most of the context."""
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[], model_max_length=length)


def make_database(bundle: Bundle, folder: str | Path, count: int, *, seed: int = 0) -> Database:
    """Write and open a database of `count` random pairs, with distinct rows and clustered keys."""
    from ragturbo.retrieval import Database
    from ragturbo.retrieval.format import Geometry

    size = bundle.unet.unet.config.sample_size
    height, width = bundle.unet.grid(size, size)
    geometry = Geometry(height, width, bundle.unet.channels, "float16", bundle.text.key_dim)
    return Database.write(
        folder,
        _batches(geometry, count, np.random.default_rng(seed)),
        geometry=geometry,
        key_kind=bundle.text.key_kind,
        encoder=bundle.fingerprint(),
    )


def _batches(geometry: Any, count: int, rng: np.random.Generator) -> Iterator[Any]:
    from ragturbo.retrieval.pairs import Record

    keys = clustered_keys(count, geometry.key_dim, rng)
    values = geometry.tokens * geometry.channels
    # Rows are windows into one pool of noise: distinct, and as fast to make as a copy.
    pool = rng.standard_normal(values + 1_000_003, dtype=np.float32).astype(np.float16)
    for start in range(0, count, 256):
        stop = min(start + 256, count)
        rows = np.stack([pool[(at := i * 7919 % 1_000_003) : at + values] for i in range(start, stop)])
        records = [Record(i, f"pair {i}") for i in range(start, stop)]
        yield records, keys[start:stop], rows.reshape(stop - start, geometry.tokens, geometry.channels)


def clustered_keys(count: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Return (count, width) fp32 unit vectors around random centres, 64 keys to a centre on average."""
    centres = rng.standard_normal((max(1, count // 64), width), dtype=np.float32)
    out = np.empty((count, width), np.float32)
    for start in range(0, count, 65536):
        stop = min(start + 65536, count)
        which = rng.integers(0, len(centres), stop - start)
        part = centres[which] + 0.7 * rng.standard_normal((stop - start, width), dtype=np.float32)
        out[start:stop] = part / np.linalg.norm(part, axis=1, keepdims=True)
    return out
