"""Exact search: the k keys with the greatest inner products with each query."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ragturbo.errors import InvalidRequest
from ragturbo.ops import dispatch


def topk(keys: Tensor, query: Tensor, k: int, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """keys: descriptor int64 [address, count] of fp16 (count, D); query: (B, D) fp32 -> rows int64, scores fp32 (B, k).

    Best first, the smaller row first among equals. Places nothing fills are row -1, score NaN; a key whose product is
    NaN is never returned. `gather_rows.describe` makes a descriptor.
    """
    rows = torch.empty(query.shape[0], k, dtype=torch.int64, device=query.device)
    scores = torch.empty(query.shape[0], k, dtype=torch.float32, device=query.device)
    topk_into(keys, query, rows, scores, impl)
    return rows, scores


def topk_into(keys: Tensor, query: Tensor, rows: Tensor, scores: Tensor, impl: str = "auto") -> None:
    """`topk` into rows and scores (B, k), contiguous, for a captured graph."""
    if query.ndim != 2 or query.dtype != torch.float32 or keys.dtype != torch.int64 or keys.device != query.device:
        raise InvalidRequest(
            f"topk takes an int64 descriptor and fp32 queries (B, D) on one device: got {keys.dtype} on {keys.device}, "
            f"{query.dtype} of {tuple(query.shape)} on {query.device}"
        )
    if rows.shape != scores.shape or rows.shape[0] != query.shape[0] or not 1 <= rows.shape[1] <= 64:
        raise InvalidRequest(
            f"topk: {query.shape[0]} queries, rows {tuple(rows.shape)}, scores {tuple(scores.shape)}; k is 1 … 64"
        )
    if not rows.is_contiguous() or not scores.is_contiguous():
        raise InvalidRequest("topk_into fills contiguous rows and scores")
    limits = {"cuda": _cuda_limit(rows.shape[1], query.shape[1])}
    name = dispatch.choose("topk", impl, query.device.type, torch.float16, limits=limits)
    if name == "reference":
        found, best = reference(keys, query, rows.shape[1])
        rows.copy_(found)
        scores.copy_(best)
    elif name == "triton":
        _triton(keys, query, rows, scores)
    else:
        _cuda(keys, query, rows, scores)


def _cuda_limit(k: int, width: int) -> str | None:
    """Why csrc/topk.cu cannot: a warp keeps one of the best a lane, and reads keys by 16 bytes."""
    if k > 32:
        return f"the CUDA kernel keeps at most 32 neighbours, k is {k}; impl='triton' takes 64"
    if width % 8 or not 8 <= width <= 2048:
        return f"the CUDA kernel takes keys of 8 … 2048 numbers, a multiple of 8, not {width}; impl='triton' takes any"
    return None


def reference(keys: Tensor, query: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The same in plain torch, for keys in host memory and queries on the CPU."""
    if query.device.type != "cpu":
        raise InvalidRequest(f"topk(impl='reference') reads host memory, the queries are on {query.device}")
    address, count = keys.tolist()
    width = query.shape[1]
    rows = torch.full((query.shape[0], k), -1, dtype=torch.int64)
    scores = torch.full((query.shape[0], k), float("nan"))
    if count == 0:
        return rows, scores
    memory = torch.frombuffer((ctypes.c_uint16 * (count * width)).from_address(address), dtype=torch.float16)
    product = query @ memory.view(count, width).float().T
    product = torch.where(product.isnan(), -torch.inf, product)
    # A stable sort: among equals the smaller row first.
    best, order = product.sort(dim=-1, descending=True, stable=True)
    found = min(k, count)
    there = best[:, :found] > -torch.inf
    rows[:, :found] = torch.where(there, order[:, :found], -1)
    scores[:, :found] = torch.where(there, best[:, :found], torch.nan)
    return rows, scores


@torch.library.custom_op("ragturbo::topk", mutates_args=("rows", "scores"))
def _triton(keys: Tensor, query: Tensor, rows: Tensor, scores: Tensor) -> None:
    from ragturbo.kernels import topk as kernels

    kernels.search_into(keys, query, rows, scores)


@torch.library.custom_op("ragturbo::topk_cuda", mutates_args=("rows", "scores"))
def _cuda(keys: Tensor, query: Tensor, rows: Tensor, scores: Tensor) -> None:
    native = dispatch.native()
    query = query.contiguous()
    with torch.cuda.device(query.device):
        # A launch takes at most four queries.
        for i in range(0, query.shape[0], 4):
            part = query[i : i + 4]
            size = native.topk_workspace_bytes(queries=part.shape[0], k=rows.shape[1])
            workspace = torch.empty(size, dtype=torch.uint8, device=query.device)
            native.topk(
                base_at=keys.data_ptr(),
                count_at=keys.data_ptr() + 8,
                query=part.data_ptr(),
                queries=part.shape[0],
                dim=part.shape[1],
                k=rows.shape[1],
                rows=rows[i : i + 4].data_ptr(),
                scores=scores[i : i + 4].data_ptr(),
                workspace=workspace.data_ptr(),
                workspace_bytes=size,
                stream=torch.cuda.current_stream().cuda_stream,
            )
