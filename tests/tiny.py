"""Small real models with random weights, saved as diffusers folders: SD 2.1-shaped, SD 1.5-shaped, SDXL-conditioned.

Loaded by path from tests/conftest.py, because test folders are not packages.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

WORDS = "a an the of in on with and red green blue yellow circle square triangle left right above below photo cat dog"


def clip_tokenizer(length: int = 16) -> Any:
    """A real byte-level CLIP tokenizer: every byte, and merges for a few words."""
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    tokens = letters + [letter + "</w>" for letter in letters]
    merges: list[tuple[str, str]] = []
    for word in WORDS.split():
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            pair = (pieces[0], pieces[1])
            pieces[:2] = ["".join(pair)]
            if pair not in merges:
                merges.append(pair)
                tokens.append(pieces[0])
    vocab = {token: i for i, token in enumerate(dict.fromkeys([*tokens, "<|startoftext|>", "<|endoftext|>"]))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=length)


def text_encoder(tokenizer: Any, width: int = 32, layers: int = 3, act: str = "gelu", **overrides: Any) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    options: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": tokenizer.model_max_length,
        "hidden_act": act,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        # The number in SD 2's own configuration, which no weight belongs to.
        "projection_dim": 512,
    }
    return CLIPTextModel(CLIPTextConfig(**{**options, **overrides})).eval()


def unet(kind: str = "sd21", width: int = 32, **overrides: Any) -> Any:
    from diffusers import UNet2DConditionModel

    attention, plain = "CrossAttnDownBlock2D", "DownBlock2D"
    up_attention, up_plain = "CrossAttnUpBlock2D", "UpBlock2D"
    options: dict[str, Any] = {
        "sample_size": 16,
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 1,
        "cross_attention_dim": width,
        "norm_num_groups": 8,
        "block_out_channels": (32, 32, 64, 64),
        "down_block_types": (attention, attention, attention, plain),
        "up_block_types": (up_plain, up_attention, up_attention, up_attention),
    }
    if kind == "sd21":
        # Head counts, as SD 2's attention_head_dim means.
        options |= {"attention_head_dim": (2, 2, 4, 4), "use_linear_projection": True}
    elif kind == "sd15":
        options |= {"attention_head_dim": 4}
    elif kind == "sdxl":
        options |= {
            "block_out_channels": (32, 32, 64),
            "down_block_types": (plain, attention, attention),
            "up_block_types": (up_attention, up_attention, up_plain),
            "transformer_layers_per_block": (1, 1, 2),
            "attention_head_dim": (2, 2, 4),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + width,
        }
    else:
        raise ValueError(kind)
    return UNet2DConditionModel(**{**options, **overrides}).eval()


def vae(scaling_factor: float = 0.18215) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=128,
        scaling_factor=scaling_factor,
    ).eval()


def tiny_vae() -> Any:
    from diffusers import AutoencoderTiny

    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        num_encoder_blocks=(1, 1, 1, 1),
        num_decoder_blocks=(1, 1, 1, 1),
    ).eval()


def scheduler(kind: str = "sd21", prediction_type: str = "epsilon") -> Any:
    from diffusers import EulerDiscreteScheduler, PNDMScheduler

    options: dict[str, Any] = {
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "prediction_type": prediction_type,
    }
    if kind == "sd15":
        return PNDMScheduler(**options, skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False)
    # sd-turbo's own.
    return EulerDiscreteScheduler(**options, timestep_spacing="trailing", steps_offset=1)


def make_bundle(
    folder: str | Path, kind: str = "sd21", seed: int = 0, prediction_type: str = "epsilon", **overrides: Any
) -> Path:
    """Writes a model as a diffusers folder that StableDiffusionPipeline loads too. `overrides` go to the UNet."""
    import diffusers

    folder = Path(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = clip_tokenizer()
        parts = {
            "text_encoder": text_encoder(tokenizer, act="quick_gelu" if kind == "sd15" else "gelu"),
            "unet": unet(kind, **overrides),
            "vae": vae(),
        }
    for name, module in parts.items():
        module.save_pretrained(folder / name, safe_serialization=True)
    tokenizer.save_pretrained(folder / "tokenizer")
    schedule = scheduler(kind, prediction_type)
    schedule.save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": diffusers.__version__,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", type(schedule).__name__],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder
