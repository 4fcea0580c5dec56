from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from ragturbo.errors import InvalidRequest
from ragturbo.kernels import tiles
from ragturbo.kernels.launch import counted
from ragturbo.ops import group_norm, group_norm_and_sum

TWO = {"ONE_LAUNCH": 1, "BR": 8, "SPLITS": 4}
THREE = {**TWO, "TWO_LAUNCHES": 1}
FORMS = [{}, TWO, THREE]


def composed(x, groups, weight, bias, eps=1e-5, silu=False, add=None, add_bias=None):
    """As in diffusers, in the storage type."""
    x = x if add_bias is None else x + add_bias[:, None, None]
    x = x if add is None else x + add
    out = F.group_norm(x, groups, weight, bias, eps)
    return (F.silu(out) if silu else out), x


def double(options):
    return {name: x.double() if isinstance(x, torch.Tensor) else x for name, x in options.items()}


@pytest.mark.parametrize("tile, launches", [({}, 1), (TWO, 2), (THREE, 3)])
@pytest.mark.parametrize("extra", ["", "silu", "add", "bias", "all"])
@pytest.mark.parametrize(
    "shape, groups", [((2, 60, 5, 7), 6), ((1, 64, 6, 9), 32), ((1, 64, 8, 16), 16), ((1, 160, 3, 4), 2)]
)
def test_every_form_errs_no_more_than_torch(shape, groups, extra, tile, launches, randn, no_worse):
    # One dtype per combination: the arithmetic is fp32 for all of them.
    dtype = (torch.float32, torch.float16, torch.bfloat16)[(shape[1] // 4 + len(extra) + launches) % 3]
    c = shape[1]
    x, weight, bias = randn(*shape, dtype=dtype) + 1, randn(c, dtype=dtype), randn(c, dtype=dtype)
    options = {"silu": extra in ("silu", "all")}
    if extra in ("add", "all"):
        options["add"] = randn(*shape, dtype=dtype)
    if extra in ("bias", "all"):
        options["add_bias"] = randn(c, dtype=dtype)
    with tiles.forced("group_norm", tile), counted() as launched:
        out = group_norm(x, groups, weight, bias, impl="triton", **options)
    assert len(launched) == launches
    exact, exact_sum = composed(x.double(), groups, weight.double(), bias.double(), **double(options))
    eager, eager_sum = composed(x, groups, weight, bias, **options)
    no_worse(out, exact, eager)
    assert out.is_contiguous(memory_format=torch.channels_last)
    if "add" in options:
        with tiles.forced("group_norm", tile):
            again, total = group_norm_and_sum(x, groups, weight, bias, impl="triton", **options)
        assert torch.equal(again, out)
        no_worse(total, exact_sum, eager_sum)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.integers(1, 2), groups=st.integers(1, 12), width=st.integers(1, 24), h=st.integers(1, 8),
    w=st.integers(1, 8), form=st.sampled_from(FORMS), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_any_shape(batch, groups, width, h, w, form, seed, device, no_worse):
    # One number has no variance; with very few outputs all may cancel, and a relative error means nothing.
    assume(h * w * width >= 2 and batch * groups * width * h * w >= 32)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, groups * width, h, w, generator=generator).to(device)
    weight, bias = (torch.randn(groups * width, generator=generator).to(device) for _ in range(2))
    with tiles.forced("group_norm", form):
        out = group_norm(x, groups, weight, bias, 1e-3, silu=True, impl="triton")
    exact, _ = composed(x.double(), groups, weight.double(), bias.double(), 1e-3, True)
    no_worse(out, exact, composed(x, groups, weight, bias, 1e-3, True)[0])


@pytest.mark.parametrize("tile", FORMS)
def test_a_mean_a_thousand_times_the_deviation_does_not_cancel(tile, randn, no_worse):
    x, weight, bias = randn(1, 32, 8, 9) + 1000, randn(32), randn(32)
    with tiles.forced("group_norm", tile):
        out = group_norm(x, 4, weight, bias, impl="triton")
    exact, _ = composed(x.double(), 4, weight.double(), bias.double())
    # The mean is rounded at its own size, in torch too. E[x²] - E[x]² would be off by a tenth of the deviation, a
    # thousand times more.
    no_worse(out, exact, composed(x, 4, weight, bias)[0], terms=1000 * exact.norm())


@pytest.mark.parametrize("tile", FORMS)
@pytest.mark.parametrize("outlier", [100.0, 10_000.0])
def test_first_rows_unlike_the_others_cost_no_accuracy(outlier, tile, randn, no_worse):
    x, weight, bias = randn(1, 32, 16, 16), randn(32), randn(32)
    x[:, :, 0, :2] += outlier
    with tiles.forced("group_norm", tile):
        out = group_norm(x, 4, weight, bias, impl="triton")
    exact, _ = composed(x.double(), 4, weight.double(), bias.double())
    no_worse(out, exact, composed(x, 4, weight, bias)[0])


def test_every_memory_order_gives_the_same_bits(randn):
    x, weight, bias = randn(2, 24, 5, 6), randn(24), randn(24)
    out = group_norm(x, 4, weight, bias, silu=True, impl="triton")
    for view in (x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)):
        assert torch.equal(group_norm(view, 4, weight, bias, silu=True, impl="triton"), out)


def test_nonsense_is_refused_by_name(randn):
    x, weight = randn(1, 24, 5, 6), randn(24)
    with pytest.raises(InvalidRequest, match="5 groups"):
        group_norm(x, 5, weight, weight)
    with pytest.raises(InvalidRequest, match=r"\(1, 24, 5, 5\)"):
        group_norm(x, 4, weight, weight, add=x[..., :5])
