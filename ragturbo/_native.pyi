"""ragturbo._native, built from csrc/: checked parallel reads, CRC-32, page-locked memory. Absent where not built."""

from collections.abc import Sequence
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Buffer

class Store:
    """Fixed-size records in many files, read in parallel into one buffer with the GIL released.

    Record r of segment s is the `payload_bytes` bytes at `header_bytes + r * record_bytes` of `paths[s]`.
    Opens every file at once (OSError naming the file, ValueError where one is too short for its count).
    Thread-safe; survives fork.
    """

    def __init__(
        self, paths: Sequence[str], *, header_bytes: int, record_bytes: int, payload_bytes: int, counts: Sequence[int]
    ) -> None: ...
    def read_into(
        self,
        segments: NDArray[np.int32] | None,
        rows: NDArray[np.int64],
        dst: Buffer,
        *,
        slots: NDArray[np.int64] | None = None,
        slot_bytes: int | None = None,
        expected_crc: NDArray[np.uint32] | None = None,
        threads: int = 2,
    ) -> list[tuple[int, str, str]]:
        """Read n records; record i goes to byte `slots[i] * slot_bytes` of dst (0..n-1 and payload_bytes if None).

        Without `segments`, rows are counted through all files.
        Returns the records that failed as (i, kind, detail), kind "io" | "short" | "crc"; empty means all are good.
        The bytes in the slot of a failed record are unspecified. With `expected_crc` each payload is checked as read.
        A segment, row or slot outside its range is an IndexError and two equal slots are a ValueError, before any read.
        """
    def close(self) -> None: ...
    def __enter__(self) -> Store: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    @property
    def closed(self) -> bool: ...

class PinnedArena:
    """`nbytes` of zeroed, 2 MiB-aligned memory, page-locked through the CUDA driver where there is one.

    Never an error for want of a GPU: `page_locked` says which it is and `reason` why not. The address never moves.
    Freed with the last reference, numpy views of the buffer included.
    """

    def __init__(self, nbytes: int, *, page_locked: bool = True, device: int = 0) -> None: ...
    @property
    def ptr(self) -> int: ...
    @property
    def device_ptr(self) -> int:
        """The address a kernel reads it by; 0 where it is not page-locked."""
    @property
    def nbytes(self) -> int: ...
    @property
    def page_locked(self) -> bool: ...
    @property
    def reason(self) -> str: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

def crc32(data: Buffer, value: int = 0) -> int:
    """zlib.crc32, faster."""

def build_info() -> dict[str, Any]:
    """compiler, crc32 ("pclmul" | "slice16"), cuda (toolkit version or ""), cuda_off (why there is none), archs."""

# The three below are there only where ragturbo was installed with nvcc: ask hasattr(_native, "gather_rows").
# Addresses are integers (tensor.data_ptr(), stream.cuda_stream); `*_at` is the device address of one int64, read by
# the kernel, so that a captured graph follows a database swap. Wrong arguments are ValueError, CUDA's own failures
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
    *count_at fp16 keys (·, dim) at *base_at, best first, the smaller row first among equals; two launches.

    k ≤ 32; dim a multiple of 8, ≤ 2048. Unfilled places are row -1, score NaN; a key whose product is NaN (a row
    taken out by writing NaN over its key, say) is never returned.
    """

def topk_workspace_bytes(*, queries: int, k: int) -> int:
    """Bytes of device memory `topk` needs to work in, on the current device."""
