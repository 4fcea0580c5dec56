"""The layers a UNet and a VAE decoder are made of, with fewer launches: the same maths over the same weights.

They take the place of diffusers' modules in a derived copy (`fold.py`), never in the model itself, and speak the same
calls, except that a resnet's `temb` is the index of a folded timestep and a block's `encoder_hidden_states` are the
keys and values of all cross-attentions at once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ragturbo.errors import ModelError
from ragturbo.model.ties import Ties
from ragturbo.model.unet import from_tokens, to_tokens
from ragturbo.ops import bias_residual, cross_attention, geglu, group_norm, layer_norm


def group_norm_silu(x: Tensor, norm: nn.GroupNorm, add_bias: Tensor | None = None) -> Tensor:
    return group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps, silu=True, add_bias=add_bias)


class NormAct(nn.Module):
    """GroupNorm and the SiLU behind it in one launch."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return group_norm_silu(x, self.norm)


def layer_norm_of(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    return layer_norm(x, norm.weight, norm.bias, norm.eps)


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, impl: str) -> Tensor:
    """softmax(QKᵀ/√d)V on (B, L, C), in the heads' own width."""
    if impl != "sdpa":
        return cross_attention(q, k[:, None], v[:, None], heads=heads, impl=impl)
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Resnet(nn.Module):
    """ResnetBlock2D with one bias of conv1 for every folded timestep; a VAE's have no timestep and one bias.

    before: the path of the convolution that makes this block's input, if it leaves its bias to this block.
    """

    def __init__(
        self, ties: Ties, path: str, block: Any, embeddings: list[Tensor] | None, before: str | None = None
    ) -> None:
        super().__init__()
        shifted = embeddings is None or block.time_embedding_norm == "default"
        if block.upsample is not None or block.downsample is not None or not shifted:
            raise ModelError(
                f"{path} cannot be folded: it resamples, or takes its time embedding as {block.time_embedding_norm!r}"
            )
        self.norm1, self.norm2 = block.norm1, block.norm2
        self.conv1, self.conv2 = ties.weight(f"{path}.conv1"), ties.weight(f"{path}.conv2")
        # A convolution adds its bias in a launch of its own on a GPU: conv1's goes into the norm behind it, conv2's and
        # the shortcut's into the block's sum.
        self.bias1 = ties.own(lambda: _folded_biases(ties, path, block.skip_time_act, embeddings))
        self.bias0 = None if before is None else ties.bias(before)
        shortcut = None if block.conv_shortcut is None else f"{path}.conv_shortcut"
        self.shortcut = None if shortcut is None else ties.weight(shortcut)
        if shortcut is None and self.bias0 is None:
            self.bias2 = ties.bias(f"{path}.conv2")
        else:
            self.bias2 = ties.own(lambda: _bias_of_sum(ties, f"{path}.conv2", shortcut, before))
        self.scale = block.output_scale_factor

    def forward(self, x: Tensor, temb: Any = None) -> Tensor:
        """temb: which of the folded timesteps, an int; None where there is no time."""
        h = F.conv2d(group_norm_silu(x, self.norm1, self.bias0), self.conv1, padding=1)
        h = group_norm_silu(h, self.norm2, self.bias1[temb or 0])
        h = F.conv2d(h, self.conv2, padding=1)
        if self.shortcut is not None:
            x = F.conv2d(x, self.shortcut)
        out = bias_residual(h, self.bias2, x)
        return out if self.scale == 1 else out / self.scale


def _bias_of_sum(ties: Ties, conv2: str, shortcut: str | None, before: str | None) -> Tensor:
    """(C,): all that a block's sum adds to every pixel: conv2's bias, the shortcut's, and the input's own bias as the
    shortcut passes it on; in fp32 and rounded once."""
    bias = ties.bias(conv2)
    assert bias is not None
    total, missing = bias.float(), None if before is None else ties.bias(before)
    if shortcut is None:
        return total.to(bias.dtype) if missing is None else (total + missing.float()).to(bias.dtype)
    weight, shift = ties.now(shortcut)
    if shift is not None:
        total = total + shift.float()
    if missing is not None:
        total = total + (weight.flatten(1).float() * missing.float()).sum(1)
    return total.to(bias.dtype)


def _folded_biases(ties: Ties, path: str, activated: bool, embeddings: list[Tensor] | None) -> Tensor:
    """(n, C): conv1's bias plus the time embedding's projection, in fp32 and rounded once."""
    bias = ties.bias(f"{path}.conv1")
    assert bias is not None
    if embeddings is None:
        return bias[None]
    weight, shift = ties.now(f"{path}.time_emb_proj")
    rows = []
    for emb in embeddings:
        emb = emb.float() if activated else F.silu(emb.float())
        rows.append(bias.float() + F.linear(emb, weight.float(), None if shift is None else shift.float())[0])
    return torch.stack(rows).to(bias.dtype)


