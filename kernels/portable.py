"""tl.dot and casts that mean the same on a GPU and in Triton's interpreter, for every storage type."""

from __future__ import annotations

import triton
import triton.language as tl

from ragturbo.kernels import launch

_INTERPRET = tl.constexpr(launch.INTERPRET)


@triton.jit
def dot(a, b, acc):
    """a·b + acc in fp32; fp32 operands are never rounded to TF32."""
    # The interpreter keeps bf16 as 16-bit integers and its tl.dot multiplies those.
    if _INTERPRET and a.dtype == tl.bfloat16:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def cast(x, dtype: tl.constexpr):
    """fp32 to the storage type, to the nearest, ties to even."""
    # The interpreter's own cast to bf16 cuts the bits off, which doubles the error.
    if _INTERPRET and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
        x = tl.where(x == x, nearest, x)
    return x.to(dtype)
