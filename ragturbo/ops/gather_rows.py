"""Gather rows of H-space features by ids in device memory, from device memory or page-locked host memory."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from ragturbo.errors import InvalidRequest
from ragturbo.ops import dispatch


class Rows(NamedTuple):
    """A table of records, row_bytes apart: T·C fp16 values, or T·C int8 values and then T fp32 scales.

    The kernels read address and count from `descriptor` at each run, so copying a new one into it swaps the database.
    The caller must keep the table's memory alive.
    """

    descriptor: Tensor
    row_bytes: int
    tokens: int
    channels: int
    stored: str = "float16"

    @property
    def record_bytes(self) -> int:
        values = self.tokens * self.channels
        return 2 * values if self.stored == "float16" else values + 4 * self.tokens


def describe(address: int, count: int, device: torch.device | str) -> Tensor:
    """The descriptor of `count` records or keys at `address`, an address valid on `device`: int64 [address, count]."""
    return torch.tensor([address, count], dtype=torch.int64, device=device)


def gather_rows(rows: Rows, ids: Tensor, impl: str = "auto") -> Tensor:
    """ids: (…,) int64 -> (…, T, C) fp16, dequantised. An id outside the table, such as -1, gives zeros."""
    if rows.stored not in ("float16", "int8") or rows.row_bytes < rows.record_bytes or rows.row_bytes % 2:
        raise InvalidRequest(
            f"a record of {rows.stored} ({rows.tokens}, {rows.channels}) is {rows.record_bytes} bytes, "
            f"row_bytes is {rows.row_bytes}"
        )
    if ids.dtype != torch.int64 or rows.descriptor.dtype != torch.int64 or ids.device != rows.descriptor.device:
        raise InvalidRequest(
            f"gather_rows: ids are {ids.dtype} on {ids.device}, "
            f"the descriptor {rows.descriptor.dtype} on {rows.descriptor.device}"
        )
    name = dispatch.choose("gather_rows", impl, ids.device.type, torch.float16, limits={"cuda": _cuda_limit(rows, ids)})
    if name == "reference":
        return reference(rows, ids)
    run = _triton if name == "triton" else _cuda
    return run(rows.descriptor, ids, rows.row_bytes, rows.tokens, rows.channels, rows.stored == "int8")


def _cuda_limit(rows: Rows, ids: Tensor) -> str | None:
    """Why csrc/gather.cu cannot run; None if it can. It reads 16 bytes at a time, with one block column per row."""
    lane = 16 if rows.stored == "int8" else 8
    if rows.channels % lane or rows.row_bytes % 16:
        return (
            f"the CUDA kernel takes channels in multiples of {lane}, rows in multiples of 16 bytes, "
            f"not {rows.channels} and {rows.row_bytes}; impl='triton' takes any"
        )
    if ids.numel() > 65535:
        return f"the CUDA kernel gathers at most 65535 rows at once, not {ids.numel()}; impl='triton' takes any number"
    return None


def reference(rows: Rows, ids: Tensor) -> Tensor:
    """The same in plain torch, for records in host memory and ids on the CPU."""
    if ids.device.type != "cpu":
        raise InvalidRequest(f"gather_rows(impl='reference') reads host memory, ids are on {ids.device}")
    address, count = rows.descriptor.tolist()
    inside = (ids >= 0) & (ids < count)
    if count == 0:
        return torch.zeros(*ids.shape, rows.tokens, rows.channels, dtype=torch.float16)
    length = (count - 1) * rows.row_bytes + rows.record_bytes
    memory = torch.frombuffer((ctypes.c_uint8 * length).from_address(address), dtype=torch.uint8)
    record = memory.as_strided((count, rows.record_bytes), (rows.row_bytes, 1))[torch.where(inside, ids, 0)]
    values = rows.tokens * rows.channels
    if rows.stored == "float16":
        out = record.contiguous().view(torch.float16).unflatten(-1, (rows.tokens, rows.channels))
    else:
        payload = record[..., :values].contiguous().view(torch.int8).unflatten(-1, (rows.tokens, rows.channels))
        scales = record[..., values:].contiguous().view(torch.float32)
        out = (payload.float() * scales[..., None]).half()
    return torch.where(inside[..., None, None], out, 0)


@torch.library.custom_op("ragturbo::gather_rows", mutates_args=())
def _triton(descriptor: Tensor, ids: Tensor, row_bytes: int, tokens: int, channels: int, int8: bool) -> Tensor:
    from ragturbo.kernels import gather_rows as kernels

    return kernels.forward(descriptor, ids, row_bytes, tokens, channels, int8)


@torch.library.custom_op("ragturbo::gather_rows_cuda", mutates_args=())
def _cuda(descriptor: Tensor, ids: Tensor, row_bytes: int, tokens: int, channels: int, int8: bool) -> Tensor:
    ids = ids.contiguous()
    out = torch.empty(*ids.shape, tokens, channels, dtype=torch.float16, device=ids.device)
    with torch.cuda.device(ids.device):
        dispatch.native().gather_rows(
            base_at=descriptor.data_ptr(), count_at=descriptor.data_ptr() + 8, ids=ids.data_ptr(), n=ids.numel(),
            tokens=tokens, channels=channels, stride=row_bytes, stored="int8" if int8 else "float16",
            out=out.data_ptr(), stream=torch.cuda.current_stream().cuda_stream,
        )  # fmt: skip
    return out


@_triton.register_fake
@_cuda.register_fake
def _(descriptor: Tensor, ids: Tensor, row_bytes: int, tokens: int, channels: int, int8: bool) -> Tensor:
    return ids.new_empty(*ids.shape, tokens, channels, dtype=torch.float16)
