"""The blocks of a UNet2DConditionModel, with and without cross-attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ragturbo.model.networks.layers import Downsample2D, ResnetBlock2D, Upsample2D
from ragturbo.model.networks.transformer import Transformer2DModel


@dataclass(frozen=True)
class BlockOptions:
    """What all layers of a block have in common."""

    temb_channels: int
    groups: int
    eps: float
    act: str
    heads: int
    layers: int
    """BasicTransformerBlocks of each Transformer2DModel."""
    cross_attention_dim: int
    linear: bool
    scale: float = 1.0

    def resnet(self, in_channels: int, out_channels: int) -> ResnetBlock2D:
        return ResnetBlock2D(in_channels, out_channels, self.temb_channels, self.groups, self.eps, self.act, self.scale)

    def attention(self, channels: int) -> Transformer2DModel:
        return Transformer2DModel(
            self.heads, channels // self.heads, channels, self.layers, self.groups, self.cross_attention_dim,
            self.linear,
        )  # fmt: skip


class DownBlock2D(nn.Module):
    has_cross_attention = False

    def __init__(
        self, in_channels: int, out_channels: int, resnets: int, options: BlockOptions, downsample: int | None
    ) -> None:
        """downsample: padding of the convolution that halves the sides; None: there is none."""
        super().__init__()
        if self.has_cross_attention:
            self.attentions = nn.ModuleList([options.attention(out_channels) for _ in range(resnets)])
        widths = [in_channels, *[out_channels] * (resnets - 1)]
        self.resnets = nn.ModuleList([options.resnet(width, out_channels) for width in widths])
        self.downsamplers = None if downsample is None else nn.ModuleList([Downsample2D(out_channels, downsample)])

    def forward(
        self, hidden_states: Tensor, temb: Tensor | None = None, **attention: Any
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """attention: the keyword arguments of Transformer2DModel."""
        x = hidden_states
        outputs: tuple[Tensor, ...] = ()
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, temb)
            if self.has_cross_attention:
                x = self.attentions[i](x, **attention, return_dict=False)[0]
            outputs += (x,)
        for downsampler in self.downsamplers or ():
            x = downsampler(x)
            outputs += (x,)
        return x, outputs


class CrossAttnDownBlock2D(DownBlock2D):
    has_cross_attention = True


class UpBlock2D(nn.Module):
    has_cross_attention = False

    def __init__(
        self, in_channels: int, previous: int, out_channels: int, resnets: int, options: BlockOptions, upsample: bool
    ) -> None:
        """in_channels: of the last skip; previous: of the block before this one."""
        super().__init__()
        if self.has_cross_attention:
            self.attentions = nn.ModuleList([options.attention(out_channels) for _ in range(resnets)])
        widths = [previous, *[out_channels] * (resnets - 1)]
        skips = [*[out_channels] * (resnets - 1), in_channels]
        self.resnets = nn.ModuleList(
            [options.resnet(width + skip, out_channels) for width, skip in zip(widths, skips, strict=True)]
        )
        self.upsamplers = nn.ModuleList([Upsample2D(out_channels)]) if upsample else None

    def forward(
        self, hidden_states: Tensor, res_hidden_states_tuple: tuple[Tensor, ...], temb: Tensor | None = None,
        upsample_size: Any = None, **attention: Any,
    ) -> Tensor:  # fmt: skip
        """res_hidden_states_tuple: the skips, of which the last is taken first; attention: as in DownBlock2D."""
        x = hidden_states
        for i, (resnet, skip) in enumerate(zip(self.resnets, reversed(res_hidden_states_tuple), strict=True)):
            x = resnet(torch.cat([x, skip], dim=1), temb)
            if self.has_cross_attention:
                x = self.attentions[i](x, **attention, return_dict=False)[0]
        for upsampler in self.upsamplers or ():
            x = upsampler(x, upsample_size)
        return x


class CrossAttnUpBlock2D(UpBlock2D):
    has_cross_attention = True


class UNetMidBlock2DCrossAttn(nn.Module):
    has_cross_attention = True

    def __init__(self, channels: int, options: BlockOptions) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([options.attention(channels)])
        self.resnets = nn.ModuleList([options.resnet(channels, channels) for _ in range(2)])

    def forward(self, hidden_states: Tensor, temb: Tensor | None = None, **attention: Any) -> Tensor:
        x = self.resnets[0](hidden_states, temb)
        x = self.attentions[0](x, **attention, return_dict=False)[0]
        return self.resnets[1](x, temb)
