"""_native.Store from Python: the right rows, named failures, refusals before any read, threads and forks."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

_native = pytest.importorskip("ragturbo._native", reason="installed without the native module: see `ragturbo info`")


HEADER, RECORD, PAYLOAD, COUNTS = 512, 384, 320, (40, 1, 25)


@pytest.fixture(scope="module")
def segments(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], list[np.ndarray]]:
    folder = tmp_path_factory.mktemp("segments")
    generator = np.random.default_rng(0)
    paths, tables = [], []
    for i, count in enumerate(COUNTS):
        data = generator.integers(0, 256, HEADER + count * RECORD + 100, dtype=np.uint8)
        data.tofile(folder / f"{i}.hseg")
        paths.append(str(folder / f"{i}.hseg"))
        tables.append(data[HEADER : HEADER + count * RECORD].reshape(count, RECORD)[:, :PAYLOAD])
    return paths, tables


def open_store(paths: list[str], counts: tuple[int, ...] = COUNTS) -> Any:
    return _native.Store(paths, header_bytes=HEADER, record_bytes=RECORD, payload_bytes=PAYLOAD, counts=counts)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.data(),
    wanted=st.lists(st.integers(0, sum(COUNTS) - 1), max_size=40),
    spare=st.integers(0, 64),
    threads=st.integers(1, 4),
)
def test_any_rows_in_any_slots(segments, data, wanted, spare, threads) -> None:
    paths, tables = segments
    every = np.concatenate(tables)
    slots = data.draw(st.permutations(range(len(wanted) + 3)))[: len(wanted)]
    slot_bytes = PAYLOAD + spare
    dst = np.full((len(wanted) + 3, slot_bytes), 0xAA, np.uint8)
    rows = np.array(wanted, np.int64)
    crcs = np.array([zlib.crc32(every[r]) for r in wanted], np.uint32)
    failures = open_store(paths).read_into(
        rows, dst, slots=np.array(slots, np.int64), slot_bytes=slot_bytes, expected_crc=crcs, threads=threads
    )
    assert failures == []
    expected = np.full_like(dst, 0xAA)
    for r, slot in zip(wanted, slots, strict=True):
        expected[slot, :PAYLOAD] = every[r]
    np.testing.assert_array_equal(dst, expected)


def test_failures_are_named_and_the_others_are_read(segments, tmp_path: Path) -> None:
    paths, tables = segments
    cut = tmp_path / "cut.hseg"
    whole = Path(paths[0]).read_bytes()
    cut.write_bytes(whole)
    store = open_store([str(cut)], COUNTS[:1])
    os.truncate(cut, HEADER + 30 * RECORD + 7)
    rows = np.array([3, 30, 39, 4], np.int64)
    crcs = np.array([zlib.crc32(tables[0][r]) for r in rows], np.uint32)
    crcs[3] ^= 1
    dst = np.zeros((4, PAYLOAD), np.uint8)
    failures = store.read_into(rows, dst, expected_crc=crcs)
    assert [(i, kind) for i, kind, _ in failures] == [(1, "short"), (2, "short"), (3, "crc")]
    assert str(HEADER + 30 * RECORD + 7) in failures[0][2] and f"{crcs[3]:#010x}" in failures[2][2]
    np.testing.assert_array_equal(dst[0], tables[0][3])


def test_a_file_that_cannot_be_opened_or_is_too_short_is_named(segments, tmp_path: Path) -> None:
    paths, _ = segments
    with pytest.raises(FileNotFoundError) as missing:
        open_store([paths[0], str(tmp_path / "none.hseg"), paths[2]])
    assert missing.value.filename == str(tmp_path / "none.hseg")
    with pytest.raises(ValueError, match=r"1\.hseg.*2 records need 1280"):
        open_store(paths, (40, 2, 25))


def test_bad_requests_are_refused_before_a_byte_is_written(segments) -> None:
    store = open_store(segments[0])
    dst = np.full((2, PAYLOAD), 0xAA, np.uint8)

    def read(rows: Any = (0, 1), into: Any = dst, **more: Any) -> None:
        store.read_into(np.array(rows, np.int64), into, **more)

    for bad in (
        {"rows": (0, sum(COUNTS))},
        {"rows": (0, -1)},
        {"rows": (0, 2**63 - 1)},
        {"slots": np.array([0, 2])},
    ):
        with pytest.raises(IndexError):
            read(**bad)
    for bad in (
        {"slots": np.array([1, 1])},
        {"slots": np.array([1])},
        {"threads": 0},
        {"slot_bytes": PAYLOAD - 1},
        {"expected_crc": np.zeros(3, np.uint32)},
    ):
        with pytest.raises(ValueError):
            read(**bad)
    with pytest.raises(TypeError):
        store.read_into(np.zeros(2, np.int32), dst)
    for bad in ({"slots": np.array([0.0, 1.0])}, {"expected_crc": np.zeros(2, np.int64)}, {"into": 5}):
        with pytest.raises(TypeError):
            read(**bad)
    frozen = np.zeros((2, PAYLOAD), np.uint8)
    frozen.flags.writeable = False
    with pytest.raises((ValueError, BufferError)):
        read(into=frozen)
    with pytest.raises((ValueError, BufferError)):
        read(into=np.zeros((2, 2 * PAYLOAD), np.uint8)[:, ::2])
    assert (dst == 0xAA).all()


LARGE = 160 * 1024


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_few_large_records_are_read_in_parts_and_a_failed_one_is_told_once(threads: int, tmp_path: Path) -> None:
    path, count = tmp_path / "large.hseg", 3
    table = np.random.default_rng(1).integers(0, 256, (count, LARGE), dtype=np.uint8)
    path.write_bytes(bytes(HEADER) + table.tobytes())
    store = _native.Store([str(path)], header_bytes=HEADER, record_bytes=LARGE, payload_bytes=LARGE - 7, counts=[count])
    os.truncate(path, HEADER + 2 * LARGE + 10_000)
    for rows in ([1], [1, 0], [0, 1, 2], [2]):
        dst = np.full((len(rows), LARGE), 0xAA, np.uint8)
        failures = store.read_into(np.array(rows, np.int64), dst, slot_bytes=LARGE, threads=threads)
        assert [(rows[i], kind) for i, kind, _ in failures] == [(2, "short")] * rows.count(2)
        for i, r in enumerate(rows):
            assert r == 2 or ((dst[i, :-7] == table[r, :-7]).all() and (dst[i, -7:] == 0xAA).all())


def test_rows_counted_through_all_files_are_the_same_rows(segments) -> None:
    paths, tables = segments
    every = np.concatenate(tables)
    rows = np.random.default_rng(2).permutation(len(every))
    dst = np.zeros((len(every), PAYLOAD), np.uint8)
    assert open_store(paths).read_into(rows, dst) == []
    np.testing.assert_array_equal(dst, every[rows])
    for bad in (-1, len(every)):
        with pytest.raises(IndexError, match=f"row {bad} of {len(every)}"):
            open_store(paths).read_into(np.array([0, bad]), dst)


def test_sixteen_threads_share_a_store(segments, long_count) -> None:
    paths, tables = segments
    store, wrong = open_store(paths), []

    def reader(seed: int) -> None:
        generator = np.random.default_rng(seed)
        for _ in range(long_count(200)):
            rows = generator.integers(0, COUNTS[0], 20)
            dst = np.zeros((20, PAYLOAD), np.uint8)
            if store.read_into(rows, dst, threads=3) or (dst != tables[0][rows]).any():
                wrong.append(seed)

    readers = [threading.Thread(target=reader, args=(seed,)) for seed in range(16)]
    for thread in readers:
        thread.start()
    for thread in readers:
        thread.join()
    assert wrong == []


FORK = """
import os, sys
import numpy as np
from ragturbo import _native

store = _native.Store(sys.argv[1:], header_bytes=512, record_bytes=384, payload_bytes=320, counts=[40])
rows = np.arange(40)

def read():
    dst = np.zeros((40, 320), np.uint8)
    assert store.read_into(rows, dst, threads=4) == []
    return dst

before = read()
child = os.fork()
if child == 0:
    os._exit(0 if (read() == before).all() else 1)
assert (read() == before).all()
assert os.waitpid(child, 0)[1] == 0
"""


def test_a_forked_child_reads_too(segments) -> None:
    """Data loaders fork; the parent's threads do not come along."""
    subprocess.run([sys.executable, "-c", FORK, segments[0][0]], check=True, timeout=60)
