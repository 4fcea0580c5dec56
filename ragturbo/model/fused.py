"""The layers of a UNet and of a VAE decoder with fewer kernel launches: the same weights and result.

They replace diffusers' modules in a derived copy (`fold.py`, `fused_vae.py`), never in the model itself, and have the
same signatures, except that a resnet's `temb` is the index of a folded timestep and a block's `encoder_hidden_states`
are the keys and values of all cross-attentions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ragturbo.errors import ModelError
from ragturbo.model.tied_layers import Sum, TiedConv2d, TiedLinear
from ragturbo.model.ties import Ties
from ragturbo.model.tokens import from_tokens, products, sdpa, to_tokens
from ragturbo.ops import cross_attention, geglu, group_norm


def group_norm_of(
    x: Tensor, norm: nn.GroupNorm, *, silu: bool = False, add_bias: Tensor | None = None, overwrite: bool = False
) -> Tensor:
    values = norm.num_groups, norm.weight, norm.bias, norm.eps
    return group_norm(x, *values, silu=silu, add_bias=add_bias, overwrite=overwrite)


class NormAct(nn.Module):
    """GroupNorm and SiLU in one launch."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return group_norm_of(x, self.norm, silu=True)


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, impl: str) -> Tensor:
    """softmax(QKᵀ/√d)V on (B, L, C)."""
    if impl == "sdpa":
        return sdpa(q, k, v, heads)
    if impl == "products":
        return products(q, k, v, heads)
    return cross_attention(q, k[:, None], v[:, None], heads=heads, impl=impl)


class Resnet(nn.Module):
    """ResnetBlock2D with one bias of conv1 per folded timestep; a VAE's have no timestep and one bias.

    before: the path of the convolution that computes this block's input, if this block has to add its bias.
    """

    def __init__(
        self, ties: Ties, path: str, block: Any, embeddings: list[Tensor] | None, before: str | None = None
    ) -> None:
        super().__init__()
        if why_not := not_fusible(block):
            raise ModelError(f"{path} cannot be folded: {why_not}")
        self.norm1, self.norm2 = ties.norm(block.norm1), ties.norm(block.norm2)
        self.conv1, self.conv2 = TiedConv2d(ties, f"{path}.conv1"), TiedConv2d(ties, f"{path}.conv2")
        # On a GPU a convolution adds its bias in a separate launch: conv1's is added by the following norm, those of
        # conv2 and the shortcut by the residual sum.
        bias1 = ties.own(lambda: _folded_biases(ties, path, block.skip_time_act, embeddings))
        # Views, made here because making one takes as long as a small layer.
        self.bias1 = bias1.unbind()
        self.bias0 = None if before is None else ties.bias(before, cast=False)
        shortcut = None if block.conv_shortcut is None else f"{path}.conv_shortcut"
        self.shortcut = None if shortcut is None else TiedConv2d(ties, shortcut, padding=(0, 0))
        if shortcut is None and self.bias0 is None:
            self.bias2 = ties.bias(f"{path}.conv2")
        else:
            self.bias2 = ties.own(lambda: _bias_of_sum(ties, f"{path}.conv2", shortcut, before))
        self.scale = block.output_scale_factor
        # A UNet's maps are skips as well.
        self.owns_input = embeddings is None

    def forward(self, x: Tensor, temb: int | None = None) -> Tensor:
        """temb: the index of a folded timestep; None in a VAE."""
        h = self.conv1(group_norm_of(x, self.norm1, silu=True, add_bias=self.bias0))
        # Large maps of new memory take a CPU as long to page in as to write, so dead ones are overwritten.
        h = group_norm_of(h, self.norm2, silu=True, add_bias=self.bias1[temb or 0], overwrite=True)
        if self.shortcut is not None:
            x = self.shortcut(x)
        out = self.conv2(h, self.bias2, x, overwrite=self.owns_input or self.shortcut is not None)
        return out if self.scale == 1 else out / self.scale


