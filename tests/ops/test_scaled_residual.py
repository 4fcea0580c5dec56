from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ragturbo.errors import InvalidRequest
from ragturbo.ops import scaled_residual
from ragturbo.ops.scaled_residual import reference


def composed(h, delta, lam):
    """In plain torch, in the storage type."""
    return h + lam.to(h.dtype).reshape(-1, *[1] * (h.ndim - 1)) * delta


@pytest.mark.parametrize("shape", [(1, 1), (2, 5, 123), (3, 40, 7, 3)])
def test_the_kernel_errs_no_more_than_torch(shape, dtype, randn, device, no_worse):
    h, delta = randn(*shape, dtype=dtype), randn(*shape, dtype=dtype)
    lam = torch.linspace(0.2, 1, shape[0], device=device)
    exact = reference(h.double(), delta.double(), lam.double())
    no_worse(scaled_residual(h, delta, lam, impl="triton"), exact, composed(h, delta, lam))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.lists(st.integers(1, 12), min_size=2, max_size=4),
    order=st.permutations(range(4)),
    inplace=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_shape_and_memory_order(shape, order, inplace, seed, device, no_worse):
    generator = torch.Generator().manual_seed(seed)
    dims = [d for d in order if d < len(shape)]
    memory = torch.randn([shape[d] for d in dims], generator=generator).to(device)
    h = memory.permute([dims.index(d) for d in range(len(shape))])
    delta = torch.randn(shape, generator=generator).to(device)
    lam = torch.rand(shape[0], generator=generator).to(device)
    exact, eager, before = reference(h.double(), delta.double(), lam.double()), composed(h, delta, lam), h.clone()
    out = scaled_residual(h, delta, lam, impl="triton", inplace=inplace)
    no_worse(out, exact, eager)
    assert (out is h) == inplace
    assert inplace or torch.equal(h, before)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_lambda_0_keeps_every_bit_whatever_delta_holds(impl, dtype, randn, device):
    h = randn(2, 3, 8, dtype=dtype)
    h[:, 0, :2] = torch.tensor([-0.0, 0.0])
    delta = torch.full_like(h, torch.nan)
    delta[1] = 1
    out = scaled_residual(h, delta, torch.tensor([0.0, 0.5], device=device), impl=impl)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(out[0].view(bits), h[0].view(bits))
    assert torch.equal(out[1], (h[1].float() + 0.5).to(dtype))


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("inplace", [False, True])
def test_channels_last_stays_channels_last(impl, inplace, randn, device):
    h = randn(2, 12, 4, 5).contiguous(memory_format=torch.channels_last)
    delta, lam = randn(2, 12, 4, 5), torch.tensor([0.3, 1.0], device=device)
    expected = composed(h, delta, lam)
    out = scaled_residual(h, delta, lam, impl=impl, inplace=inplace)
    torch.testing.assert_close(out, expected)
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_the_kernels_gradients_are_the_references(dtype, randn, device, no_worse):
    h, delta, g = (randn(2, 5, 43, dtype=dtype) for _ in range(3))
    lam = torch.tensor([0.0, 0.8], device=device)
    found, eager = (
        torch.autograd.grad(scaled_residual(*leaves, impl=impl), leaves, g)
        for impl in ("triton", "reference")
        for leaves in [[x.clone().requires_grad_() for x in (h, delta, lam)]]
    )
    leaves = [x.double().requires_grad_() for x in (h, delta, lam)]
    exact = torch.autograd.grad(reference(*leaves), leaves, g.double())
    # λ's gradient is an inner product.
    terms = (None, None, g.double().norm() * delta.double().norm())
    for a, b, c, size in zip(found, exact, eager, terms, strict=True):
        no_worse(a, b, c, terms=size)


def test_in_place_also_under_autograd(randn, device):
    h, delta = randn(2, 3, 8), randn(2, 3, 8).requires_grad_()
    for impl in ("triton", "reference"):
        target = h.clone()
        out = scaled_residual(target, delta, 0.5, impl=impl, inplace=True)
        (d_delta,) = torch.autograd.grad(out.sum(), delta)
        assert out is target and torch.equal(d_delta, torch.full_like(delta, 0.5))


def test_the_reference_passes_gradcheck():
    h, delta = (torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    lam = torch.tensor([0.3, 0.8], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(scaled_residual, (h, delta, lam))


def test_nonsense_is_refused_by_name(randn, device):
    h = randn(2, 4, 8)
    with pytest.raises(InvalidRequest, match=r"\(2, 4, 8\).*\(2, 4, 9\)"):
        scaled_residual(h, randn(2, 4, 9), 0.5)
    with pytest.raises(InvalidRequest, match=r"\(3,\)"):
        scaled_residual(h, h, torch.ones(3, device=device))
