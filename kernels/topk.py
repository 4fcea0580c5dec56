"""Exact search: the k keys with the greatest inner products, in one read of the keys and two launches.

The keys' address and count come from a descriptor in device memory. Each program keeps the best of its share of the
keys in registers; nearly all keys lose against the worst of them, so that the test is all they cost.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ragturbo.kernels import tiles
from ragturbo.kernels.launch import INTERPRET, launch


@triton.jit
def _insert(best, rows, score, row, place):
    """score, row into the list at `place`, whose entry is lost."""
    i = tl.arange(0, best.shape[0])
    return tl.where(i == place, score, best), tl.where(i == place, row, rows)


@triton.jit
def scan_keys(
    descriptor_ptr,
    query_ptr,
    score_ptr,
    row_ptr,
    D,
    K: tl.constexpr,
    KP: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    """Program (query, share): the best K of every shares-th tile of BN keys -> scores and rows [query, share, K]."""
    i_q, share, shares = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    p_keys = tl.load(descriptor_ptr).to(tl.pointer_type(tl.float16), bitcast=True)
    p_keys = tl.multiple_of(p_keys, 16)
    count = tl.load(descriptor_ptr + 1)
    place = tl.arange(0, KP)
    # Places past K can never be the worst, and so never are replaced.
    best = tl.where(place < K, float("-inf"), float("inf"))
    rows = tl.full([KP], -1, dtype=tl.int64)
    worst = float("-inf")
    for n0 in range(share.to(tl.int64) * BN, count, shares * BN):
        i_n = n0 + tl.arange(0, BN)
        m_n = i_n < count
        score = tl.zeros([BN], dtype=tl.float32)
        for d0 in range(0, D, BD):
            i_d = d0 + tl.arange(0, BD)
            m_d = i_d < D
            q = tl.load(query_ptr + i_q * D + i_d, mask=m_d, other=0.0)
            m = m_n[:, None] & m_d[None, :]
            key = tl.load(p_keys + i_n[:, None] * D + i_d[None, :], mask=m, other=0.0, eviction_policy="evict_first")
            score += tl.sum(key.to(tl.float32) * q[None, :], axis=1)
        # A key of NaN is nobody's neighbour.
        score = tl.where(m_n & (score == score), score, float("-inf"))
        top = tl.max(score, axis=0)
        while top > worst:
            lane = tl.argmax(score, axis=0)
            # Of equally bad entries the one of the later row goes.
            hole = tl.argmax(tl.where(best == worst, rows, -2), axis=0)
            best, rows = _insert(best, rows, top, n0 + lane, hole)
            worst = tl.min(best, axis=0)
            score = tl.where(tl.arange(0, BN) == lane, float("-inf"), score)
            top = tl.max(score, axis=0)
    o = (i_q * shares + share) * K + place
    tl.store(score_ptr + o, best, mask=place < K)
    tl.store(row_ptr + o, rows, mask=place < K)


@triton.jit
def merge_lists(score_ptr, row_ptr, ids_ptr, out_ptr, found, K: tl.constexpr, BF: tl.constexpr):
    """One program a query: the best K of all shares, best first; equal scores by row. Missing: id -1, score NaN."""
    i_q = tl.program_id(0)
    i = tl.arange(0, BF)
    m = i < found
    score = tl.load(score_ptr + i_q * found + i, mask=m, other=float("-inf"))
    row = tl.load(row_ptr + i_q * found + i, mask=m, other=-1)
    for k in range(K):
        top = tl.max(score, axis=0)
        first = tl.min(tl.where((score == top) & (row >= 0), row, 0x7FFFFFFFFFFFFFFF), axis=0)
        there = top > float("-inf")
        tl.store(ids_ptr + i_q * K + k, tl.where(there, first, -1))
        tl.store(out_ptr + i_q * K + k, tl.where(there, top, float("nan")))
        score = tl.where(row == first, float("-inf"), score)


@functools.cache
def _processors(device: torch.device) -> int:
    if INTERPRET or device.type != "cuda":
        return 2 if INTERPRET else 132
    return torch.cuda.get_device_properties(device).multi_processor_count


def search_into(descriptor: Tensor, query: Tensor, rows: Tensor, scores: Tensor) -> None:
    """descriptor: int64 [address, count] of fp16 keys (count, D); query: (B, D) fp32; fills rows, scores (B, k)."""
    batch, d = query.shape
    k = rows.shape[1]
    # 72 registers a thread let seven programs share a multiprocessor: one's loads hide another's search. The merge of
    # more than 8192 entries would spill.
    per_processor = min(7, max(2, 8192 // (k * _processors(query.device))))
    default = {
        "BN": 8,
        "BD": min(1024, tiles.power_of_2(d)),
        "PER_PROCESSOR": per_processor,
        "num_warps": 4,
        "num_stages": 2,
    }
    tile = dict(tiles.choose("topk", f"B{batch} D{d} K{k}", query.device, default))
    shares = tile.pop("PER_PROCESSOR") * _processors(query.device)
    found_scores = torch.empty(batch, shares, k, dtype=torch.float32, device=query.device)
    found_rows = torch.empty(batch, shares, k, dtype=torch.int64, device=query.device)
    kp = tiles.power_of_2(k)
    launch(scan_keys, (batch, shares), descriptor, query.contiguous(), found_scores, found_rows, d, K=k, KP=kp, **tile)
    found = shares * k
    lanes = tiles.power_of_2(found)
    launch(
        merge_lists, (batch,), found_scores, found_rows, rows, scores, found,
        K=k, BF=lanes, num_warps=8 if lanes <= 8192 else 16 if lanes <= 16384 else 32,
    )  # fmt: skip
