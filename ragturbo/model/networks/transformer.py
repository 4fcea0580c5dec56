"""Transformer2DModel of a UNet's cross-attention blocks, with one or more BasicTransformerBlocks."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from ragturbo.model.networks.layers import Attention


class Transformer2DModelOutput(NamedTuple):
    sample: Tensor


class GEGLU(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * hidden)

    def forward(self, hidden_states: Tensor) -> Tensor:
        x, gate = self.proj(hidden_states).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([GEGLU(width, 4 * width), nn.Dropout(0.0), nn.Linear(4 * width, width)])

    def forward(self, hidden_states: Tensor) -> Tensor:
        for module in self.net:
            hidden_states = module(hidden_states)
        return hidden_states


class BasicTransformerBlock(nn.Module):
    # The attributes that never differ here, which `fused.py` checks.
    norm_type, pos_embed, only_cross_attention, double_self_attention = "layer_norm", None, False, False

    def __init__(self, width: int, heads: int, dim_head: int, cross_attention_dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = Attention(width, heads, dim_head)
        self.norm2 = nn.LayerNorm(width)
        self.attn2 = Attention(width, heads, dim_head, cross_attention_dim)
        self.norm3 = nn.LayerNorm(width)
        self.ff = FeedForward(width)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        x = hidden_states
        x = self.attn1(self.norm1(x), attention_mask=attention_mask) + x
        x = self.attn2(self.norm2(x), encoder_hidden_states, encoder_attention_mask) + x
        return self.ff(self.norm3(x)) + x


class Transformer2DModel(nn.Module):
    is_input_continuous = True

    def __init__(
        self, heads: int, dim_head: int, channels: int, layers: int, groups: int, cross_attention_dim: int, linear: bool
    ) -> None:
        """linear: the projections in and out are linear layers, as in SD 2, not 1x1 convolutions."""
        super().__init__()
        self.use_linear_projection, width = linear, heads * dim_head
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, width) if linear else nn.Conv2d(channels, width, 1)
        self.transformer_blocks = nn.ModuleList(
            [BasicTransformerBlock(width, heads, dim_head, cross_attention_dim) for _ in range(layers)]
        )
        self.proj_out = nn.Linear(width, channels) if linear else nn.Conv2d(width, channels, 1)

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None, cross_attention_kwargs: Any = None, return_dict: bool = True,
    ) -> Any:  # fmt: skip
        """cross_attention_kwargs: not used, as by diffusers' default attention."""
        batch, _, height, width = hidden_states.shape
        x = self.norm(hidden_states)
        if not self.use_linear_projection:
            x = self.proj_in(x)
        x = x.permute(0, 2, 3, 1).reshape(batch, height * width, -1)
        if self.use_linear_projection:
            x = self.proj_in(x)
        attention_mask, encoder_attention_mask = _as_bias(attention_mask, x), _as_bias(encoder_attention_mask, x)
        for block in self.transformer_blocks:
            x = block(x, attention_mask, encoder_hidden_states, encoder_attention_mask)
        if self.use_linear_projection:
            x = self.proj_out(x)
        x = x.reshape(batch, height, width, -1).permute(0, 3, 1, 2).contiguous()
        if not self.use_linear_projection:
            x = self.proj_out(x)
        x = x + hidden_states
        return Transformer2DModelOutput(x) if return_dict else (x,)


def _as_bias(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """(B, L), 1 to keep -> (B, 1, L), to be added to scores. A bias is returned as it is."""
    if mask is None or mask.ndim != 2:
        return mask
    return ((1 - mask.to(like.dtype)) * -10000.0).unsqueeze(1)
