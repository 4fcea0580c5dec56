from __future__ import annotations

import pytest
from torch.nn import functional as F

from ragturbo.errors import InvalidRequest
from ragturbo.ops import layer_norm


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


def test_nonsense_is_refused_by_name(randn):
    with pytest.raises(InvalidRequest, match=r"\(7,\)"):
        layer_norm(randn(3, 8), randn(7), randn(8))
