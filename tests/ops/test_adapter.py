from __future__ import annotations

import pytest
import torch
from diffusers.models.transformers.transformer_2d import Transformer2DModel

from ragturbo.errors import InvalidRequest
from ragturbo.kernels.launch import counted
from ragturbo.model.adapter import HSpaceAdapter
from ragturbo.ops import attention_adapter, retrieved_kv, transformer_adapter

CHANNELS, HEADS = 64, 2


@pytest.fixture
def adapter(request, rng):
    """An adapter whose output projection is not zero."""
    torch.manual_seed(int(rng.integers(2**31)))
    adapter = HSpaceAdapter(CHANNELS, HEADS, request.param)
    torch.nn.init.normal_(adapter.proj_out.weight, std=CHANNELS**-0.5)
    torch.nn.init.normal_(adapter.proj_out.bias, std=0.1)
    return adapter.eval().requires_grad_(False)


@pytest.fixture
def features(randn, device):
    """h_tgt, h_retr, λ, valid: two samples of 5×4 tokens, three neighbours of 9."""
    lam, valid = torch.tensor([0.7, 0.4], device=device), torch.tensor([[True, False, True], [True] * 3], device=device)
    return randn(2, 20, CHANNELS), randn(2, 3, 9, CHANNELS), lam, valid


def fused(adapter, h_tgt, h_retr, lam, valid, impl="triton"):
    weights = adapter.state_dict()
    prefix = "transformer_blocks.0.attn2." if adapter.kind == "transformer" else ""
    k, v = retrieved_kv(h_retr, weights[f"{prefix}to_k.weight"], weights[f"{prefix}to_v.weight"], impl)
    if adapter.kind == "attention":
        return attention_adapter(h_tgt, k, v, lam, valid, weights, heads=HEADS, impl=impl)
    return transformer_adapter(h_tgt, k, v, lam, valid, weights, heads=HEADS, groups=adapter.norm.num_groups, impl=impl)


@pytest.mark.parametrize("adapter, launches", [("attention", 3), ("transformer", 14)], indirect=["adapter"])
def test_the_launches_are_counted_residual_included(adapter, launches, features, device):
    with counted() as launched:
        fused(adapter.to(device), *features)
    assert len(launched) == launches, launched


@pytest.mark.parametrize("adapter", ["attention", "transformer"], indirect=True)
def test_the_fused_adapter_errs_no_more_than_the_module(adapter, dtype, features, device, no_worse):
    adapter = adapter.to(device)
    h_tgt, h_retr, lam, valid = features
    low = [x.to(dtype) for x in (h_tgt, h_retr)]
    adapter = adapter.to(dtype)
    eager = adapter(*low, lam, valid, impl="sdpa")
    out = fused(adapter, *low, lam, valid)
    adapter = adapter.double()
    exact = adapter(*(x.double() for x in low), lam.double(), valid, impl="reference")
    no_worse(out, exact, eager)
    # Also for g alone, without the residual that hides its error.
    no_worse((out.double() - low[0].double()).to(torch.float32), exact - low[0].double(), (eager - low[0]).float())


def test_the_transformer_kind_is_diffusers_block_without_its_outer_residual(features, device):
    block = Transformer2DModel(
        HEADS, CHANNELS // HEADS, CHANNELS, cross_attention_dim=CHANNELS, use_linear_projection=True
    )
    block = block.double().to(device).eval().requires_grad_(False)
    h_tgt, h_retr, lam, _ = (x.double() for x in features)
    weights = block.state_dict()
    to_k, to_v = (weights[f"transformer_blocks.0.attn2.to_{name}.weight"] for name in "kv")
    k, v = retrieved_kv(h_retr, to_k, to_v)
    out = transformer_adapter(h_tgt, k, v, lam, None, weights, heads=HEADS)
    image = h_tgt.transpose(1, 2).unflatten(2, (5, 4))
    g = block(image, encoder_hidden_states=h_retr.flatten(1, 2)).sample - image
    torch.testing.assert_close(out, h_tgt + lam[:, None, None] * g.flatten(2).transpose(1, 2))


@pytest.mark.slow
def test_the_36m_block_at_its_real_size(randn, device, no_worse):
    torch.manual_seed(1)
    adapter = HSpaceAdapter(1280, 20, "transformer").requires_grad_(False)
    torch.nn.init.normal_(adapter.proj_out.weight, std=1280**-0.5)
    adapter = adapter.to(device).half()
    h_tgt, h_retr, lam = randn(1, 64, 1280).half(), randn(1, 1, 64, 1280).half(), torch.tensor([0.7], device=device)
    eager = adapter(h_tgt, h_retr, lam, None, "sdpa")
    with counted() as launched:
        out = adapter(h_tgt, h_retr, lam, None, "triton")
    assert len(launched) == 14
    exact = adapter.double()(h_tgt.double(), h_retr.double(), lam.double(), None, "reference")
    no_worse(out - h_tgt, exact - h_tgt.double(), eager - h_tgt)


@pytest.mark.parametrize("adapter", ["attention", "transformer"], indirect=True)
def test_lambda_0_is_mode_none_bit_for_bit_and_a_neighbour_matters(adapter, features, device):
    adapter = adapter.to(device)
    h_tgt, h_retr, lam, valid = features
    for impl in ("triton", "reference"):
        # With no valid neighbour λ is 0 and h_retr may be uninitialised memory.
        nothing = fused(adapter, h_tgt, h_retr * torch.nan, torch.zeros_like(lam), torch.zeros_like(valid), impl)
        assert torch.equal(nothing, h_tgt)
        out = fused(adapter, h_tgt, h_retr, lam, valid, impl)
        other = h_retr.clone()
        other[0, 1] = 7
        assert torch.equal(fused(adapter, h_tgt, other, lam, valid, impl), out)
        other[0, 0] = h_retr[1, 0]
        changed = fused(adapter, h_tgt, other, lam, valid, impl)
        assert torch.equal(changed[1], out[1]) and (changed[0] - out[0]).abs().max() > 1e-4


def test_a_missing_weight_is_named(features):
    h_tgt, h_retr, lam, valid = features
    with pytest.raises(InvalidRequest, match="to_q.weight"):
        attention_adapter(h_tgt, h_retr, h_retr, lam, valid, {}, heads=HEADS)
