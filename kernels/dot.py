"""tl.dot for every storage type: fp32 products are never rounded to TF32, and bf16 is right in the interpreter too."""

from __future__ import annotations

import triton
import triton.language as tl

from ragturbo.kernels import launch

_INTERPRET = tl.constexpr(launch.INTERPRET)


@triton.jit
def dot(a, b, acc):
    # The interpreter keeps bf16 as 16-bit integers and its tl.dot multiplies those.
    if _INTERPRET and a.dtype == tl.bfloat16:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")
