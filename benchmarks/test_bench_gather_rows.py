"""Feature rows by random ids: the Triton kernel and its CUDA twin, from page-locked host memory and from the device.

The host table exceeds every cache. The baseline is a copy of as many consecutive rows.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import roofline
from benchmarks.timing import rotation
from ragturbo.ops import Rows, describe, gather_rows

TOKENS, CHANNELS = 64, 1280
TABLE_BYTES = {"cuda": 4 << 30, "cpu": 64 << 20}
GPU = pytest.mark.gpu
IMPLS = ["reference", *(pytest.param(name, marks=GPU) for name in ("triton", "cuda", "copy"))]


@pytest.fixture(scope="module")
def buffers(device: str) -> dict[str, torch.Tensor]:
    """The same random bytes on the device and, page-locked, in host memory."""
    # Small bytes, so that every fp16 value and fp32 scale is finite.
    drawn = torch.randint(0, 60, (TABLE_BYTES[device],), dtype=torch.uint8, device=device)
    if device == "cpu":
        return {"host": drawn}
    return {"device": drawn, "host": torch.empty(len(drawn), dtype=torch.uint8, pin_memory=True).copy_(drawn)}


def as_table(buffer: torch.Tensor, stored: str) -> torch.Tensor:
    """Return the buffer as (count, bytes per record)."""
    values = TOKENS * CHANNELS
    record = 2 * values if stored == "float16" else values + 4 * TOKENS
    count = len(buffer) // record
    return buffer[: count * record].view(count, record)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("stored", ["float16", "int8"])
@pytest.mark.parametrize("where", ["host", pytest.param("device", marks=GPU)])
@pytest.mark.parametrize("rows", [1, pytest.param(16, marks=pytest.mark.quick), 64])
def test_gather_rows(measure: Any, device: str, buffers: Any, rows: int, where: str, stored: str, impl: str) -> None:
    if impl == "reference" and device == "cuda":
        pytest.skip("the reference reads host memory for ids on the CPU")
    table = as_table(buffers[where], stored)
    source = Rows(describe(table.data_ptr(), len(table), device), table.shape[1], TOKENS, CHANNELS, stored)
    generator = torch.Generator(device).manual_seed(1)
    turns = rotation(rows * table.shape[1], least=16)
    ids = torch.randint(0, len(table), (turns, rows), generator=generator, device=device).unbind()
    parts = table[: turns * rows].split(rows)
    out = torch.empty(rows, table.shape[1], dtype=torch.uint8, device=device)

    def call(ids: torch.Tensor) -> torch.Tensor:
        return gather_rows(source, ids, impl=impl)

    def copy(part: torch.Tensor) -> torch.Tensor:
        return out.copy_(part, non_blocking=True)

    def verify() -> None:
        if impl == "copy":
            return
        values = TOKENS * CHANNELS
        row = table[ids[0].to(table.device)].cpu()
        if stored == "float16":
            exact = row.view(torch.float16).view(rows, TOKENS, CHANNELS)
        else:
            scales = row[:, values:].contiguous().view(torch.float32)[..., None]
            exact = (row[:, :values].view(torch.int8).view(rows, TOKENS, CHANNELS).float() * scales).half()
        assert torch.equal(call(ids[0]).cpu(), exact)

    cost = roofline.gather_rows(rows, TOKENS, CHANNELS, stored, host=where == "host")
    link = {"link_bytes": cost.link_bytes}
    sizes = {"rows": rows, "where": where, "stored": stored, "impl": impl}
    measure(
        copy if impl == "copy" else call, inputs=list(zip(parts if impl == "copy" else ids)), verify=verify, cost=cost,
        dtype=torch.float16, sizes=sizes, group=f"gather_rows {rows} {stored} {where}", extra=link,
    )  # fmt: skip
