"""Exact search: the k keys with the greatest inner products with each query."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ragturbo.errors import InvalidRequest
from ragturbo.ops import dispatch


def topk(keys: Tensor, query: Tensor, k: int, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """The best k keys of each query, best first; of equal keys the smaller row first.

    Args:
        keys: a descriptor (see `gather_rows.describe`): int64 [address, count] of fp16 keys (count, D).
        query: (B, D) fp32.
        k: 1 … 64.

    Returns:
        rows int64 and scores fp32, (B, k). If there are fewer than k keys the rest is row -1, score NaN. A key whose
        product is NaN is never returned.
    """
    if query.ndim != 2 or query.dtype != torch.float32 or keys.dtype != torch.int64 or keys.device != query.device:
        raise InvalidRequest(
            f"topk takes an int64 descriptor and fp32 queries (B, D) on one device: got {keys.dtype} on {keys.device}, "
            f"{query.dtype} of {tuple(query.shape)} on {query.device}"
        )
    if not 1 <= k <= 64:
        raise InvalidRequest(f"topk: k is 1 … 64, not {k}")
    limits = {"cuda": _cuda_limit(k, query.shape[1])}
    name = dispatch.choose("topk", impl, query.device.type, torch.float16, limits=limits)
    if name == "reference":
        return reference(keys, query, k)
    return (_triton if name == "triton" else _cuda)(keys, query, k)


def _cuda_limit(k: int, width: int) -> str | None:
    """Why csrc/topk.cu cannot run; None if it can. A lane holds one of the best; keys are read 16 bytes at a time."""
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
    # Stable, so that of equal products the smaller row comes first.
    best, order = product.sort(dim=-1, descending=True, stable=True)
    found = min(k, count)
    filled = best[:, :found] > -torch.inf
    rows[:, :found] = torch.where(filled, order[:, :found], -1)
    scores[:, :found] = torch.where(filled, best[:, :found], torch.nan)
    return rows, scores


@torch.library.custom_op("ragturbo::topk", mutates_args=())
def _triton(keys: Tensor, query: Tensor, k: int) -> tuple[Tensor, Tensor]:
    from ragturbo.kernels import topk as kernels

    return kernels.forward(keys, query, k)


@torch.library.custom_op("ragturbo::topk_cuda", mutates_args=())
def _cuda(keys: Tensor, query: Tensor, k: int) -> tuple[Tensor, Tensor]:
    native = dispatch.native()
    query = query.contiguous()
    rows = torch.empty(query.shape[0], k, dtype=torch.int64, device=query.device)
    scores = torch.empty(query.shape[0], k, dtype=torch.float32, device=query.device)
    with torch.cuda.device(query.device):
        # A launch takes at most four queries.
        for i in range(0, query.shape[0], 4):
            part = query[i : i + 4]
            size = native.topk_workspace_bytes(queries=part.shape[0], k=k)
            workspace = torch.empty(size, dtype=torch.uint8, device=query.device)
            native.topk(
                base_at=keys.data_ptr(), count_at=keys.data_ptr() + 8,
                query=part.data_ptr(), queries=part.shape[0], dim=part.shape[1], k=k,
                rows=rows[i : i + 4].data_ptr(), scores=scores[i : i + 4].data_ptr(),
                workspace=workspace.data_ptr(), workspace_bytes=size, stream=torch.cuda.current_stream().cuda_stream,
            )  # fmt: skip
    return rows, scores


@_triton.register_fake
@_cuda.register_fake
def _(keys: Tensor, query: Tensor, k: int) -> tuple[Tensor, Tensor]:
    shape = query.shape[0], k
    return query.new_empty(shape, dtype=torch.int64), query.new_empty(shape)
