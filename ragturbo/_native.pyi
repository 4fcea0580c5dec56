"""ragturbo._native, built from csrc/: checked parallel reads, CRC-32, page-locked memory, layers. Optional."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Buffer

class Store:
    """Fixed-size records in many files, read in parallel into one buffer without the GIL. Thread-safe; survives fork.

    Record r of a file is the `payload_bytes` bytes at `header_bytes + r * record_bytes`. All files are opened at once:
    OSError with the path, or ValueError if a file is too short for its count.
    """

    def __init__(
        self, paths: Sequence[str], *, header_bytes: int, record_bytes: int, payload_bytes: int, counts: Sequence[int]
    ) -> None: ...
    def read_into(
        self,
        rows: NDArray[np.int64],
        dst: Buffer,
        *,
        slots: NDArray[np.int64] | None = None,
        slot_bytes: int | None = None,
        expected_crc: NDArray[np.uint32] | None = None,
        threads: int = 2,
    ) -> list[tuple[int, str, str]]:
        """Read records `rows`, counted through all files; record i goes to byte `slots[i] * slot_bytes` of dst.

        slots and slot_bytes default to 0..n-1 and payload_bytes. Returns failed records as (i, kind, detail), kind
        "io" | "short" | "crc"; their slots hold undefined bytes. Before any read, a row or slot out of range raises
        IndexError and two equal slots raise ValueError.
        """

class PinnedArena:
    """`nbytes` of zeroed, 2 MiB-aligned memory, page-locked through the CUDA driver if there is one.

    Without a GPU it is ordinary memory and `reason` says why. The address never changes. Freed with the last
    reference, numpy views of the buffer included.
    """

    def __init__(self, nbytes: int) -> None: ...
    @property
    def device_ptr(self) -> int:
        """Address for kernels; 0 if it is not page-locked."""
    @property
    def page_locked(self) -> bool: ...
    @property
    def reason(self) -> str: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

def crc32(data: Buffer, value: int = 0) -> int:
    """zlib.crc32, faster."""

def build_info() -> dict[str, Any]:
    """compiler, crc32 ("pclmul" | "slice16"), threads of the layers ("openmp", which is torch's, or "pool"), cuda
    (toolkit version or ""), cuda_off (why there is none), archs."""

# Layers on a CPU: addresses are integers (tensor.data_ptr()), weights fp32, data fp32 or bf16; 0 for no bias.

def group_norm(
    *,
    x: int,
    out: int,
    bf16: bool,
    batch: int,
    pixels: int,
    channels: int,
    groups: int,
    weight: int,
    bias: int,
    add_bias: int,
    eps: float,
    silu: bool,
    threads: int,
) -> None:
    """SiLU(GroupNorm(x + add_bias)), x and out (batch, pixels, channels)."""

def geglu(*, x: int, out: int, bf16: bool, rows: int, width: int, bias: int, threads: int) -> None:
    """value · gelu(gate), x (rows, 2 · width), bias (2 · width), out (rows, width)."""

def interleave(*, phases: int, out: int, batch: int, h: int, w: int, bytes: int, threads: int) -> None:
    """Phases (batch, h + 1, w + 1, 4, bytes) to pixels (batch, 2h, 2w, bytes)."""

# The functions below exist only if ragturbo was installed with nvcc: check hasattr(_native, "gather_rows").
# Addresses are integers (tensor.data_ptr(), stream.cuda_stream); `*_at` is the device address of one int64 that the
# kernel reads, so that a captured graph follows a database swap. Bad arguments raise ValueError, CUDA errors
# RuntimeError. They launch on `stream` of the current device and allocate nothing.

def gather_rows(
    *,
    base_at: int,
    count_at: int,
    ids: int,
    n: int,
    tokens: int,
    channels: int,
    stride: int,
    stored: str,
    out: int,
    stream: int,
) -> None:
    """out (n, tokens, channels) fp16: rows ids (int64) of the table at *base_at, zeros for an id not in 0..*count_at-1.

    Rows are `stride` bytes apart, in device or page-locked memory. stored: "float16", or "int8" (tokens·channels int8,
    then `tokens` fp32 scales). channels: a multiple of 8, or of 16 for int8.
    """

def topk(
    *,
    base_at: int,
    count_at: int,
    query: int,
    queries: int,
    dim: int,
    k: int,
    rows: int,
    scores: int,
    workspace: int,
    workspace_bytes: int,
    stream: int,
) -> None:
    """rows int64, scores fp32 (queries, k): the k largest inner products of query fp32 (queries ≤ 4, dim) with the
    *count_at fp16 keys (·, dim) at *base_at, best first, equal scores by ascending row; two launches.

    k ≤ 32; dim a multiple of 8, ≤ 2048. Unused places are row -1, score NaN; a key whose product is NaN (such as the
    key of a removed row) is never returned.
    """

def topk_workspace_bytes(*, queries: int, k: int) -> int:
    """Size in bytes of the workspace that `topk` needs on the current device."""
