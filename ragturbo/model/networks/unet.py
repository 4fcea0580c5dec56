"""UNet2DConditionModel of Stable Diffusion 1 and 2: conditions are the timestep and the text alone."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ragturbo.model.networks.config import Config, Options
from ragturbo.model.networks.layers import ACTIVATIONS, per_block, sinusoid
from ragturbo.model.networks.library_class import Network, become_library_class
from ragturbo.model.networks.unet_blocks import (
    BlockOptions,
    CrossAttnDownBlock2D,
    CrossAttnUpBlock2D,
    DownBlock2D,
    UNetMidBlock2DCrossAttn,
    UpBlock2D,
)

_DOWN = {kind.__name__: kind for kind in (DownBlock2D, CrossAttnDownBlock2D)}
_UP = {kind.__name__: kind for kind in (UpBlock2D, CrossAttnUpBlock2D)}
OPTIONS = Options(
    free={
        "sample_size": None, "in_channels": 4, "out_channels": 4, "center_input_sample": False,
        "flip_sin_to_cos": True, "freq_shift": 0,
        "down_block_types": (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
        "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
        "block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2, "downsample_padding": 1,
        "mid_block_scale_factor": 1, "act_fn": "silu", "norm_num_groups": 32, "norm_eps": 1e-5,
        "cross_attention_dim": 1280, "transformer_layers_per_block": 1, "attention_head_dim": 8,
        "use_linear_projection": False,
        # Of attention without torch's scaled_dot_product_attention.
        "upcast_attention": False,
        # Without addition_embed_type, of nothing.
        "addition_embed_type_num_heads": 64,
    },
    fixed={
        "mid_block_type": "UNetMidBlock2DCrossAttn", "only_cross_attention": False, "dropout": 0.0,
        "reverse_transformer_layers_per_block": None, "encoder_hid_dim": None, "encoder_hid_dim_type": None,
        "num_attention_heads": None, "dual_cross_attention": False, "class_embed_type": None,
        "addition_embed_type": None, "addition_time_embed_dim": None, "num_class_embeds": None,
        "resnet_time_scale_shift": "default", "resnet_skip_time_act": False, "resnet_out_scale_factor": 1.0,
        "time_embedding_type": "positional", "time_embedding_dim": None, "time_embedding_act_fn": None,
        "timestep_post_act": None, "time_cond_proj_dim": None, "conv_in_kernel": 3, "conv_out_kernel": 3,
        "projection_class_embeddings_input_dim": None, "attention_type": "default", "class_embeddings_concat": False,
        "mid_block_only_cross_attention": None, "cross_attention_norm": None,
    },
    allowed={"down_block_types": _DOWN, "up_block_types": _UP, "act_fn": ACTIVATIONS},
)  # fmt: skip


class UNet2DConditionOutput(NamedTuple):
    sample: Tensor


class TimestepEmbedding(nn.Module):
    def __init__(self, in_channels: int, width: int, act: str) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_channels, width)
        self.act = ACTIVATIONS[act]()
        self.linear_2 = nn.Linear(width, width)

    def forward(self, sample: Tensor, condition: None = None) -> Tensor:
        return self.linear_2(self.act(self.linear_1(sample)))


class UNet2DConditionModel(Network):
    LIBRARY = "diffusers"
    # The conditions that it does not have.
    class_embedding = encoder_hid_proj = time_embed_act = position_net = None

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        c, widths = config, list(config.block_out_channels)
        blocks, time_width = len(widths), 4 * widths[0]
        heads = per_block(c.attention_head_dim, blocks)
        layers = per_block(c.transformer_layers_per_block, blocks)
        text_widths = per_block(c.cross_attention_dim, blocks)
        resnets = per_block(c.layers_per_block, blocks)

        def options(i: int, scale: float = 1.0) -> BlockOptions:
            return BlockOptions(
                time_width, c.norm_num_groups, c.norm_eps, c.act_fn, heads[i], layers[i], text_widths[i],
                c.use_linear_projection, scale,
            )  # fmt: skip

        self.conv_in = nn.Conv2d(c.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(widths[0], time_width, c.act_fn)
        self.down_blocks = nn.ModuleList(
            [
                _DOWN[kind](
                    widths[max(i - 1, 0)], widths[i], resnets[i], options(i),
                    c.downsample_padding if i < blocks - 1 else None,
                )
                for i, kind in zip(range(blocks), c.down_block_types, strict=True)
            ]
        )  # fmt: skip
        # Registered before the middle block, as in diffusers: optimizers go by the order of the parameters.
        self.up_blocks = nn.ModuleList(
            [
                _UP[kind](
                    widths[max(i - 1, 0)], widths[min(i + 1, blocks - 1)], widths[i], resnets[i] + 1, options(i), i > 0
                )
                for i, kind in zip(reversed(range(blocks)), c.up_block_types, strict=True)
            ]
        )
        self.mid_block = UNetMidBlock2DCrossAttn(widths[-1], options(-1, c.mid_block_scale_factor))
        self.num_upsamplers = blocks - 1
        self.conv_norm_out = nn.GroupNorm(c.norm_num_groups, widths[0], eps=c.norm_eps)
        self.conv_act = ACTIVATIONS[c.act_fn]()
        self.conv_out = nn.Conv2d(widths[0], c.out_channels, 3, padding=1)

    def get_time_embed(self, sample: Tensor, timestep: Tensor | float | int) -> Tensor:
        """The sinusoid of the timestep, (B, C) in the dtype of `sample`."""
        if not torch.is_tensor(timestep):
            dtype = torch.float64 if isinstance(timestep, float) else torch.int64
            timestep = torch.tensor([timestep], dtype=dtype, device=sample.device)
        elif timestep.ndim == 0:
            timestep = timestep[None].to(sample.device)
        c = self.config
        timesteps = timestep.expand(sample.shape[0])
        return sinusoid(timesteps, c.block_out_channels[0], c.flip_sin_to_cos, c.freq_shift).to(sample.dtype)

    def get_class_embed(self, sample: Tensor, class_labels: Tensor | None) -> None:
        return None

    def get_aug_embed(self, emb: Tensor, encoder_hidden_states: Tensor, added_cond_kwargs: Any) -> None:
        return None

    def process_encoder_hidden_states(self, encoder_hidden_states: Tensor, added_cond_kwargs: Any) -> Tensor:
        return encoder_hidden_states

    def forward(
        self, sample: Tensor, timestep: Tensor | float | int, encoder_hidden_states: Tensor, *,
        return_dict: bool = True, **conditions: Any,
    ) -> Any:  # fmt: skip
        """The noise, or what the scheduler's prediction type says, of `sample` (B, c, H, W).

        conditions: the others of diffusers' forward, which runs if one is given.
        """
        if any(value is not None for value in conditions.values()):
            return become_library_class(self)(
                sample, timestep, encoder_hidden_states, return_dict=return_dict, **conditions
            )
        odd = any(side % 2**self.num_upsamplers for side in sample.shape[-2:])
        if self.config.center_input_sample:
            sample = 2 * sample - 1.0
        emb = self.time_embedding(self.get_time_embed(sample, timestep))
        text: dict[str, Tensor] = {"encoder_hidden_states": encoder_hidden_states}
        sample = self.conv_in(sample)
        skips: tuple[Tensor, ...] = (sample,)
        for block in self.down_blocks:
            sample, outputs = block(sample, emb, **(text if block.has_cross_attention else {}))
            skips += outputs
        sample = self.mid_block(sample, emb, **text)
        for i, up_block in enumerate(self.up_blocks):
            count = len(cast(nn.ModuleList, up_block.resnets))
            skips, taken = skips[:-count], skips[-count:]
            size = skips[-1].shape[2:] if odd and i < len(self.up_blocks) - 1 else None
            sample = up_block(sample, taken, emb, size, **(text if up_block.has_cross_attention else {}))
        sample = self.conv_out(self.conv_act(self.conv_norm_out(sample)))
        return UNet2DConditionOutput(sample) if return_dict else (sample,)
