"""AutoencoderTiny: TAESD, which decodes in a tenth of the time."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ragturbo.model.networks.autoencoder import DecoderOutput
from ragturbo.model.networks.config import Config, Options
from ragturbo.model.networks.layers import ACTIVATIONS
from ragturbo.model.networks.library_class import Network, become_library_class

_STAGES = (64, 64, 64, 64)
OPTIONS = Options(
    free={
        "in_channels": 3, "out_channels": 3, "encoder_block_out_channels": _STAGES,
        "decoder_block_out_channels": _STAGES, "act_fn": "relu", "latent_channels": 4, "upsampling_scaling_factor": 2,
        "num_encoder_blocks": (1, 3, 3, 3), "num_decoder_blocks": (3, 3, 3, 1), "latent_magnitude": 3,
        "latent_shift": 0.5, "force_upcast": False, "scaling_factor": 1.0, "shift_factor": 0.0,
    },
    fixed={"upsample_fn": "nearest"},
    allowed={"act_fn": ACTIVATIONS},
    # Written by diffusers beside decoder_block_out_channels, with the same value.
    ignored=("block_out_channels",),
)  # fmt: skip


class AutoencoderTinyOutput(NamedTuple):
    latents: Tensor


class AutoencoderTinyBlock(nn.Module):
    def __init__(self, channels: int, act: str) -> None:
        super().__init__()
        activation = ACTIVATIONS[act]()
        self.conv = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1), activation,
            nn.Conv2d(channels, channels, 3, padding=1), activation,
            nn.Conv2d(channels, channels, 3, padding=1),
        )  # fmt: skip
        self.skip = nn.Identity()
        self.fuse = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.fuse(self.conv(x) + self.skip(x))


class EncoderTiny(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        stages = zip(config.encoder_block_out_channels, config.num_encoder_blocks, strict=True)
        for i, (width, blocks) in enumerate(stages):
            if i == 0:
                layers.append(nn.Conv2d(config.in_channels, width, 3, padding=1))
            else:
                layers.append(nn.Conv2d(width, width, 3, padding=1, stride=2, bias=False))
            layers += [AutoencoderTinyBlock(width, config.act_fn) for _ in range(blocks)]
        layers.append(nn.Conv2d(config.encoder_block_out_channels[-1], config.latent_channels, 3, padding=1))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, 3, H, W) in [-1, 1]; the layers take [0, 1]."""
        return self.layers(x.add(1).div(2))


class DecoderTiny(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        widths = config.decoder_block_out_channels
        layers: list[nn.Module] = [
            nn.Conv2d(config.latent_channels, widths[0], 3, padding=1),
            ACTIVATIONS[config.act_fn](),
        ]
        last = len(widths) - 1
        for i, (width, blocks) in enumerate(zip(widths, config.num_decoder_blocks, strict=True)):
            layers += [AutoencoderTinyBlock(width, config.act_fn) for _ in range(blocks)]
            if i < last:
                layers.append(nn.Upsample(scale_factor=config.upsampling_scaling_factor, mode="nearest"))
            layers.append(nn.Conv2d(width, width if i < last else config.out_channels, 3, padding=1, bias=i == last))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(torch.tanh(x / 3) * 3).mul(2).sub(1)


class AutoencoderTiny(Network):
    LIBRARY = "diffusers"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        # As diffusers completes it.
        config["block_out_channels"], config["force_upcast"] = config.decoder_block_out_channels, False
        self.encoder = EncoderTiny(config)
        self.decoder = DecoderTiny(config)

    def encode(self, x: Tensor, return_dict: bool = True) -> Any:
        latents = self.encoder(x)
        return AutoencoderTinyOutput(latents) if return_dict else (latents,)

    def decode(self, x: Tensor, generator: Any = None, return_dict: bool = True) -> Any:
        """generator: not used, as in diffusers."""
        sample = self.decoder(x)
        return DecoderOutput(sample) if return_dict else (sample,)

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """Encode, round to bytes and decode: only diffusers' class does."""
        return become_library_class(self)(*arguments, **options)
