from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from ragturbo.errors import InvalidRequest
from ragturbo.ops import geglu


def composed(x, bias):
    value, gate = (x if bias is None else x + bias).chunk(2, dim=-1)
    return value * F.gelu(gate)


@pytest.mark.parametrize("shape", [(1, 2), (3, 5, 2 * 77), (2, 2 * 1100)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_kernel_errs_no_more_than_torch(shape, with_bias, dtype, randn, no_worse):
    x = randn(*shape, dtype=dtype)
    bias = randn(shape[-1], dtype=dtype) if with_bias else None
    exact = composed(x.double(), None if bias is None else bias.double())
    no_worse(geglu(x, bias, impl="triton"), exact, composed(x, bias))


def test_strided_rows_and_gates_far_out(randn, no_worse):
    for x in (40 * randn(6, 64)[:, :32], randn(32, 6).T):
        no_worse(geglu(x, impl="triton"), composed(x.double(), None), composed(x, None))


def test_nonsense_is_refused_by_name(randn):
    with pytest.raises(InvalidRequest, match=r"\(3, 7\)"):
        geglu(randn(3, 7))
    with pytest.raises(InvalidRequest, match=r"\(4,\)"):
        geglu(randn(3, 8), randn(4))
    assert torch.equal(geglu(torch.zeros(2, 4)), torch.zeros(2, 2))
