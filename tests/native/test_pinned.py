"""_native.PinnedArena from Python: memory that does not move, is freed with its last view, and describes itself."""

from __future__ import annotations

import ctypes.util

import numpy as np
import pytest

_native = pytest.importorskip("ragturbo._native", reason="installed without the native module: see `ragturbo info`")


def test_the_arena_lives_as_long_as_its_last_view() -> None:
    arena = _native.PinnedArena(3 << 20)
    view = np.frombuffer(arena, np.uint8)
    assert view.nbytes == 3 << 20 and view.ctypes.data % (2 << 20) == 0
    assert not view.any() and view.flags.writeable
    tail = view[-5:]
    del arena, view
    tail[:] = 7
    assert tail.sum() == 35


def test_without_a_driver_it_is_plain_memory_and_says_why() -> None:
    arena = _native.PinnedArena(100)
    if arena.page_locked:
        assert arena.device_ptr and arena.reason == ""
    else:
        assert arena.device_ptr == 0 and arena.reason
    if ctypes.util.find_library("cuda") is None and not arena.page_locked:
        assert "no CUDA driver" in arena.reason


@pytest.mark.parametrize("nbytes", [0, -1, 2.5, "8GiB"])
def test_sizes_that_make_no_sense_are_refused(nbytes: object) -> None:
    with pytest.raises((ValueError, TypeError)):
        _native.PinnedArena(nbytes)


def test_more_than_the_machine_has_is_a_memory_error() -> None:
    with pytest.raises(MemoryError):
        _native.PinnedArena(1 << 60)


def test_records_are_read_straight_into_it(tmp_path) -> None:
    data = np.random.default_rng(0).integers(0, 256, (8, 4096), dtype=np.uint8)
    data.tofile(tmp_path / "rows")
    store = _native.Store([str(tmp_path / "rows")], header_bytes=0, record_bytes=4096, payload_bytes=4096, counts=[8])
    arena = _native.PinnedArena(8 * 4096)
    assert store.read_into(np.arange(8)[::-1].copy(), arena) == []
    np.testing.assert_array_equal(np.frombuffer(arena, np.uint8).reshape(8, 4096), data[::-1])
