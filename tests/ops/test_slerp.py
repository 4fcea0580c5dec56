from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from ragturbo.errors import InvalidRequest
from ragturbo.kernels import tiles
from ragturbo.kernels.launch import counted
from ragturbo.ops import slerp
from ragturbo.ops.slerp import ANTIPODAL, PARALLEL, reference

SHAPES = [(1, 1, 1), (2, 5, 123), (3, 17, 40)]


def exact(t, r, w, per):
    return reference(t.double(), r.double(), w.double(), per)


@pytest.mark.parametrize("per", ["sample", "token"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_errs_no_more_than_torch(shape, per, dtype, randn, device, no_worse):
    t, r = randn(*shape, dtype=dtype), randn(*shape, dtype=dtype)
    w = torch.linspace(0.1, 0.9, shape[0], device=device)
    out = slerp(t, r, w, per=per, impl="triton")
    no_worse(out, exact(t, r, w, per), slerp(t, r, w, per=per, impl="reference"))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.integers(1, 3), tokens=st.integers(1, 9), channels=st.integers(1, 70), w=st.floats(0, 1),
    per=st.sampled_from(["sample", "token"]), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_any_shape_and_weight(batch, tokens, channels, w, per, seed, device, no_worse):
    # With very few outputs all may cancel, and a relative error means nothing.
    assume(batch * tokens * channels >= 32)
    generator = torch.Generator().manual_seed(seed)
    t, r = (torch.randn(batch, tokens, channels, generator=generator).to(device) for _ in range(2))
    cos = torch.nn.functional.cosine_similarity(*((x.flatten(1) if per == "sample" else x) for x in (t, r)), dim=-1)
    # Near opposite vectors the rounding of cos Ω is amplified; at the thresholds it may decide between slerp and lerp.
    assume(cos.min() > -0.99 and (cos - 1 + PARALLEL).abs().min() > 1e-7)
    weight = torch.full((batch,), w, device=device)
    out = slerp(t, r, weight, per=per, impl="triton")
    no_worse(out, exact(t, r, weight, per), slerp(t, r, weight, per=per, impl="reference"))


def test_a_long_row_takes_two_launches_and_gives_the_same(randn, device, no_worse):
    t, r = randn(2, 9, 67), randn(2, 9, 67)
    w = torch.tensor([0.3, 0.8], device=device)
    with tiles.forced("slerp", {"ONE_PASS": 64, "BLOCK": 128}), counted() as launched:
        out = slerp(t, r, w, impl="triton")
    assert launched == ["slerp_sums", "slerp_blend"]
    no_worse(out, exact(t, r, w, "sample"), slerp(t, r, w, impl="reference"))


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_w_1_gives_the_target_and_w_0_the_retrieved_feature_to_the_bit(impl, dtype, randn):
    t, r = randn(2, 6, 40, dtype=dtype), randn(2, 6, 40, dtype=dtype)
    assert torch.equal(slerp(t, r, 1.0, impl=impl), t)
    assert torch.equal(slerp(t, r, 0.0, impl=impl), r)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_the_blend_of_orthogonal_unit_vectors_stays_on_the_sphere(impl, device):
    t, r = torch.eye(2, device=device)[:, None, :].split(1)
    out = slerp(t, r, 0.25, impl=impl).flatten()
    angle = 0.75 * math.pi / 2
    torch.testing.assert_close(out.cpu(), torch.tensor([math.cos(angle), math.sin(angle)]))


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("per", ["sample", "token"])
def test_where_the_angle_is_useless_the_blend_is_linear(impl, per, randn):
    t = randn(2, 3, 32)
    for r in (t.clone(), 2 * t, -t, torch.zeros_like(t)):
        out = slerp(t, r, 0.3, per=per, impl=impl)
        torch.testing.assert_close(out, 0.3 * t + 0.7 * r, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(slerp(torch.zeros_like(t), t, 0.3, per=per, impl=impl), 0.7 * t)


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("per", ["sample", "token"])
def test_a_squared_norm_below_the_normal_numbers_counts_as_zero(impl, per, device):
    # 1e-21 squared is 1e-42, subnormal in fp32: ten bits are left, or 0 if subnormals are flushed.
    t, r = (torch.eye(2, device=device)[:, None, :] * 1e-21).split(1)
    for target, retrieved in ((t, r), (t, r * 1e21), (t * 1e21, r)):
        target, retrieved = target.clone().requires_grad_(), retrieved.clone().requires_grad_()
        out = slerp(target, retrieved, 0.3, per=per, impl=impl)
        torch.testing.assert_close(out, 0.3 * target + 0.7 * retrieved, rtol=1e-6, atol=0)
        d_t, d_r = torch.autograd.grad(out.sum(), (target, retrieved))
        torch.testing.assert_close(d_t, torch.full_like(t, 0.3))
        torch.testing.assert_close(d_r, torch.full_like(r, 0.7))


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_a_nan_reaches_its_own_sample_and_no_other(impl, randn):
    t, r = randn(3, 4, 20), randn(3, 4, 20)
    r[1, 2, 3] = torch.nan
    out = slerp(t, r, 0.5, impl=impl)
    assert out[1].isnan().all() and out[[0, 2]].isfinite().all()
    out = slerp(t, r, 0.5, per="token", impl=impl)
    assert out[1, 2].isnan().all() and out.isnan().sum() == 20


def test_views_of_channels_last_and_of_channels_first_images(randn, device, no_worse):
    w = torch.tensor([0.3, 0.8], device=device)
    for layout in (torch.channels_last, torch.contiguous_format):
        t, r = (randn(2, 24, 3, 5).contiguous(memory_format=layout).flatten(2).transpose(1, 2) for _ in range(2))
        out = slerp(t, r, w, impl="triton")
        no_worse(out, exact(t, r, w, "sample"), slerp(t, r, w, impl="reference"))


@pytest.mark.parametrize("per", ["sample", "token"])
@pytest.mark.parametrize("long_rows", [False, True])
def test_the_kernels_gradients_are_the_references(per, long_rows, dtype, randn, device, no_worse):
    t, r = (randn(2, 5, 43, dtype=dtype).requires_grad_() for _ in range(2))
    w = torch.tensor([0.3, 0.8], device=device, requires_grad=True)
    g = randn(2, 5, 43, dtype=dtype)
    with tiles.forced("slerp", {"ONE_PASS": 1, "BLOCK": 64} if long_rows and per == "sample" else {}):
        found = torch.autograd.grad(slerp(t, r, w, per=per, impl="triton"), (t, r, w), g)
    eager = torch.autograd.grad(slerp(t, r, w, per=per, impl="reference"), (t, r, w), g)
    inputs = [x.detach().double().requires_grad_() for x in (t, r, w)]
    true = torch.autograd.grad(reference(*inputs, per), inputs, g.double())
    # w's gradient is the difference of two inner products with g.
    terms = (None, None, g.double().norm() * (t.double().norm() + r.double().norm()))
    for a, b, c, size in zip(found, true, eager, terms, strict=True):
        no_worse(a, b, c, terms=size)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_gradients_at_the_guards_are_those_of_the_straight_line(impl, randn):
    t = randn(1, 3, 8)
    for other in (t.clone(), -t, torch.zeros_like(t)):
        target, retrieved = t.clone().requires_grad_(), other.requires_grad_()
        d_t, d_r = torch.autograd.grad(slerp(target, retrieved, 0.3, impl=impl).sum(), (target, retrieved))
        torch.testing.assert_close(d_t, torch.full_like(t, 0.3))
        torch.testing.assert_close(d_r, torch.full_like(t, 0.7))


@pytest.mark.parametrize("per", ["sample", "token"])
def test_the_reference_passes_gradcheck(per):
    generator = torch.Generator().manual_seed(0)
    t, r = (torch.randn(2, 3, 5, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2))
    w = torch.tensor([0.3, 0.8], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *args: slerp(*args, per=per), (t, r, w))


def test_nonsense_is_refused_by_name(randn):
    h = randn(2, 4, 8)
    with pytest.raises(InvalidRequest, match=r"\(2, 4, 8\).*\(2, 5, 8\)"):
        slerp(h, randn(2, 5, 8), 0.5)
    with pytest.raises(InvalidRequest, match="1.5"):
        slerp(h, h, 1.5)
    with pytest.raises(InvalidRequest, match="channel"):
        slerp(h, h, 0.5, per="channel")
    with pytest.raises(InvalidRequest, match="float16"):
        slerp(h, h.half(), 0.5)
    assert 0 < PARALLEL < ANTIPODAL < 1e-2
