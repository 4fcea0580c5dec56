"""_native.crc32 is zlib.crc32, whatever the length, the alignment and the way the data are cut."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

_native = pytest.importorskip("ragturbo._native", reason="installed without the native module: see `ragturbo info`")


@settings(deadline=None)
@given(st.binary(max_size=2000), st.integers(0, 2**32 - 1))
def test_crc32_is_zlibs(data: bytes, value: int) -> None:
    assert _native.crc32(data, value) == zlib.crc32(data, value)


@settings(deadline=None)
@given(st.binary(max_size=3000), st.lists(st.integers(0, 3000), max_size=5))
def test_crc32_does_not_depend_on_the_cuts(data: bytes, cuts: list[int]) -> None:
    value, at = 0, 0
    for cut in [*sorted(cuts), len(data)]:
        value = _native.crc32(memoryview(data)[at:cut], value)
        at = max(at, min(cut, len(data)))
    assert value == zlib.crc32(data)


def test_crc32_reads_any_contiguous_buffer_and_no_other(rng: np.random.Generator) -> None:
    rows = rng.standard_normal((64, 33)).astype(np.float16)
    assert _native.crc32(rows) == _native.crc32(bytearray(rows.tobytes())) == zlib.crc32(rows)
    with pytest.raises((BufferError, ValueError), match="contiguous"):
        _native.crc32(rows[:, ::2])
    with pytest.raises(TypeError):
        _native.crc32("text")
