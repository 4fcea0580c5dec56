"""Exact search: the k keys with the greatest inner products, in one read of the keys and two launches.

The keys' address and count come from a descriptor in device memory. Each program keeps the best k of its share of the
keys in registers; almost every key is rejected by one comparison with the worst of them. Several queries, up to 16, are
multiplied with a tile of keys at once, so that the keys are read once for all of them.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ragturbo.kernels import pdl, tiles
from ragturbo.kernels.launch import INTERPRET, launch
from ragturbo.kernels.portable import dot


@triton.jit
def scan_keys(
    descriptor_ptr, query_ptr, score_ptr, row_ptr, D,
    K: tl.constexpr, KP: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (query, share): the best K of every shares-th tile of BN keys -> scores and rows [query, share, K]."""
    pdl.wait(PDL)
    i_q, share, shares = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    p_keys = tl.load(descriptor_ptr).to(tl.pointer_type(tl.float16), bitcast=True)
    p_keys = tl.multiple_of(p_keys, 16)
    count = tl.load(descriptor_ptr + 1)
    place = tl.arange(0, KP)
    # Places past K hold +inf: they are never the worst, so never replaced.
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
        # A NaN product is never returned.
        score = tl.where(m_n & (score == score), score, float("-inf"))
        top = tl.max(score, axis=0)
        while top > worst:
            lane = tl.argmax(score, axis=0)
            # Of several worst entries, replace the one with the greatest row.
            i_worst = tl.argmax(tl.where(best == worst, rows, -2), axis=0)
            best = tl.where(place == i_worst, top, best)
            rows = tl.where(place == i_worst, n0 + lane, rows)
            worst = tl.min(best, axis=0)
            score = tl.where(tl.arange(0, BN) == lane, float("-inf"), score)
            top = tl.max(score, axis=0)
    o = (i_q * shares + share) * K + place
    tl.store(score_ptr + o, best, mask=place < K)
    tl.store(row_ptr + o, rows, mask=place < K)


