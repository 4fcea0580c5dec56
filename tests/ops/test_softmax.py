from __future__ import annotations

import pytest
import torch

from ragturbo.errors import InvalidRequest
from ragturbo.kernels.launch import counted
from ragturbo.ops import softmax


@pytest.mark.parametrize("shape", [(1, 1), (3, 5, 77), (2, 130), (1, 2, 4096)])
@pytest.mark.parametrize("scale", [1.0, 512**-0.5])
def test_one_pass_errs_no_more_than_torch(shape, scale, dtype, randn, no_worse):
    scores = randn(*shape) * 5 / scale
    with counted() as launched:
        out = softmax(scores, scale, dtype, impl="triton")
    assert launched == ["softmax"] and out.dtype == dtype
    exact = (scores.double() * scale).softmax(-1)
    no_worse(out, exact, (scores * scale).softmax(-1).to(dtype))


def test_scores_of_any_size_do_not_overflow_and_nan_stays(randn):
    scores = randn(4, 33) * 1e30
    out = softmax(scores, 3.0, torch.float32, impl="triton")
    assert torch.equal(out, (scores.double() * 3).softmax(-1).float())
    scores[1, 7] = float("nan")
    out = softmax(scores, 3.0, torch.float32, impl="triton")
    assert out[1].isnan().all() and out[[0, 2, 3]].isfinite().all()


def test_nonsense_is_refused_by_name(randn):
    with pytest.raises(InvalidRequest, match="float16"):
        softmax(randn(2, 3, dtype=torch.float16), 1.0, torch.float16)
    with pytest.raises(InvalidRequest, match=r"-1\.0"):
        softmax(randn(2, 3), -1.0, torch.float16)
    with pytest.raises(InvalidRequest, match="16385"):
        softmax(torch.empty(1, 16385), 1.0, torch.float16, impl="triton")
