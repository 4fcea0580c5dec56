from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ragturbo.errors import InvalidRequest
from ragturbo.kernels.launch import counted
from ragturbo.ops import describe, dispatch, topk

# The reference reads host memory; the CUDA implementation needs a GPU and nvcc at installation.
CUDA = pytest.param(
    "cuda", marks=pytest.mark.skipif(bool(why := dispatch.refusal("topk", "cuda", "cuda")), reason=str(why))
)
IMPLS = ["triton", CUDA] if torch.cuda.is_available() else ["reference", "triton"]


def described(keys):
    return describe(keys.data_ptr(), len(keys), keys.device)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    count=st.integers(0, 150), width=st.integers(1, 70), queries=st.integers(1, 3), k=st.integers(1, 12),
    seed=st.integers(0, 2**31),
)  # fmt: skip
def test_the_same_rows_as_a_full_sort(count, width, queries, k, seed, device):
    generator = torch.Generator().manual_seed(seed)
    # Small integers: products are exact in any order of summation, and there are many ties.
    keys = torch.randint(-2, 3, (count, width), generator=generator).half().to(device)
    query = torch.randint(-2, 3, (queries, width), generator=generator).float().to(device)
    with counted() as launched:
        rows, scores = topk(described(keys), query, k, impl="triton")
    assert len(launched) == 2
    product = query.cpu() @ keys.cpu().float().T
    for i in range(queries):
        best = sorted(range(count), key=lambda row: (-product[i, row].item(), row))[:k]
        assert rows[i].tolist() == best + [-1] * (k - len(best))
        assert scores[i, : len(best)].tolist() == product[i, best].tolist()
        assert scores[i, len(best) :].isnan().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_real_keys_and_their_cosines(impl, randn):
    keys = torch.nn.functional.normalize(randn(300, 64), dim=-1).half()
    query = torch.nn.functional.normalize(keys[[17, 250]].float(), dim=-1)
    rows, scores = topk(described(keys), query, 4, impl=impl)
    assert rows[:, 0].tolist() == [17, 250]
    exact = query.double() @ keys.double().T
    torch.testing.assert_close(scores.double(), exact.gather(1, rows), rtol=0, atol=1e-6)
    assert torch.equal(exact.topk(4).indices, rows)


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_many_queries_in_one_product_are_as_exact_as_fp32(scale, randn):
    keys = torch.nn.functional.normalize(randn(200, 96), dim=-1).half()
    query = torch.nn.functional.normalize(randn(19, 96), dim=-1) * scale
    # Queries without a finite product do not disturb the others, nor does one of zeros.
    query[3], query[5, 0] = 0, torch.nan
    rows, scores = topk(described(keys), query, 3, impl="triton")
    exact = query.double() @ keys.double().T
    assert rows[3].tolist() == [0, 1, 2] and scores[3].tolist() == [0, 0, 0]
    assert rows[5].tolist() == [-1, -1, -1] and scores[5].isnan().all()
    for i in set(range(19)) - {3, 5}:
        torch.testing.assert_close(scores[i].double(), exact[i, rows[i]], rtol=0, atol=5e-7 * scale)
        assert torch.equal(exact[i].topk(3).indices, rows[i])


@pytest.mark.parametrize("impl", IMPLS)
def test_a_key_of_nan_is_nobodys_neighbour(impl, randn):
    keys = randn(30, 16).half()
    keys[5] = torch.nan
    rows, scores = topk(described(keys), randn(1, 16), 30, impl=impl)
    assert 5 not in rows and rows[0, -1] == -1 and scores[0, -1].isnan() and scores[0, :-1].isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_new_descriptor_in_the_same_memory_moves_the_database(impl, randn):
    small, large = randn(3, 16).half(), randn(70, 16).half()
    descriptor, query = described(small), randn(1, 16)
    rows, _ = topk(descriptor, query, 5, impl=impl)
    assert rows[0, 3:].tolist() == [-1, -1]
    descriptor.copy_(described(large))
    rows, _ = topk(descriptor, query, 5, impl=impl)
    assert torch.equal(rows, (query @ large.float().T).topk(5).indices)


def test_nonsense_is_refused_by_name(randn):
    keys = described(randn(3, 16).half())
    with pytest.raises(InvalidRequest, match="float16"):
        topk(keys, randn(1, 16).half(), 1)
    with pytest.raises(InvalidRequest, match="65"):
        topk(keys, randn(1, 16), 65)