def not_fusible(block: Any) -> str | None:
    """Why `Resnet` cannot replace this ResnetBlock2D; None if it can."""
    if block.upsample is not None or block.downsample is not None:
        return "it resamples"
    if not isinstance(block.nonlinearity, nn.SiLU):
        return f"its activation is {type(block.nonlinearity).__name__}, not SiLU"
    if block.time_emb_proj is not None and block.time_embedding_norm != "default":
        return f"its time embedding is applied as {block.time_embedding_norm!r}"
    return None


def _bias_of_sum(ties: Ties, conv2: str, shortcut: str | None, before: str | None) -> Tensor:
    """(C,): the constant part of a resnet's residual sum, added in fp32 and rounded once.

    It is conv2's bias, the shortcut's, and the bias of the input, as the shortcut transforms it.
    """
    bias = ties.bias(conv2, cast=False)
    assert bias is not None
    total = bias.float()
    input_bias = None if before is None else ties.bias(before, cast=False)
    added = None if input_bias is None else input_bias.float()
    if shortcut is not None:
        if (shortcut_bias := ties.bias(shortcut, cast=False)) is not None:
            total = total + shortcut_bias.float()
        if added is not None:
            added = (ties.current(shortcut).flatten(1).float() * added).sum(1)
    return (total if added is None else total + added).to(ties.dtype or bias.dtype)


def _folded_biases(ties: Ties, path: str, activated: bool, embeddings: list[Tensor] | None) -> Tensor:
    """(n, C): conv1's bias plus the projected time embedding of each timestep, added in fp32 and rounded once."""
    bias = ties.bias(f"{path}.conv1", cast=False)
    assert bias is not None
    if embeddings is None:
        return bias[None]
    projection = f"{path}.time_emb_proj"
    weight, shift = ties.current(projection, cast=False).float(), ties.bias(projection, cast=False)
    shift = None if shift is None else shift.float()
    rows = [
        bias.float() + F.linear(e.float() if activated else F.silu(e.float()), weight, shift)[0] for e in embeddings
    ]
    return torch.stack(rows).to(bias.dtype)


class Transformer(nn.Module):
    """Transformer2DModel on tokens, which are views of a channels_last image."""

    def __init__(self, ties: Ties, path: str, model: Any, layout: TextKVLayout, attention: str) -> None:
        super().__init__()
        if not model.is_input_continuous:
            raise ModelError(f"{path} cannot be folded: its input is not an image")
        self.norm = ties.norm(model.norm)
        self.proj_in, self.proj_out = TiedLinear(ties, f"{path}.proj_in"), TiedLinear(ties, f"{path}.proj_out")
        self.bias_in = ties.bias(f"{path}.proj_in")
        paths = [f"{path}.transformer_blocks.{i}" for i in range(len(model.transformer_blocks))]
        self.blocks = nn.ModuleList(
            TransformerBlock(ties, where, block, layout, attention, last=where == paths[-1])
            for where, block in zip(paths, model.transformer_blocks, strict=True)
        )
        out, last = f"{path}.proj_out", f"{paths[-1]}.ff.net.2"
        # On a GPU the last block's product is added in place, without its bias, which is folded into the next one.
        self.bias_out = ties.bias(out) if ties.packs else ties.own(lambda: _bias_through(ties, last, out))

    def forward(self, x: Tensor, encoder_hidden_states: Tensor, **_: Any) -> tuple[Tensor]:
        stream = Sum(self.proj_in(to_tokens(group_norm_of(x, self.norm)), self.bias_in))
        for block in self.blocks:
            stream = block(stream, encoder_hidden_states)
        h = self.proj_out(stream.x, self.bias_out, to_tokens(x))
        return (from_tokens(h, (x.shape[2], x.shape[3])),)


