"""Programmatic dependent launch (sm_90): a kernel is launched while the one before it still runs, and waits for it.

A kernel with a constexpr PDL calls `wait(PDL)` before it reads or writes any memory. Until then it may compute offsets
and prefetch weights into L2. A prefetch is harmless even if an earlier kernel is still writing the weights, because L2
is where all multiprocessors' writes meet, and nothing is kept in registers.

Every program waits, so that a kernel never ends before those ahead of it: the next one waits for this kernel only.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda

LINE_BITS = tl.constexpr(1024)


@triton.jit
def wait(PDL: tl.constexpr):
    """Wait for the results of the kernels ahead, then allow the next kernel to be launched.

    That happens when every program of this kernel has come this far, so the next kernel's programs take only places
    that are left over.
    """
    if PDL:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()


@triton.jit
def _prefetch(p, m):
    """Start copying the 128-byte lines at the pointers p into L2."""
    tl.inline_asm_elementwise(
        "{ .reg .pred q; setp.ne.s32 q, $2, 0; @q prefetch.global.L2 [$1]; mov.u32 $0, 0; }",
        "=r,l,r", [p.to(tl.int64, bitcast=True), m.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def prefetch_vector(ptr, first, N, LENGTH: tl.constexpr, PDL: tl.constexpr):
    """Prefetch elements `first` to first + LENGTH of a vector of N. ptr may be None."""
    if PDL and ptr is not None:
        LINE: tl.constexpr = LINE_BITS // ptr.dtype.element_ty.primitive_bitwidth
        i = first + tl.arange(0, LENGTH // LINE if LENGTH > LINE else 1) * LINE
        _prefetch(ptr + i, i < N)


@triton.jit
def prefetch_rows(ptr, i_n, m_n, stride, first, last, PDL: tl.constexpr):
    """Prefetch columns `first` to `last` of the rows i_n of a matrix."""
    if PDL:
        LINE: tl.constexpr = LINE_BITS // ptr.dtype.element_ty.primitive_bitwidth
        for k0 in range(first, last, 8 * LINE):
            i_k = k0 + tl.arange(0, 8) * LINE
            m = m_n[:, None] & (i_k < last)[None, :]
            _prefetch(ptr + i_n[:, None].to(tl.int64) * stride + i_k[None, :], m)