class Transformer(nn.Module):
    """Transformer2DModel on tokens: over a channels_last image no step copies it."""

    def __init__(self, ties: Ties, path: str, model: Any, layout: TextKVLayout, attention: str) -> None:
        super().__init__()
        if not model.is_input_continuous:
            raise ModelError(f"{path} cannot be folded: it does not take an image")
        self.norm = model.norm
        # A 1x1 convolution is a linear layer on tokens.
        self.proj_in, self.proj_out = (ties.weight(f"{path}.{name}").flatten(1) for name in ("proj_in", "proj_out"))
        self.bias_in, self.bias_out = (ties.bias(f"{path}.{name}") for name in ("proj_in", "proj_out"))
        self.blocks = nn.ModuleList(
            [
                TransformerBlock(ties, f"{path}.transformer_blocks.{i}", block, layout, attention)
                for i, block in enumerate(model.transformer_blocks)
            ]
        )

    def forward(self, x: Tensor, encoder_hidden_states: Tensor, **_: Any) -> tuple[Tensor]:
        tokens = to_tokens(x)
        norm = self.norm
        normed = to_tokens(group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps))
        h = F.linear(normed, self.proj_in, self.bias_in)
        for block in self.blocks:
            h = block(h, encoder_hidden_states)
        h = tokens + F.linear(h, self.proj_out, self.bias_out)
        return (from_tokens(h, (x.shape[2], x.shape[3])),)


class TransformerBlock(nn.Module):
    """BasicTransformerBlock with one product for self-attention's Q, K and V; cross-attention's are in `text_kv`."""

    def __init__(self, ties: Ties, path: str, block: Any, layout: TextKVLayout, attention: str) -> None:
        super().__init__()
        _check_block(path, block)
        self.norm1, self.norm2, self.norm3 = block.norm1, block.norm2, block.norm3
        self.heads, self.attention = block.attn1.heads, attention
        self.qkv = ties.packed(*(f"{path}.attn1.to_{x}" for x in "qkv"))
        self.out1, self.out1_bias = ties.weight(f"{path}.attn1.to_out.0"), ties.bias(f"{path}.attn1.to_out.0")
        self.q = ties.weight(f"{path}.attn2.to_q")
        self.where = layout.add(path, self.q.shape[0])
        self.out2, self.out2_bias = ties.weight(f"{path}.attn2.to_out.0"), ties.bias(f"{path}.attn2.to_out.0")
        self.up, self.up_bias = ties.weight(f"{path}.ff.net.0.proj"), ties.bias(f"{path}.ff.net.0.proj")
        self.down, self.down_bias = ties.weight(f"{path}.ff.net.2"), ties.bias(f"{path}.ff.net.2")

    def forward(self, x: Tensor, text_kv: Tensor) -> Tensor:
        q, k, v = F.linear(layer_norm_of(x, self.norm1), self.qkv).chunk(3, dim=-1)
        x = x + F.linear(attend(q, k, v, self.heads, self.attention), self.out1, self.out1_bias)
        q = F.linear(layer_norm_of(x, self.norm2), self.q)
        start, width = self.where
        k, v = text_kv[..., start : start + width], text_kv[..., start + width : start + 2 * width]
        x = x + F.linear(attend(q, k, v, self.heads, self.attention), self.out2, self.out2_bias)
        hidden = geglu(F.linear(layer_norm_of(x, self.norm3), self.up), self.up_bias)
        return x + F.linear(hidden, self.down, self.down_bias)


class TextKVLayout:
    """Where each cross-attention finds its K and V in one product of all of them with the text."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.width = 0

    def add(self, path: str, width: int) -> tuple[int, int]:
        start, self.width = self.width, self.width + 2 * width
        self.paths += [f"{path}.attn2.to_k", f"{path}.attn2.to_v"]
        return start, width


def _check_block(path: str, block: Any) -> None:
    """The blocks of Stable Diffusion 1, 2 and XL. Anything else is refused by name rather than computed differently."""
    reasons = []
    if block.norm_type != "layer_norm" or block.pos_embed is not None:
        reasons.append(f"norm type {block.norm_type!r}")
    if block.only_cross_attention or block.double_self_attention or block.attn2 is None:
        reasons.append("its attentions are not one self- and one cross-attention")
    if type(block.ff.net[0]).__name__ != "GEGLU":
        reasons.append(f"activation {type(block.ff.net[0]).__name__}")
    for attention in (block.attn1, block.attn2):
        if attention is None:
            continue
        plain = attention.scale == (attention.inner_dim // attention.heads) ** -0.5
        extras = (
            attention.group_norm,
            attention.spatial_norm,
            attention.norm_q,
            attention.norm_k,
            attention.norm_cross,
        )
        if not plain or any(e is not None for e in extras) or attention.rescale_output_factor != 1:
            reasons.append("an attention with norms or a scale of its own")
        if attention.to_q.bias is not None or attention.residual_connection:
            reasons.append("an attention with biases or a residual of its own")
    if reasons:
        raise ModelError(f"{path} cannot be folded: {'; '.join(dict.fromkeys(reasons))}")
