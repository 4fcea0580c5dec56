"""The ops' native code for CPUs, against fp64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from ragturbo.errors import InvalidRequest
from ragturbo.ops import dispatch, geglu, group_norm, group_norm_and_sum, interleave

pytestmark = pytest.mark.skipif(not hasattr(dispatch.native(), "group_norm"), reason="ragturbo._native was not built")
STORED = [torch.float32, torch.bfloat16]
EVERY = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SEEDS = st.integers(0, 2**31 - 1)


def numbers(seed):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape, dtype=torch.float32: torch.randn(shape, generator=generator).to(dtype)


def normed(x, groups, weight, bias, silu, add_bias=None, eps=1e-5):
    x = x if add_bias is None else x + add_bias[:, None, None]
    out = F.group_norm(x, groups, weight, bias, eps)
    return F.silu(out) if silu else out


def gated(x, bias):
    value, gate = (x if bias is None else x + bias).chunk(2, dim=-1)
    return value * F.gelu(gate)


@EVERY
@given(data=st.data(), seed=SEEDS, dtype=st.sampled_from(STORED), batch=st.integers(1, 3), groups=st.integers(1, 9),
       width=st.integers(1, 20), h=st.integers(1, 24), w=st.integers(1, 24))  # fmt: skip
def test_group_norm_errs_no_more_than_torch(data, seed, dtype, batch, groups, width, h, w, no_worse):
    assume(h * w * width > 1)
    randn = numbers(seed)
    c, silu, with_bias = groups * width, data.draw(st.booleans()), data.draw(st.booleans())
    x = randn(batch, c, h, w, dtype=dtype) * data.draw(st.sampled_from([1.0, 30.0]))
    if data.draw(st.booleans()):
        x = x.contiguous(memory_format=torch.channels_last)
    # Weights of a model in another dtype than its activations.
    kind = data.draw(st.sampled_from(STORED))
    weight, bias = randn(c, dtype=kind), randn(c, dtype=kind)
    add_bias = randn(c, dtype=kind) if with_bias else None
    out = group_norm(x, groups, weight, bias, silu=silu, add_bias=add_bias, impl="native")
    cast = [None if v is None else v.to(dtype) for v in (weight, bias, add_bias)]
    double = [None if v is None else v.double() for v in (weight, bias, add_bias)]
    exact = normed(x.double(), groups, *double[:2], silu, double[2])
    no_worse(out, exact, normed(x, groups, *cast[:2], silu, cast[2]), terms=exact.norm() + double[0].norm())
    assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", STORED)
def test_a_mean_far_from_zero_does_not_cancel_the_variance(dtype, randn, no_worse):
    x = randn(1, 32, 40, 40, dtype=dtype) + 500
    weight, bias = randn(32), randn(32)
    exact = normed(x.double(), 8, weight.double(), bias.double(), True)
    out = group_norm(x, 8, weight, bias, silu=True, impl="native")
    no_worse(out, exact, normed(x, 8, weight.to(dtype), bias.to(dtype), True))


@pytest.mark.parametrize("dtype", STORED)
def test_threads_and_places_in_a_batch_do_not_change_bits(dtype, randn):
    x, weight, bias = randn(4, 64, 40, 40, dtype=dtype), randn(64), randn(64)
    threads = torch.get_num_threads()
    try:
        outs = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            outs.append(group_norm(x, 8, weight, bias, silu=True, impl="native"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(out, outs[0]) for out in outs)
    for i in range(4):
        assert torch.equal(group_norm(x[i : i + 1], 8, weight, bias, silu=True, impl="native")[0], outs[0][i])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_visible(value, randn):
    x, weight, bias = randn(2, 16, 20, 20), torch.ones(16), torch.zeros(16)
    x[0, 3, 5, 7] = value
    out = group_norm(x, 4, weight, bias, silu=True, impl="native")
    assert not out[0, :4].isfinite().any() and out[0, 4:].isfinite().all() and out[1].isfinite().all()
    rows = randn(3, 8)
    rows[1, 6] = value
    found, expected = geglu(rows, impl="native"), gated(rows, None)
    assert torch.equal(found.isnan(), expected.isnan()) and torch.equal(found.isinf(), expected.isinf())


@EVERY
@given(seed=SEEDS, dtype=st.sampled_from(STORED), rows=st.integers(1, 40), width=st.integers(1, 300),
       with_bias=st.booleans(), scale=st.sampled_from([1.0, 40.0]))  # fmt: skip
def test_geglu_errs_no_more_than_torch(seed, dtype, rows, width, with_bias, scale, no_worse):
    randn = numbers(seed)
    x = randn(rows, 2 * width, dtype=dtype) * scale
    bias = randn(2 * width) if with_bias else None
    exact = gated(x.double(), None if bias is None else bias.double())
    eager = gated(x, None if bias is None else bias.to(dtype))
    no_worse(geglu(x, bias, impl="native"), exact, eager, terms=exact.norm() + x.double().norm() / 8)
    strided = torch.cat([x, x], dim=1)[:, ::2]
    assert torch.equal(geglu(strided, impl="native"), geglu(strided.contiguous(), impl="native"))


@EVERY
@given(seed=SEEDS, dtype=st.sampled_from(STORED), batch=st.integers(1, 3), c=st.integers(1, 40),
       h=st.integers(1, 20), w=st.integers(1, 20))  # fmt: skip
def test_interleave_moves_every_bit(seed, dtype, batch, c, h, w):
    phases = numbers(seed)(batch, 4 * c, h + 1, w + 1, dtype=dtype)
    phases[0, 0, 0, 0] = float("nan")
    out = interleave(phases, impl="native")
    expected = interleave(phases, impl="reference")
    kind = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(out.view(kind), expected.contiguous(memory_format=torch.channels_last).view(kind))


def test_auto_takes_it_on_a_cpu_unless_somebody_has_to_see_torchs_operations(randn, monkeypatch):
    x, weight, bias = randn(1, 8, 4, 4), torch.ones(8), torch.zeros(8)
    calls = []
    real = dispatch.native()

    class Watched:
        def __getattr__(self, name):
            calls.append(name)
            return getattr(real, name)

    monkeypatch.setattr(dispatch, "native", Watched)

    def taken():
        calls.clear()
        group_norm(x, 2, weight, bias)
        return "group_norm" in [name for name in calls[1:]]

    assert taken()
    with FlopCounterMode(display=False):
        assert not taken()
    weight.requires_grad_()
    assert not taken()
    with torch.no_grad():
        assert taken()
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(x)
        assert group_norm(fake, 2, mode.from_tensor(bias), mode.from_tensor(bias)).shape == x.shape
    compiled = torch.compile(lambda x: group_norm(x, 2, bias, bias), fullgraph=True, backend="eager")
    assert torch.allclose(compiled(x), group_norm(x, 2, bias, bias, impl="reference"))


def test_what_it_cannot_do_is_refused_by_name_and_avoided_by_auto(randn):
    x, c = randn(1, 8, 4, 4), randn(8)
    with pytest.raises(InvalidRequest, match="without a residual"):
        group_norm(x, 2, c, c, add=x, impl="native")
    assert torch.equal(group_norm_and_sum(x, 2, c, c, add=x)[1], x + x)
    with pytest.raises(InvalidRequest, match=r"fp32 and bf16, not torch\.float16"):
        geglu(x.half(), impl="native")
    assert geglu(x.half()).dtype == torch.float16
    with pytest.raises(InvalidRequest, match="for CPUs"):
        dispatch.choose("geglu", "native", "cuda", torch.float32)


def test_a_forced_or_named_implementation_is_checked_before_memory_is_read(randn, monkeypatch):
    monkeypatch.setattr(dispatch, "FORCED", {"": "native"})
    monkeypatch.setenv("RAGTURBO_IMPL", "native")
    with pytest.raises(InvalidRequest, match=r"not torch\.float16"):
        geglu(randn(3, 8).half())
    with pytest.raises(InvalidRequest, match=r"add_bias is \(1,\)"):
        group_norm(randn(1, 8, 4, 4), 2, randn(8), randn(8), add_bias=torch.zeros(1))
    with FakeTensorMode() as mode, pytest.raises(InvalidRequest, match="not compiled, fake or watched"):
        geglu(mode.from_tensor(torch.zeros(2, 4)), impl="native")


def test_an_outlier_at_the_first_pixel_does_not_spoil_the_variance(randn, no_worse):
    x, weight, bias = 0.01 * randn(1, 16, 64, 64), randn(16), randn(16)
    x[0, :, 0, 0] = 100.0
    exact = normed(x.double(), 4, weight.double(), bias.double(), False)
    no_worse(group_norm(x, 4, weight, bias, impl="native"), exact, normed(x, 4, weight, bias, False))
