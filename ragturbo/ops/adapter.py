"""The H-space adapter of Eqs. 4–5 as fused launches: 3 for kind "attention", 14 for kind "transformer".

K and V depend on h_retr alone, so `retrieved_kv` is a launch of its own that can overlap the UNet's encoder. Forward
only; training uses the module's own torch code.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ragturbo.errors import InvalidRequest
from ragturbo.ops.cross_attention import cross_attention
from ragturbo.ops.group_norm import group_norm
from ragturbo.ops.layer_norm import layer_norm
from ragturbo.ops.linear import linear
from ragturbo.ops.project_attention import project_attention

Weights = Mapping[str, Tensor]

# As in diffusers' Transformer2DModel.
GROUP_NORM_EPS = 1e-6
LAYER_NORM_EPS = 1e-5
_BLOCK = "transformer_blocks.0."


def retrieved_kv(h_retr: Tensor, to_k: Tensor, to_v: Tensor, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """K and V of Eq. 4 in one launch. h_retr: (B, k, S, C_retr); to_k, to_v: (C, C_retr) -> two views (B, k, S, C)."""
    kv = linear(h_retr.flatten(1, 2), [to_k, to_v], impl=impl).unflatten(1, h_retr.shape[1:3])
    k, v = kv.chunk(2, dim=-1)
    return k, v


def attention_adapter(
    h_tgt: Tensor, k: Tensor, v: Tensor, lam: Tensor, valid: Tensor | None, weights: Weights,
    *, heads: int, impl: str = "auto",
) -> Tensor:  # fmt: skip
    """Eqs. 4–5 of kind "attention" in two launches -> (B, T, C).

    h_tgt: (B, T, C); k, v: (B, n, S, C); valid: (B, n) bool; lam: (B,), 0 for a sample without valid neighbours.
    weights: to_q.weight, proj_out.weight, proj_out.bias.
    """
    attended = project_attention(h_tgt, _get(weights, "to_q.weight"), k, v, valid, heads=heads, impl=impl)
    out, bias = _get(weights, "proj_out.weight"), _get(weights, "proj_out.bias")
    return linear(attended, [out], bias, residual=h_tgt, lam=lam, impl=impl)


def transformer_adapter(
    h_tgt: Tensor, k: Tensor, v: Tensor, lam: Tensor, valid: Tensor | None, weights: Weights,
    *, heads: int, groups: int = 32, impl: str = "auto",
) -> Tensor:  # fmt: skip
    """Eqs. 4–5 of kind "transformer" in 13 launches: h_tgt + λ·g(h_tgt, h_retr). Shapes as in `attention_adapter`.

    weights: those of a diffusers Transformer2DModel of one block with linear projections, under its names.
    """

    def get(name: str) -> Tensor:
        return _get(weights, _BLOCK + name)

    def normed(x: Tensor, i: int) -> Tensor:
        return layer_norm(x, get(f"norm{i}.weight"), get(f"norm{i}.bias"), LAYER_NORM_EPS, impl=impl)

    # Normalisations are separate launches: inside `linear` every program would compute the statistics again, and could
    # not copy tiles of x to shared memory asynchronously.
    norm, norm_bias = _get(weights, "norm.weight"), _get(weights, "norm.bias")
    image = h_tgt.transpose(1, 2).unsqueeze(-1)
    x = group_norm(image, groups, norm, norm_bias, GROUP_NORM_EPS, impl=impl).squeeze(-1).transpose(1, 2)
    x = linear(x, [_get(weights, "proj_in.weight")], _get(weights, "proj_in.bias"), impl=impl)

    qkv = [get(f"attn1.to_{name}.weight") for name in "qkv"]
    q, own_k, own_v = linear(normed(x, 1), qkv, impl=impl).chunk(3, dim=-1)
    attended = cross_attention(q, own_k[:, None], own_v[:, None], heads=heads, impl=impl)
    x = linear(attended, [get("attn1.to_out.0.weight")], get("attn1.to_out.0.bias"), residual=x, impl=impl)

    to_q = get("attn2.to_q.weight")
    attended = project_attention(normed(x, 2), to_q, k, v, valid, heads=heads, impl=impl)
    x = linear(attended, [get("attn2.to_out.0.weight")], get("attn2.to_out.0.bias"), residual=x, impl=impl)

    up, up_bias = get("ff.net.0.proj.weight"), get("ff.net.0.proj.bias")
    hidden = linear(normed(x, 3), [up], up_bias, geglu=True, impl=impl)
    x = linear(hidden, [get("ff.net.2.weight")], get("ff.net.2.bias"), residual=x, impl=impl)

    proj_out, proj_out_bias = _get(weights, "proj_out.weight"), _get(weights, "proj_out.bias")
    return linear(x, [proj_out], proj_out_bias, residual=h_tgt, lam=lam, impl=impl)


def _get(weights: Weights, name: str) -> Tensor:
    try:
        return weights[name]
    except KeyError:
        raise InvalidRequest(f"the adapter's weights have no {name!r}, only {sorted(weights)[:5]} …") from None
