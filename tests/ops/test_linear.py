from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from ragturbo.errors import InvalidRequest
from ragturbo.kernels import counters, tiles
from ragturbo.kernels.launch import counted
from ragturbo.ops import linear


def composed(x, weights, bias=None, geglu=False, residual=None, lam=None):
    """In plain torch, in the storage type."""
    out = torch.cat([F.linear(x, w) for w in weights], dim=-1)
    out = out if bias is None else out + bias
    if geglu:
        value, gate = out.chunk(2, dim=-1)
        out = value * F.gelu(gate)
    if lam is not None:
        out = out * lam.to(out.dtype)[:, None, None]
    return out if residual is None else residual + out


def check(x, weights, no_worse, **options):
    double = {name: v.double() if isinstance(v, torch.Tensor) else v for name, v in options.items()}
    with counted() as launched:
        out = linear(x, weights, impl="triton", **options)
    assert launched == ["linear"]
    no_worse(out, composed(x.double(), [w.double() for w in weights], **double), composed(x, weights, **options))


AFTER = ("", "bias", "geglu", "residual", "lam", "three")
SHAPES = ((1, 1, 16, 33), (2, 19, 96, 40), (1, 33, 70, 65))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("after", AFTER)
def test_every_epilogue(shape, after, dtype, randn, device, no_worse):
    b, t, k, n = shape
    rows = 2 * n if after == "geglu" else n
    weights = [randn(rows, k, dtype=dtype) * k**-0.5 for _ in range(3 if after == "three" else 1)]
    options = {}
    if after in ("bias", "geglu", "lam"):
        options["bias"] = randn(rows, dtype=dtype)
    if after in ("residual", "lam"):
        options["residual"] = randn(b, t, n, dtype=dtype)
    if after == "lam":
        options["lam"] = torch.rand(b, device=device)
    check(randn(b, t, k, dtype=dtype) + 0.5, weights, no_worse, geglu=after == "geglu", **options)


def test_counters_are_left_at_zero_for_the_next_run_of_a_graph(randn, monkeypatch, device):
    kept = torch.zeros(64, dtype=torch.int32, device=device)
    monkeypatch.setattr(counters, "zeros", lambda n, device: kept[:n])
    x, weight = randn(1, 19, 96), randn(40, 96)
    with tiles.forced("linear", {"BK": 32, "BN": 16, "SPLITS": 3}):
        first, second = (linear(x, [weight], impl="triton") for _ in range(2))
    assert torch.equal(first, second) and not kept.any()
    # Poisoned: a wrong count would have left the output unwritten.
    assert first.isfinite().all()


def test_every_recording_has_counters_of_its_own(monkeypatch):
    capturing = False
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    device = torch.device("cuda", 0)
    memory = torch.zeros(counters.RECORDED, dtype=torch.int32)
    monkeypatch.setattr(counters, "_memory", {device: memory})
    monkeypatch.setattr(counters, "_used", {})
    made = []
    monkeypatch.setattr(torch, "zeros", lambda n, **options: made.append(n) or memory.new_zeros(n))
    assert counters.zeros(7, device).data_ptr() != memory.data_ptr() and made == [7]
    capturing = True
    first, second = counters.zeros(7, device), counters.zeros(9, device)
    assert first.data_ptr() == memory.data_ptr() and second.data_ptr() == memory[7:].data_ptr()
    # When they are used up, a recording zeroes new ones at each run.
    counters.zeros(counters.RECORDED - 16, device)
    counters.zeros(1, device)
    assert made == [7, 1]


@pytest.mark.parametrize("splits", [3, 8])
@pytest.mark.parametrize("after", ["residual", "three", "lam"])
def test_channels_shared_by_several_programs(splits, after, dtype, randn, device, no_worse):
    """Split-K in one launch. 96 channels in steps of 32 are 3 shares, or 8 of which 5 are empty."""
    x, weights = randn(2, 19, 96, dtype=dtype), [randn(40, 96, dtype=dtype) / 10 for _ in range(3)]
    options = {}
    if after != "three":
        weights = weights[:1]
        options |= {"bias": randn(40, dtype=dtype), "residual": randn(2, 19, 40, dtype=dtype)}
    if after == "lam":
        options["lam"] = torch.rand(2, device=device)
    with tiles.forced("linear", {"BM": 16, "BN": 16, "BK": 32, "SPLITS": splits}):
        check(x, weights, no_worse, **options)


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
    with pytest.raises(InvalidRequest, match="no backward"):
        linear(x, [w.requires_grad_()], impl="triton")
