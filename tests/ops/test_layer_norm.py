from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from ragturbo.errors import InvalidRequest
from ragturbo.kernels.launch import counted
from ragturbo.ops import layer_norm, layer_norm_and_sum


@pytest.mark.parametrize("shape", [(1, 1, 2), (5, 123), (2, 19, 96), (3, 1300)])
def test_the_kernel_errs_no_more_than_torch(shape, dtype, randn, no_worse):
    n = shape[-1]
    x, weight, bias = randn(*shape, dtype=dtype) + 2, randn(n, dtype=dtype), randn(n, dtype=dtype)
    out = layer_norm(x, weight, bias, 1e-3, impl="triton")
    exact = F.layer_norm(x.double(), (n,), weight.double(), bias.double(), 1e-3)
    no_worse(out, exact, F.layer_norm(x, (n,), weight, bias, 1e-3))


def test_strided_rows_and_a_large_mean(randn, no_worse):
    weight, bias = randn(40), randn(40)
    for x in (randn(7, 80)[:, :40] + 1000, randn(40, 9).T, randn(2, 40, 3).transpose(1, 2)):
        exact = F.layer_norm(x.double(), (40,), weight.double(), bias.double())
        no_worse(layer_norm(x, weight, bias, impl="triton"), exact, F.layer_norm(x, (40,), weight, bias))


def with_sum(x, weight, bias, add, add_bias):
    """As in diffusers, in the type of x."""
    total = (x if add_bias is None else x + add_bias) + add
    return F.layer_norm(total, total.shape[-1:], weight, bias), total


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 2), (5, 123), (2, 19, 96), (3, 1300)])
def test_the_sum_is_added_in_the_same_launch(shape, biased, dtype, randn, no_worse):
    n = shape[-1]
    x, add, weight, bias = randn(*shape, dtype=dtype) + 2, randn(*shape, dtype=dtype), *randn(2, n, dtype=dtype)
    add_bias = randn(n, dtype=dtype) if biased else None
    with counted() as launched:
        out, total = layer_norm_and_sum(x, weight, bias, add=add, add_bias=add_bias, impl="triton")
    assert launched == ["layer_norm"]
    inputs = x, weight, bias, add, add_bias
    exact, exact_sum = with_sum(*(None if t is None else t.double() for t in inputs))
    eager, eager_sum = with_sum(*inputs)
    no_worse(out, exact, eager)
    no_worse(total, exact_sum, eager_sum)
    # What is normalised is the stored sum, so that a fused block gives the bits of separate launches.
    assert torch.equal(out, layer_norm(total, weight, bias, impl="triton"))
    references = layer_norm_and_sum(x, weight, bias, add=add, add_bias=add_bias, impl="reference")
    assert torch.equal(references[1], total)


def test_the_sum_of_strided_rows(randn):
    weight, bias, add_bias = randn(40), randn(40), randn(80)[::2]
    for x in (randn(7, 80)[:, :40], randn(40, 7).T):
        for add in (randn(7, 120)[:, 80:], randn(40, 7).T, randn(1, 40).expand(7, 40)):
            found = layer_norm_and_sum(x, weight, bias, add=add, add_bias=add_bias, impl="triton")
            for a, b in zip(found, layer_norm_and_sum(x, weight, bias, add=add, add_bias=add_bias), strict=True):
                assert a.is_contiguous()
                torch.testing.assert_close(a, b)


def test_nonsense_is_refused_by_name(randn):
    with pytest.raises(InvalidRequest, match=r"\(7,\)"):
        layer_norm(randn(3, 8), randn(7), randn(8))
    with pytest.raises(InvalidRequest, match=r"\(3, 7\)"):
        layer_norm_and_sum(randn(3, 8), randn(8), randn(8), add=randn(3, 7))
    with pytest.raises(InvalidRequest, match=r"add_bias is \(7,\)"):
        layer_norm_and_sum(randn(3, 8), randn(8), randn(8), add=randn(3, 8), add_bias=randn(7))
