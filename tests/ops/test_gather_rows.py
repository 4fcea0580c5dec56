from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ragturbo.errors import InvalidRequest
from ragturbo.ops import Rows, describe, dispatch, gather_rows

GPU = torch.cuda.is_available()
# The reference reads host memory; the CUDA implementation needs a GPU and nvcc at installation.
CUDA = pytest.param(
    "cuda", marks=pytest.mark.skipif(bool(why := dispatch.refusal("gather_rows", "cuda", "cuda")), reason=str(why))
)
IMPLS = ["triton", CUDA] if GPU else ["reference", "triton"]
T, C = 6, 48


def fp16_table(count, device, generator, padding=0):
    """The table (count, bytes per record) uint8, its features, and its Rows."""
    features = torch.randn(count, T, C, generator=generator).half()
    table = torch.full((count, T * C * 2 + padding), 0x7E, dtype=torch.uint8)
    table[:, : T * C * 2] = features.view(count, -1).view(torch.uint8)
    table = table.to(device)
    return table, features.to(device), Rows(describe(table.data_ptr(), count, device), table.shape[1], T, C)


def int8_table(count, device, generator, padding=8):
    values = torch.randint(-128, 128, (count, T, C), generator=generator).to(torch.int8)
    scales = torch.rand(count, T, generator=generator)
    parts = values.view(count, -1).view(torch.uint8), scales.view(torch.uint8)
    table = torch.cat([*parts, torch.full((count, padding), 0xFF, dtype=torch.uint8)], dim=1).to(device)
    features = (values.float() * scales[..., None]).half().to(device)
    return table, features, Rows(describe(table.data_ptr(), count, device), table.shape[1], T, C, "int8")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("make", [fp16_table, int8_table])
def test_rows_arrive_to_the_bit_and_dequantised(make, impl, device):
    table, features, rows = make(7, device, torch.Generator().manual_seed(1))
    ids = torch.tensor([[3, 0, 6], [6, 6, 1]], device=device)
    out = gather_rows(rows, ids, impl=impl)
    assert out.shape == (2, 3, T, C) and torch.equal(out, features[ids])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("make", [fp16_table, int8_table])
def test_an_id_outside_the_table_gives_zeros_and_reads_nothing(make, impl, device):
    table, features, rows = make(5, device, torch.Generator().manual_seed(1))
    ids = torch.tensor([-1, 5, 2**62, -(2**62), 4], device=device)
    out = gather_rows(rows, ids, impl=impl)
    assert (out[:4].float().abs() < 1e-30).all() and torch.equal(out[4], features[4])


@pytest.mark.parametrize("impl", IMPLS)
def test_a_new_descriptor_in_the_same_memory_moves_the_database(impl, device):
    generator = torch.Generator().manual_seed(1)
    table, features, rows = fp16_table(5, device, generator, padding=32)
    other, other_features, other_rows = fp16_table(9, device, generator, padding=32)
    ids = torch.tensor([4, 8], device=device)
    assert not gather_rows(rows, ids, impl=impl)[1].any()
    rows.descriptor.copy_(other_rows.descriptor)
    assert torch.equal(gather_rows(rows, ids, impl=impl), other_features[ids])


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    count=st.integers(1, 6), ids=st.lists(st.integers(-3, 9), min_size=1, max_size=6), padding=st.integers(0, 20),
    int8=st.booleans(), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_any_ids_and_record_sizes(count, ids, padding, int8, seed, device):
    make = int8_table if int8 else fp16_table
    # Records are aligned to 4 bytes for their fp32 scales.
    table, features, rows = make(count, device, torch.Generator().manual_seed(seed), 4 * padding)
    ids = torch.tensor(ids, device=device)
    there = ((ids >= 0) & (ids < count))[:, None, None]
    expected = torch.where(there, features[ids.clamp(0, count - 1)], 0)
    assert torch.equal(gather_rows(rows, ids, impl="triton"), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="page-locked memory is read over a GPU's link")
@pytest.mark.parametrize("impl", ["triton", CUDA])
@pytest.mark.parametrize("make", [fp16_table, int8_table])
def test_rows_come_from_page_locked_host_memory(make, impl, device):
    table, features, rows = make(7, "cpu", torch.Generator().manual_seed(1))
    pinned = table.pin_memory()
    rows = rows._replace(descriptor=describe(pinned.data_ptr(), 7, device))
    ids = torch.tensor([3, 0, 6, -1], device=device)
    out = gather_rows(rows, ids, impl=impl).cpu()
    assert torch.equal(out[:3], features[[3, 0, 6]]) and not out[3].any()


def test_nonsense_is_refused_by_name(device):
    table, _, rows = fp16_table(3, device, torch.Generator().manual_seed(1))
    ids = torch.tensor([0], device=device)
    with pytest.raises(InvalidRequest, match="576 bytes.*575"):
        gather_rows(rows._replace(row_bytes=575), ids)
    with pytest.raises(InvalidRequest, match="float32"):
        gather_rows(rows._replace(stored="float32"), ids)
    with pytest.raises(InvalidRequest, match="int32"):
        gather_rows(rows, ids.int())
