from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from ragturbo.errors import InvalidRequest
from ragturbo.kernels.launch import counted
from ragturbo.ops import project_attention
from ragturbo.ops.cross_attention import sdpa


def composed(x, to_q, k, v, valid, heads):
    """A linear layer and SDPA, in the storage type."""
    return sdpa(F.linear(x, to_q), k, v, valid, heads)


@pytest.mark.parametrize(
    "t, width, n, s, heads, d", [(1, 16, 1, 1, 1, 16), (19, 70, 3, 21, 3, 20), (35, 32, 1, 5, 1, 64)]
)
def test_one_launch_errs_no_more_than_torch(t, width, n, s, heads, d, dtype, randn, device, no_worse):
    c = heads * d
    x, to_q = randn(2, t, width, dtype=dtype) + 0.5, randn(c, width, dtype=dtype) * width**-0.5
    k, v = (randn(2, n, s, 2 * c, dtype=dtype)).chunk(2, dim=-1)
    valid = torch.ones(2, n, dtype=torch.bool, device=device)
    valid[1, :1] = n == 1
    for mask in (None, valid):
        with counted() as launched:
            out = project_attention(x, to_q, k, v, mask, heads=heads, impl="triton")
        assert launched == ["project_cross_attention"]
        exact = composed(x.double(), to_q.double(), k.double(), v.double(), mask, heads)
        no_worse(out, exact, composed(x, to_q, k, v, mask, heads))


def test_nothing_valid_gives_zeros(randn, device):
    x, to_q, k = randn(2, 5, 16), randn(32, 16), randn(2, 3, 7, 32)
    k[1] = torch.nan
    valid = torch.tensor([[True] * 3, [False] * 3], device=device)
    for impl in ("triton", "reference"):
        out = project_attention(x, to_q, k, k, valid, heads=2, impl=impl)
        assert (out[1] == 0).all() and out[0].isfinite().all()


def test_nonsense_is_refused_by_name(randn):
    x, to_q, k = randn(2, 5, 16), randn(32, 16), randn(2, 3, 7, 32)
    with pytest.raises(InvalidRequest, match=r"\(32, 15\)"):
        project_attention(x, to_q[:, 1:], k, k, heads=2)
    with pytest.raises(InvalidRequest, match="5 heads"):
        project_attention(x, to_q, k, k, heads=5)
