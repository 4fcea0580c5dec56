from __future__ import annotations

import pytest
import torch

from ragturbo.errors import InvalidRequest
from ragturbo.kernels.launch import counted
from ragturbo.ops import bias_residual


def composed(x, bias, residual):
    """In torch's order and in the storage type."""
    return residual + (x if bias is None else x + bias[:, None, None])


@pytest.mark.parametrize("shape", [(1, 8, 1, 1), (2, 24, 5, 7), (1, 33, 19, 4)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_one_pass_errs_no_more_than_torch(shape, with_bias, dtype, randn, no_worse):
    x, residual = randn(*shape, dtype=dtype), randn(*shape, dtype=dtype)
    bias = randn(shape[1], dtype=dtype) if with_bias else None
    exact = composed(x.double(), None if bias is None else bias.double(), residual.double())
    for images in ((x, residual), (x.contiguous(memory_format=torch.channels_last), residual.mT.contiguous().mT)):
        with counted() as launched:
            out = bias_residual(images[0], bias, images[1], impl="triton")
        assert launched == ["bias_residual"] and out.is_contiguous(memory_format=torch.channels_last)
        # The sums may cancel, so the tolerance follows the size of the terms.
        no_worse(out, exact, composed(x, bias, residual), terms=x.double().norm() + residual.double().norm())


def test_nonsense_is_refused_by_name(randn):
    x = randn(1, 8, 3, 3)
    with pytest.raises(InvalidRequest, match=r"\(7,\)"):
        bias_residual(x, randn(7), x)
    with pytest.raises(InvalidRequest, match=r"\(1, 8, 3, 2\)"):
        bias_residual(x, None, x[..., :2])
    with pytest.raises(InvalidRequest, match="no backward"):
        bias_residual(x.requires_grad_(), None, x, impl="triton")
