"""The layers that UNets and autoencoders have in common, under diffusers' names."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ACTIVATIONS = {"silu": nn.SiLU, "swish": nn.SiLU, "relu": nn.ReLU, "gelu": nn.GELU, "mish": nn.Mish}
# Torch's nearest upsampling fails on larger batches and tensors in channels_last.
_UPSAMPLED_BATCH, _UPSAMPLED_VALUES = 64, 2**31


class ResnetBlock2D(nn.Module):
    # The attributes that never differ here, which `fold.py` and `fused.py` check.
    upsample = downsample = None
    time_embedding_norm, skip_time_act = "default", False

    def __init__(
        self, in_channels: int, out_channels: int, temb_channels: int | None, groups: int, eps: float,
        act: str = "silu", scale: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.in_channels, self.out_channels, self.output_scale_factor = in_channels, out_channels, scale
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = None if temb_channels is None else nn.Linear(temb_channels, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nonlinearity = ACTIVATIONS[act]()
        self.conv_shortcut = None if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, input_tensor: Tensor, temb: Tensor | None = None) -> Tensor:
        x, h = input_tensor, self.conv1(self.nonlinearity(self.norm1(input_tensor)))
        if self.time_emb_proj is not None and temb is not None:
            h = h + self.time_emb_proj(self.nonlinearity(temb))[:, :, None, None]
        h = self.conv2(self.nonlinearity(self.norm2(h)))
        if self.conv_shortcut is not None:
            # Gradients keep their strides, as in diffusers.
            x = self.conv_shortcut(x.contiguous() if self.training else x)
        return _divided(x + h, self.output_scale_factor)


class Downsample2D(nn.Module):
    def __init__(self, channels: int, padding: int = 1) -> None:
        super().__init__()
        self.channels, self.padding, self.use_conv, self.norm = channels, padding, True, None
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, hidden_states: Tensor) -> Tensor:
        if self.padding == 0:
            hidden_states = F.pad(hidden_states, (0, 1, 0, 1))
        return self.conv(hidden_states)


class Upsample2D(nn.Module):
    # As in `ResnetBlock2D`, for `fused_vae.py`.
    use_conv, use_conv_transpose, interpolate, norm = True, False, True, None

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, hidden_states: Tensor, output_size: Any = None) -> Tensor:
        """output_size: (height, width) if they are not twice the input's."""
        x = hidden_states
        factor = 2.0 if output_size is None else max(f / s for f, s in zip(output_size, x.shape[-2:], strict=True))
        if x.shape[0] >= _UPSAMPLED_BATCH or x.numel() * factor > _UPSAMPLED_VALUES:
            x = x.contiguous()
        if output_size is None:
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        else:
            x = F.interpolate(x, size=output_size, mode="nearest")
        return self.conv(x)


class Attention(nn.Module):
    """Self-attention, or cross-attention if `cross_attention_dim` is given. groups: those of a norm before it, which an
    autoencoder's attention over pixels has, together with biases and a residual connection."""

    # As in `ResnetBlock2D`.
    spatial_norm = norm_q = norm_k = norm_cross = None

    def __init__(
        self, query_dim: int, heads: int, dim_head: int, cross_attention_dim: int | None = None,
        groups: int | None = None, eps: float = 1e-6, scale: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.heads, self.inner_dim, self.scale = heads, heads * dim_head, dim_head**-0.5
        self.residual_connection, self.rescale_output_factor = groups is not None, scale
        self.group_norm = None if groups is None else nn.GroupNorm(groups, query_dim, eps=eps)
        width = query_dim if cross_attention_dim is None else cross_attention_dim
        biased = groups is not None
        self.to_q = nn.Linear(query_dim, self.inner_dim, bias=biased)
        self.to_k = nn.Linear(width, self.inner_dim, bias=biased)
        self.to_v = nn.Linear(width, self.inner_dim, bias=biased)
        self.to_out = nn.ModuleList([nn.Linear(self.inner_dim, query_dim), nn.Dropout(0.0)])

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """hidden_states: (B, T, C) or (B, C, h, w); attention_mask: (B, 1, L), added to the scores; temb: not used."""
        x, shape = hidden_states, hidden_states.shape
        if x.ndim == 4:
            x = x.view(shape[0], shape[1], shape[2] * shape[3]).transpose(1, 2)
        if self.group_norm is not None:
            x = self.group_norm(x.transpose(1, 2)).transpose(1, 2)
        context = x if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (self._by_head(part) for part in (self.to_q(x), self.to_k(context), self.to_v(context)))
        mask = None if attention_mask is None else self._mask(attention_mask, context.shape[1])
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = self.to_out[0](x.transpose(1, 2).reshape(shape[0], -1, self.inner_dim))
        if len(shape) == 4:
            x = x.transpose(-1, -2).reshape(shape)
        if self.residual_connection:
            x = x + hidden_states
        return _divided(x, self.rescale_output_factor)

    def _by_head(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], -1, self.heads, x.shape[-1] // self.heads).transpose(1, 2)

    def _mask(self, mask: Tensor, length: int) -> Tensor:
        if mask.shape[-1] != length:
            # As diffusers pads a mask of another length.
            mask = F.pad(mask, (0, length))
        return mask.repeat_interleave(self.heads, dim=0).view(mask.shape[0], self.heads, -1, mask.shape[-1])


def _divided(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1 else x / factor


def per_block(value: Any, blocks: int) -> list[Any]:
    """An option that is one value for all blocks, or a list with one for each."""
    return list(value) if isinstance(value, (list, tuple)) else [value] * blocks


def sinusoid(timesteps: Tensor, width: int, flip_sin_to_cos: bool, freq_shift: float) -> Tensor:
    """timesteps: (B,) -> (B, width) fp32."""
    half = width // 2
    exponent = -math.log(10000) * torch.arange(0, half, dtype=torch.float32, device=timesteps.device)
    x = timesteps[:, None].float() * torch.exp(exponent / (half - freq_shift))[None]
    x = torch.cat([torch.sin(x), torch.cos(x)], dim=-1)
    if flip_sin_to_cos:
        x = torch.cat([x[:, half:], x[:, :half]], dim=-1)
    return F.pad(x, (0, 1, 0, 0)) if width % 2 == 1 else x