class TransformerBlock(nn.Module):
    """BasicTransformerBlock with self-attention's Q, K and V in one product, and cross-attention's K and V given."""

    def __init__(self, ties: Ties, path: str, block: Any, layout: TextKVLayout, attention: str, *, last: bool) -> None:
        super().__init__()
        _check_block(path, block)
        self.last = last
        self.norm1, self.norm2, self.norm3 = (ties.norm(norm) for norm in (block.norm1, block.norm2, block.norm3))
        self.heads, self.attention = block.attn1.heads, attention
        self.qkv = TiedLinear(ties, *(f"{path}.attn1.to_{x}" for x in "qkv"))
        self.q = TiedLinear(ties, f"{path}.attn2.to_q")
        self.k_slice, self.v_slice = layout.add(path, self.q.width)
        out1, out2, up, down = (
            f"{path}.{x}" for x in ("attn1.to_out.0", "attn2.to_out.0", "ff.net.0.proj", "ff.net.2")
        )
        self.out1, self.out2, self.up, self.down = (TiedLinear(ties, x) for x in (out1, out2, up, down))
        self.out1_bias, self.out2_bias, self.down_bias = (ties.bias(x) for x in (out1, out2, down))
        self.up_bias = ties.bias(up, cast=False)

    def forward(self, stream: Sum, text_kv: Tensor) -> Sum:
        """stream: (B, T, C); text_kv: (B, L, ΣC)."""
        h, x = stream.normed(self.norm1)
        q, k, v = self.qkv(h).chunk(3, dim=-1)
        h, x = self.out1.onto(x, attend(q, k, v, self.heads, self.attention), self.out1_bias).normed(self.norm2)
        k, v = text_kv[..., self.k_slice], text_kv[..., self.v_slice]
        h = attend(self.q(h), k, v, self.heads, self.attention)
        h, x = self.out2.onto(x, h, self.out2_bias).normed(self.norm3)
        h = geglu(self.up(h), self.up_bias)
        return Sum(self.down.add_to(x, h, self.down_bias)) if self.last else self.down.onto(x, h, self.down_bias)


def _bias_through(ties: Ties, before: str, linear: str) -> Tensor:
    """(C,): a linear layer's bias, and that of the layer before it as this one transforms it; summed in fp32."""
    bias, added = ties.bias(linear, cast=False), ties.bias(before, cast=False)
    weight = ties.current(linear).flatten(1)
    total = weight.new_zeros(weight.shape[0], dtype=torch.float32) if bias is None else bias.float()
    if added is not None:
        total = total + (weight.float() * added.float()).sum(1)
    return total.to(weight.dtype)


class TextKVLayout:
    """The positions of each cross-attention's K and V in the product of all their weights with the text."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.width = 0

    def add(self, path: str, width: int) -> tuple[slice, slice]:
        """The slices of K and V, each `width` wide, of the block at `path`."""
        k, v = self.width, self.width + width
        self.width += 2 * width
        self.paths += [f"{path}.attn2.to_k", f"{path}.attn2.to_v"]
        return slice(k, v), slice(v, v + width)


def is_plain_attention(attention: Any) -> bool:
    """Whether a diffusers Attention, apart from its group norm, is softmax(QKᵀ/√d)V between linear layers."""
    norms = attention.spatial_norm, attention.norm_q, attention.norm_k, attention.norm_cross
    scale = (attention.inner_dim // attention.heads) ** -0.5
    return not any(norms) and attention.scale == scale and attention.rescale_output_factor == 1


def _check_block(path: str, block: Any) -> None:
    """Raise ModelError for transformer blocks other than those of Stable Diffusion 1, 2 and XL."""
    reasons = []
    if block.norm_type != "layer_norm" or block.pos_embed is not None:
        reasons.append(f"norm type {block.norm_type!r}")
    if block.only_cross_attention or block.double_self_attention or block.attn2 is None:
        reasons.append("its attentions are not one self- and one cross-attention")
    if type(block.ff.net[0]).__name__ != "GEGLU":
        reasons.append(f"activation {type(block.ff.net[0]).__name__}")
    for attention in filter(None, (block.attn1, block.attn2)):
        if attention.group_norm is not None or not is_plain_attention(attention):
            reasons.append("an attention with norms or a non-standard scale")
        if attention.to_q.bias is not None or attention.residual_connection:
            reasons.append("an attention with biases or a residual connection")
    if reasons:
        raise ModelError(f"{path} cannot be folded: {'; '.join(dict.fromkeys(reasons))}")
