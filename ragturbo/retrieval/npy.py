"""Arrays of ids as .npy files, read without numpy's reader.

numpy parses the header with Python's compiler. In CPython 3.11 that fails at times if two threads do it at once
(SystemError: AST constructor recursion depth mismatch).
"""

from __future__ import annotations

import io
import re
import struct

import numpy as np

_MAGIC = b"\x93NUMPY\x01\x00"
_HEADER = re.compile(rb"\{'descr': '<i8', 'fortran_order': False, 'shape': \((\d{1,18}),\), \} *\n")


def write_ids(ids: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(ids, "<i8"), allow_pickle=False)
    return buffer.getvalue()


def read_ids(raw: bytes) -> np.ndarray:
    """Return the (n,) int64 array of a file of `write_ids`. Raises ValueError for anything else."""
    start = len(_MAGIC) + 2
    if raw[: len(_MAGIC)] != _MAGIC or len(raw) < start:
        raise ValueError("it does not begin as a .npy file of version 1.0")
    end = start + struct.unpack_from("<H", raw, len(_MAGIC))[0]
    header = _HEADER.fullmatch(raw[start:end])
    if header is None:
        raise ValueError("its header is not that of a one-dimensional int64 array")
    count = int(header[1])
    if len(raw) != end + 8 * count:
        raise ValueError(f"its header says {count} ids, but {len(raw) - end} bytes follow")
    return np.frombuffer(raw, np.dtype("<i8"), offset=end).astype(np.int64)
