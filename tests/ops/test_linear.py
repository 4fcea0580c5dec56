from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from ragturbo.errors import InvalidRequest
from ragturbo.kernels import tiles
from ragturbo.kernels.launch import counted
from ragturbo.ops import Norm, linear


def composed(x, weights, bias, norm, geglu, residual, lam):
    """As one would write it, in the storage type."""
    if norm is not None and norm.groups:
        x = F.group_norm(x.transpose(1, 2), norm.groups, norm.weight, norm.bias, norm.eps).transpose(1, 2)
    elif norm is not None:
        x = F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)
    out = torch.cat([F.linear(x, w) for w in weights], dim=-1)
    out = out if bias is None else out + bias
    if geglu:
        value, gate = out.chunk(2, dim=-1)
        out = value * F.gelu(gate)
    if lam is not None:
        out = out * lam.to(out.dtype)[:, None, None]
    return out if residual is None else residual + out


def check(x, weights, no_worse, mean=0, **options):
    arguments = {"bias": None, "norm": None, "geglu": False, "residual": None, "lam": None, **options}
    double = {
        name: Norm(v.weight.double(), v.bias.double(), v.eps, v.groups) if isinstance(v, Norm)
        else v.double() if isinstance(v, torch.Tensor) else v
        for name, v in arguments.items()
    }  # fmt: skip
    exact = composed(x.double(), [w.double() for w in weights], **double)
    with counted() as launched:
        out = linear(x, weights, impl="triton", **arguments)
    assert launched == ["linear"]
    # A mean is known to half its last place, in torch too: what that is depends on luck, its size does not.
    no_worse(out, exact, composed(x, weights, **arguments), terms=mean * exact.norm() if mean else None)


NORMS = ("", "layer", "group")
AFTER = ("", "bias", "geglu", "residual", "lam", "three")
SHAPES = ((1, 1, 16, 33), (2, 19, 96, 40), (1, 33, 70, 65))
# Each shape, norm and epilogue meets every type, though not in every combination.
EVERY = [
    (shape, norm, after, (torch.float32, torch.float16, torch.bfloat16)[(i + j + m) % 3])
    for i, shape in enumerate(SHAPES)
    for j, norm in enumerate(NORMS)
    for m, after in enumerate(AFTER)
]


@pytest.mark.parametrize("shape, norm, after, dtype", EVERY)
def test_every_prologue_with_every_epilogue(shape, norm, after, dtype, randn, device, no_worse):
    b, t, k, n = shape
    x = randn(b, t, k, dtype=dtype) + 0.5
    rows = 2 * n if after == "geglu" else n
    weights = [randn(rows, k, dtype=dtype) * k**-0.5 for _ in range(3 if after == "three" else 1)]
    options = {}
    if norm:
        # Eight numbers a group at least: of two that are nearly equal, 1/σ amplifies whatever the mean was rounded by.
        groups = 0 if norm == "layer" else min(8, t * k // 8) if k % 8 == 0 else 7
        options["norm"] = Norm(randn(k, dtype=dtype), randn(k, dtype=dtype), 1e-5, groups)
    if after in ("bias", "geglu", "lam"):
        options["bias"] = randn(rows, dtype=dtype)
    if after in ("residual", "lam"):
        options["residual"] = randn(b, t, n, dtype=dtype)
    if after == "lam":
        options["lam"] = torch.rand(b, device=device)
    check(x, weights, no_worse, geglu=after == "geglu", **options)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.integers(1, 3), tokens=st.integers(1, 50), groups=st.integers(1, 9), width=st.integers(1, 20),
    n=st.integers(1, 40), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_any_shape_behind_a_group_norm(batch, tokens, groups, width, n, seed, device, no_worse):
    # A variance of one number is none; and of a few outputs each may cancel, which no relative error forgives.
    assume(tokens * width >= 2 and batch * tokens * n >= 32)
    generator = torch.Generator().manual_seed(seed)
    k = groups * width
    x, w, scale, shift = (
        torch.randn(shape, generator=generator).to(device) for shape in ((batch, tokens, k), (n, k), (k,), (k,))
    )
    check(x, [w], no_worse, norm=Norm(scale, shift, 1e-3, groups))


@pytest.mark.parametrize("splits", [3, 8])
@pytest.mark.parametrize("norm, after", [("", "residual"), ("layer", "three"), ("group", "lam")])
def test_channels_shared_by_several_programs(splits, norm, after, dtype, randn, device, no_worse):
    """Split-K: the same launch. 96 channels in steps of 32 are 3 shares, or 8 of which 5 are empty."""
    x, weights = randn(2, 19, 96, dtype=dtype), [randn(40, 96, dtype=dtype) / 10 for _ in range(3)]
    options = {}
    if norm:
        options["norm"] = Norm(randn(96, dtype=dtype), randn(96, dtype=dtype), 1e-5, 8 if norm == "group" else 0)
    if after != "three":
        weights = weights[:1]
        options |= {"bias": randn(40, dtype=dtype), "residual": randn(2, 19, 40, dtype=dtype)}
    if after == "lam":
        options["lam"] = torch.rand(2, device=device)
    with tiles.forced("linear", {"BM": 16, "BN": 16, "BK": 32, "SPLITS": splits}):
        check(x, weights, no_worse, **options)


def test_many_rows_and_a_large_mean(randn, no_worse):
    """Welford's reason: a mean of 300 with a deviation of 1, in fp32 and across several row tiles of one sample."""
    x, w = randn(2, 80, 64) + 300, randn(24, 64)
    scale, shift = randn(64), randn(64)
    for groups in (0, 4):
        check(x, [w], no_worse, mean=300, norm=Norm(scale, shift, 1e-5, groups))


def test_lambda_0_keeps_the_residuals_bits(randn, device):
    x, w, residual = randn(2, 5, 32), randn(16, 32), randn(2, 5, 16)
    x[0], residual[0, 0, 0] = torch.nan, -0.0
    for impl in ("triton", "reference"):
        out = linear(x, [w], residual=residual, lam=torch.tensor([0.0, 1.0], device=device), impl=impl)
        assert torch.equal(out[0].view(torch.int32), residual[0].view(torch.int32))


def test_views_with_strides(randn, no_worse):
    x = randn(2, 32, 11).transpose(1, 2)
    check(x, [randn(32, 24).T], no_worse, residual=randn(11, 2, 24).transpose(0, 1))


def test_nonsense_is_refused_by_name(randn):
    x, w = randn(2, 5, 32), randn(16, 32)
    with pytest.raises(InvalidRequest, match=r"\(16, 31\)"):
        linear(x, [w[:, 1:]])
    with pytest.raises(InvalidRequest, match="single weight"):
        linear(x, [w, w], geglu=True)
    with pytest.raises(InvalidRequest, match="residual"):
        linear(x, [w], lam=torch.ones(2))
    with pytest.raises(InvalidRequest, match="5 groups"):
        linear(x, [w], norm=Norm(x[0, 0], x[0, 0], 1e-5, 5))
    with pytest.raises(InvalidRequest, match="no backward"):
        linear(x, [w.requires_grad_()], impl="triton")
