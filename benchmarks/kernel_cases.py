"""The kernels' main shapes: SD 2.1 at 512², batch 1 and 8. They are compiled in tests, and tuned and timed on GPUs.

A case creates its inputs on any device, including "meta", and returns a call of the launcher.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ragturbo.kernels import (
    bias_residual,
    cross_attention,
    cross_attention_backward,
    gather_rows,
    geglu,
    group_norm,
    interleave,
    layer_norm,
    linear,
    scaled_residual,
    slerp,
    softmax,
    to_uint8,
    topk,
    upsample,
)

TOKENS, CHANNELS, HEADS, NEIGHBOURS = 64, 1280, 20, 4
KEY_WIDTH, KEYS = 1024, 630_000
GUARDS = (1e-6, 1e-3)

Call = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """One op at one shape. tiled: name of its tile in configs. make: function of (device, dtype) to the call."""

    op: str
    label: str
    tiled: str
    make: Callable[[str, torch.dtype], Call]


def random(shape: tuple[int, ...], device: str, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, device=device).to(dtype)


def _slerp(batch: int, token: bool, backward: bool, device: str, dtype: torch.dtype) -> Call:
    t, r = (random((batch, TOKENS, CHANNELS), device, dtype) for _ in range(2))
    w = torch.full((batch,), 0.8, device=device)
    if backward:
        return partial(slerp.backward, torch.ones_like(t), t, r, w, token, *GUARDS)
    return partial(slerp.forward, t, r, w, token, *GUARDS)


def _scaled_residual(batch: int, backward: bool, device: str, dtype: torch.dtype) -> Call:
    h, delta = (random((batch, TOKENS, CHANNELS), device, dtype) for _ in range(2))
    lam = torch.full((batch,), 0.5, device=device)
    return partial(scaled_residual.backward if backward else scaled_residual.forward, h, delta, lam)


def _linear(m: int, n: int, k: int, parts: int, after: str, device: str, dtype: torch.dtype) -> Call:
    batch = max(1, m // TOKENS)
    x = random((batch, m // batch, k), device, dtype)
    weights = [random((2 * n if after == "geglu" else n, k), device, dtype) * k**-0.5 for _ in range(parts)]
    bias = random((weights[0].shape[0],), device, dtype) if parts == 1 else None
    residual = random((batch, m // batch, n), device, dtype) if after in ("residual", "lam") else None
    lam = torch.full((batch,), 0.5, device=device) if after == "lam" else None
    return partial(linear.forward, x, weights, bias, after == "geglu", residual, lam)


def _attention(batch: int, n: int, heads: int, width: int, backward: bool, device: str, dtype: torch.dtype) -> Call:
    c = heads * width
    q = random((batch, TOKENS, c), device, dtype)
    k, v = (random((batch, n, TOKENS, c), device, dtype) for _ in range(2))
    valid = torch.ones(batch, n, dtype=torch.bool, device=device)
    if not backward:
        return partial(cross_attention.forward, q, k, v, valid, heads)
    out, softmax = torch.ones_like(q), torch.ones(batch, heads, 2, TOKENS, device=device)
    return partial(cross_attention_backward.backward, torch.ones_like(q), q, k, v, valid, out, softmax, heads)


def _project(batch: int, n: int, device: str, dtype: torch.dtype) -> Call:
    x = random((batch, TOKENS, CHANNELS), device, dtype)
    weight = random((CHANNELS, CHANNELS), device, dtype) * CHANNELS**-0.5
    k, v = (random((batch, n, TOKENS, CHANNELS), device, dtype) for _ in range(2))
    valid = torch.ones(batch, n, dtype=torch.bool, device=device)
    return partial(cross_attention.project, x, weight, k, v, valid, HEADS)


def _group_norm(shape: tuple[int, ...], add: bool, silu: bool, device: str, dtype: torch.dtype) -> Call:
    x = random(shape, device, dtype).contiguous(memory_format=torch.channels_last)
    w, b = (random((shape[1],), device, dtype) for _ in range(2))
    return partial(group_norm.forward, x, 32, w, b, 1e-5, silu, torch.ones_like(x) if add else None, None, add)


def _layer_norm(rows: int, c: int, add: bool, device: str, dtype: torch.dtype) -> Call:
    w, b = (random((c,), device, dtype) for _ in range(2))
    x = random((rows, c), device, dtype)
    residual = (random((rows, c), device, dtype), random((c,), device, dtype)) if add else (None, None)
    return partial(layer_norm.forward, x, w, b, 1e-5, *residual)


def _geglu(rows: int, f: int, device: str, dtype: torch.dtype) -> Call:
    return partial(geglu.forward, random((rows, 2 * f), device, dtype), random((2 * f,), device, dtype))


def _bias_residual(channels: int, size: int, device: str, dtype: torch.dtype) -> Call:
    x = random((1, channels, size, size), device, dtype).contiguous(memory_format=torch.channels_last)
    return partial(bias_residual.forward, x, random((channels,), device, dtype), torch.ones_like(x))


def _upsample(channels: int, size: int, device: str, dtype: torch.dtype) -> Call:
    x = random((1, channels, size, size), device, dtype).contiguous(memory_format=torch.channels_last)
    return partial(upsample.forward, x)


def _interleave(channels: int, size: int, device: str, dtype: torch.dtype) -> Call:
    phases = random((1, 4 * channels, size + 1, size + 1), device, dtype).contiguous(memory_format=torch.channels_last)
    return partial(interleave.forward, phases)


def _softmax(length: int, device: str, dtype: torch.dtype) -> Call:
    return partial(softmax.forward, random((1, length, length), device, torch.float32), 512**-0.5, dtype)


def _to_uint8(size: int, device: str, dtype: torch.dtype) -> Call:
    images = random((1, 3, size, size), device, dtype).contiguous(memory_format=torch.channels_last)
    return partial(to_uint8.forward, images, True)


def _gather(n: int, int8: bool, device: str, dtype: torch.dtype) -> Call:
    """From device memory; benchmarks/test_bench_gather_rows.py reads page-locked host memory."""
    record = TOKENS * CHANNELS * (1 if int8 else 2) + (4 * TOKENS if int8 else 0)
    table = torch.zeros(256, record, dtype=torch.uint8, device=device)
    descriptor = torch.tensor([0 if device == "meta" else table.data_ptr(), 256], dtype=torch.int64, device=device)
    ids = torch.randint(0, 256, (n,), device=device)

    def call(table: Tensor = table) -> Tensor:
        return gather_rows.forward(descriptor, ids, record, TOKENS, CHANNELS, int8)

    return call


def _topk(batch: int, k: int, device: str, dtype: torch.dtype) -> Call:
    keys = torch.empty(KEYS if device == "cuda" else 1, KEY_WIDTH, dtype=torch.float16, device=device).normal_()
    address = 0 if device == "meta" else keys.data_ptr()
    descriptor = torch.tensor([address, keys.shape[0]], dtype=torch.int64, device=device)
    query = random((batch, KEY_WIDTH), device, torch.float32)

    def call(keys: Tensor = keys) -> tuple[Tensor, Tensor]:
        return topk.forward(descriptor, query, k)

    return call


def _cases() -> list[Case]:
    c, f = CHANNELS, 4 * CHANNELS
    found: list[Case] = []

    def add(op: str, label: str, make: Callable[..., Call], *args: Any, tiled: str = "") -> None:
        found.append(Case(op, label, tiled or op, partial(make, *args)))

    for b in (1, 8):
        m = b * TOKENS
        add("slerp", f"b{b} per sample", _slerp, b, False, False)
        add("slerp", f"b{b} per token", _slerp, b, True, False)
        add("scaled_residual", f"b{b}", _scaled_residual, b, False)
        add("linear", f"b{b} proj_in", _linear, m, c, c, 1, "")
        add("linear", f"b{b} QKV", _linear, m, c, c, 3, "")
        add("linear", f"b{b} K and V of {NEIGHBOURS}", _linear, m * NEIGHBOURS, c, c, 2, "")
        add("linear", f"b{b} out, residual", _linear, m, c, c, 1, "residual")
        add("linear", f"b{b} GEGLU", _linear, m, f, c, 1, "geglu")
        add("linear", f"b{b} FF out, residual", _linear, m, c, f, 1, "residual")
        add("linear", f"b{b} proj_out, λ residual", _linear, m, c, c, 1, "lam")
        add("cross_attention", f"b{b} d64 k{NEIGHBOURS}", _attention, b, NEIGHBOURS, HEADS, 64, False)
        add("project_attention", f"b{b}", _project, b, NEIGHBOURS, tiled="project_cross_attention")
    # Self-attention of the adapter.
    add("cross_attention", "b1 d64 k1", _attention, 1, 1, HEADS, 64, False)
    add("layer_norm", "b1 adapter", _layer_norm, TOKENS, c, False)
    add("cross_attention", "b1 d32", _attention, 1, 1, 40, 32, False)
    add("cross_attention", "b1 d128", _attention, 1, 16, 10, 128, False)
    add("slerp backward", "b8 per sample", _slerp, 8, False, True, tiled="slerp")
    add("slerp backward", "b8 per token", _slerp, 8, True, True, tiled="slerp")
    add("scaled_residual backward", "b8", _scaled_residual, 8, True, tiled="scaled_residual")
    for width in (32, 64, 128):
        args = 8, NEIGHBOURS, CHANNELS // width, width, True
        add("cross_attention backward", f"b8 d{width}", _attention, *args, tiled="cross_attention_backward")
    for channels, size in ((320, 64), (640, 32), (1280, 16), (2560, 16), (1280, 8), (2560, 8)):
        add("group_norm", f"UNet {channels}×{size}²", _group_norm, (1, channels, size, size), False, True)
    for channels, size in ((128, 512), (256, 512), (256, 256), (512, 128), (512, 64)):
        add("group_norm", f"VAE {channels}×{size}²", _group_norm, (1, channels, size, size), False, True)
    add("group_norm", "UNet 2560×16² + add", _group_norm, (1, 2560, 16, 16), True, True)
    add("group_norm", "UNet 320×64² + add", _group_norm, (1, 320, 64, 64), True, True)
    add("group_norm", "UNet 1280×8² + add", _group_norm, (1, 1280, 8, 8), True, True)
    add("group_norm", "VAE 128×512² + add", _group_norm, (1, 128, 512, 512), True, True)
    # In front of a transformer's proj_in.
    for channels, size in ((320, 64), (1280, 8)):
        add("group_norm", f"UNet {channels}×{size}², no SiLU", _group_norm, (1, channels, size, size), False, False)
    for channels, size in ((320, 64), (640, 32), (1280, 16)):
        add("layer_norm", f"{size}² tokens, {channels}", _layer_norm, size * size, channels, False)
        add("layer_norm", f"{size}² tokens, {channels} + add", _layer_norm, size * size, channels, True)
        add("geglu", f"{size}² tokens, {4 * channels}", _geglu, size * size, 4 * channels)
    for channels, size in ((320, 64), (1280, 8), (128, 512)):
        add("bias_residual", f"{channels}×{size}²", _bias_residual, channels, size)
    for channels, size in ((1280, 8), (640, 32), (256, 256)):
        add("upsample", f"{channels}×{size}²", _upsample, channels, size)
    for channels, size in ((512, 64), (256, 256)):
        add("interleave", f"VAE {channels}×{size}²", _interleave, channels, size)
    add("softmax", "VAE 64² tokens", _softmax, 4096)
    add("to_uint8", "512²", _to_uint8, 512)
    for n in (1, 16, 64):
        add("gather_rows", f"{n} rows fp16", _gather, n, False)
        add("gather_rows", f"{n} rows int8", _gather, n, True)
    for b, k in ((1, 1), (1, 4), (1, 16), (4, 1), (4, 4), (4, 16)):
        add("topk", f"{b} queries, k {k}", _topk, b, k)
    return found


CASES = _cases()

# Ops whose storage type does not depend on the model's dtype.
FIXED_DTYPE = {"gather_rows": torch.float16, "topk": torch.float16}
