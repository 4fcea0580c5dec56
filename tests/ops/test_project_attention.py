from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from ragturbo.errors import InvalidRequest
from ragturbo.kernels.launch import counted
from ragturbo.ops import Norm, project_attention
from ragturbo.ops.cross_attention import sdpa


def composed(x, to_q, k, v, valid, heads, norm):
    """LayerNorm, a linear layer and SDPA, in the storage type."""
    if norm is not None:
        x = F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)
    return sdpa(F.linear(x, to_q), k, v, valid, heads)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(
    "t, width, n, s, heads, d", [(1, 16, 1, 1, 1, 16), (19, 70, 3, 21, 3, 20), (35, 32, 1, 5, 1, 64)]
)
def test_one_launch_errs_no_more_than_torch(t, width, n, s, heads, d, normed, dtype, randn, device, no_worse):
    c = heads * d
    x, to_q = randn(2, t, width, dtype=dtype) + 0.5, randn(c, width, dtype=dtype) * width**-0.5
    k, v = (randn(2, n, s, 2 * c, dtype=dtype)).chunk(2, dim=-1)
    norm = Norm(randn(width, dtype=dtype), randn(width, dtype=dtype)) if normed else None
    valid = torch.ones(2, n, dtype=torch.bool, device=device)
    valid[1, :1] = n == 1
    with counted() as launched:
        out = project_attention(x, to_q, k, v, valid, heads=heads, norm=norm, impl="triton")
    assert launched == ["project_cross_attention"]
    wide = None if norm is None else Norm(norm.weight.double(), norm.bias.double())
    exact = composed(x.double(), to_q.double(), k.double(), v.double(), valid, heads, wide)
    no_worse(out, exact, composed(x, to_q, k, v, valid, heads, norm))


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
    with pytest.raises(InvalidRequest, match="groups=4"):
        project_attention(x, to_q, k, k, heads=2, norm=Norm(x[0, 0], x[0, 0], 1e-5, 4))
    with pytest.raises(InvalidRequest, match="5 heads"):
        project_attention(x, to_q, k, k, heads=5)
