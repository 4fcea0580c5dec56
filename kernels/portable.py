"""tl.dot, casts, division and square root with the same result on a GPU and in Triton's interpreter."""

from __future__ import annotations

import triton
import triton.language as tl

from ragturbo.kernels import launch

_INTERPRET = tl.constexpr(launch.INTERPRET)


@triton.jit
def dot(a, b, acc):
    """a·b + acc in fp32, without TF32."""
    # The interpreter stores bf16 as 16-bit integers, and its tl.dot multiplies those.
    if _INTERPRET and a.dtype == tl.bfloat16:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def cast(x, dtype: tl.constexpr):
    """fp32 to the storage type, rounded to nearest, ties to even."""
    # The interpreter's own cast to bf16 truncates, and turns what is left of a subnormal into a normal number.
    if _INTERPRET and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
        x = tl.where(x == x, nearest, x)
    return x.to(dtype)


@triton.jit
def divide(a, b):
    """a / b in fp32, correctly rounded. `/` compiles to div.full.f32, which is off by up to 2 ulp, even for x / x."""
    return tl.div_rn(tl.cast(a, tl.float32), tl.cast(b, tl.float32))


@triton.jit
def inverse_sqrt(x):
    """1/√x in fp32, both steps correctly rounded. tl.sqrt and tl.rsqrt compile to approximations."""
    return divide(1.0, tl.sqrt_rn(x))