@triton.jit
def scan_keys_together(
    descriptor_ptr, query_ptr, score_ptr, row_ptr, D, Q,
    K: tl.constexpr, KP: tl.constexpr, BQ: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """scan_keys of BQ of the Q queries, whose largest numbers are in [2^-126, 2^126). Program (queries, share)."""
    pdl.wait(PDL)
    share, shares = tl.program_id(1), tl.num_programs(1)
    p_keys = tl.load(descriptor_ptr).to(tl.pointer_type(tl.float16), bitcast=True)
    p_keys = tl.multiple_of(p_keys, 16)
    count = tl.load(descriptor_ptr + 1)
    i_q = tl.program_id(0) * BQ + tl.arange(0, BQ)
    m_q = i_q < Q
    place = tl.arange(0, KP)[None, :]
    best = tl.where(place < K, float("-inf"), float("inf")) + tl.zeros([BQ, KP], dtype=tl.float32)
    rows = tl.full([BQ, KP], -1, dtype=tl.int64)
    worst = tl.full([BQ], float("-inf"), dtype=tl.float32)
    # A query's number becomes two of fp16, together of 22 bits, whose products with fp16 keys are exact. The query's
    # largest is scaled to [1, 2), so that none overflows.
    largest = tl.zeros([BQ], dtype=tl.float32)
    for d0 in range(0, D, BD):
        i_d = d0 + tl.arange(0, BD)
        q = tl.load(query_ptr + i_q[:, None] * D + i_d[None, :], mask=m_q[:, None] & (i_d < D)[None, :], other=0.0)
        largest = tl.maximum(largest, tl.max(tl.abs(q), axis=1))
    exponent = largest.to(tl.int32, bitcast=True) & 0x7F800000
    scale = exponent.to(tl.float32, bitcast=True)
    inverse = (0x7F000000 - exponent).to(tl.float32, bitcast=True)[:, None]
    for n0 in range(share.to(tl.int64) * BN, count, shares * BN):
        i_n = n0 + tl.arange(0, BN)
        m_n = i_n < count
        high = tl.zeros([BQ, BN], dtype=tl.float32)
        low = tl.zeros([BQ, BN], dtype=tl.float32)
        for d0 in range(0, D, BD):
            i_d = d0 + tl.arange(0, BD)
            m_d = i_d < D
            q = tl.load(query_ptr + i_q[:, None] * D + i_d[None, :], mask=m_q[:, None] & m_d[None, :], other=0.0)
            m = m_d[:, None] & m_n[None, :]
            key = tl.load(p_keys + i_n[None, :] * D + i_d[:, None], mask=m, other=0.0, eviction_policy="evict_first")
            q *= inverse
            q_high = q.to(tl.float16)
            high = dot(q_high, key, high)
            low = dot(((q - q_high.to(tl.float32)) * 2048).to(tl.float16), key, low)
        score = (high + low * (1 / 2048)) * scale[:, None]
        score = tl.where(m_q[:, None] & m_n[None, :] & (score == score), score, float("-inf"))
        top = tl.max(score, axis=1)
        while tl.max((top > worst).to(tl.int32), axis=0) > 0:
            lane = tl.argmax(score, axis=1)
            i_worst = tl.argmax(tl.where(best == worst[:, None], rows, -2), axis=1)
            hit = (place == i_worst[:, None]) & (top > worst)[:, None]
            best = tl.where(hit, top[:, None], best)
            rows = tl.where(hit, (n0 + lane)[:, None], rows)
            worst = tl.min(best, axis=1)
            score = tl.where(tl.arange(0, BN)[None, :] == lane[:, None], float("-inf"), score)
            top = tl.max(score, axis=1)
    o = (i_q[:, None] * shares + share) * K + place
    m = m_q[:, None] & (place < K)
    tl.store(score_ptr + o, best, mask=m)
    tl.store(row_ptr + o, rows, mask=m)


@triton.jit
def merge_lists(score_ptr, row_ptr, ids_ptr, out_ptr, found, K: tl.constexpr, BF: tl.constexpr, PDL: tl.constexpr):
    """Program (query): the best K of all shares, best first, equal scores by row. Missing: id -1, score NaN."""
    pdl.wait(PDL)
    i_q = tl.program_id(0)
    i = tl.arange(0, BF)
    m = i < found
    score = tl.load(score_ptr + i_q * found + i, mask=m, other=float("-inf"))
    row = tl.load(row_ptr + i_q * found + i, mask=m, other=-1)
    for k in range(K):
        top = tl.max(score, axis=0)
        first = tl.min(tl.where((score == top) & (row >= 0), row, 0x7FFFFFFFFFFFFFFF), axis=0)
        found_k = top > float("-inf")
        tl.store(ids_ptr + i_q * K + k, tl.where(found_k, first, -1))
        tl.store(out_ptr + i_q * K + k, tl.where(found_k, top, float("nan")))
        score = tl.where(row == first, float("-inf"), score)


# Queries of a program: the smallest side of a matrix product.
QUERIES = 16


@functools.cache
def _processors(device: torch.device) -> int:
    if INTERPRET or device.type != "cuda":
        return 2 if INTERPRET else 132
    return torch.cuda.get_device_properties(device).multi_processor_count


def forward(descriptor: Tensor, query: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """descriptor: int64 [address, count] of fp16 keys (count, D); query: (B, D) fp32 -> rows int64, scores (B, k)."""
    batch, d = query.shape
    processors = _processors(query.device)
    # As many programs as fit on a multiprocessor, so that the loads of one overlap the search of another: with one
    # query 7 at 72 registers per thread for k = 1, and 4 or 5 for more. merge_lists would spill beyond 8192 entries.
    fit = 3 if batch > 1 else 7 if k == 1 else 4
    default = {"PER_PROCESSOR": min(fit, max(2, 8192 // (k * processors))), "num_warps": 4}
    if batch > 1:
        default |= {"BN": 64, "BD": min(64, tiles.power_of_2(d, 16)), "num_stages": 3}
    else:
        default |= {"BN": 8, "BD": min(1024, tiles.power_of_2(d)), "num_stages": 2}
    tile = dict(tiles.choose("topk", f"B{batch} D{d} K{k}", query.device, default))
    shares = tile.pop("PER_PROCESSOR") * processors
    found_scores = torch.empty(batch, shares, k, dtype=torch.float32, device=query.device)
    found_rows = torch.empty(batch, shares, k, dtype=torch.int64, device=query.device)
    options = {"K": k, "KP": tiles.power_of_2(k), **tile}
    inputs = descriptor, query.contiguous(), found_scores, found_rows, d
    if batch > 1:
        launch(scan_keys_together, (triton.cdiv(batch, QUERIES), shares), *inputs, batch, BQ=QUERIES, **options)
    else:
        launch(scan_keys, (1, shares), *inputs, **options)
    rows = torch.empty(batch, k, dtype=torch.int64, device=query.device)
    scores = torch.empty(batch, k, dtype=torch.float32, device=query.device)
    lanes = tiles.power_of_2(shares * k)
    warps = 8 if lanes <= 8192 else 16 if lanes <= 16384 else 32
    args = found_scores, found_rows, rows, scores, shares * k
    launch(merge_lists, (batch,), *args, K=k, BF=lanes, num_warps=warps)
    return rows, scores
