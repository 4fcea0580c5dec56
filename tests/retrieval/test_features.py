"""The feature cache: the right bytes from every tier, within budget, and never changed under a reader."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ragturbo import Database
from ragturbo.errors import DatabaseCorrupt, InvalidRequest, Overloaded
from ragturbo.retrieval import FeatureCache, Geometry
from ragturbo.retrieval.slots import Frequencies, SlotTable

GEOMETRY = Geometry(4, 8, 64, "float16", 16)
N = 60


@pytest.fixture(scope="module")
def database(plain, tmp_path_factory) -> Database:
    folder = tmp_path_factory.mktemp("features") / "db"
    return Database.write(folder, [plain.encoded(N, 3, GEOMETRY)], geometry=GEOMETRY, segment_records=25)


def budget(rows: int) -> int:
    return rows * GEOMETRY.stride


@pytest.mark.parametrize("host, device", [(N, 0), (N, 5), (N, N), (7, 0), (7, 3), (1, 0)])
def test_rows_are_the_databases_whatever_fits(host, device, database, rng):
    cache = FeatureCache(database, host_bytes=budget(host), device_bytes=budget(device))
    for _ in range(40):
        ids = rng.integers(-1, N, (2, 5)) % (N + 1) - 1
        assert torch.equal(cache.rows(ids), database.features(ids))
    assert cache.host_rows.nbytes <= budget(host)
    assert cache.device_rows is None or cache.device_rows.nbytes <= budget(device)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_records_that_do_not_fill_their_stride_are_read_whole(dtype, plain, tmp_path):
    geometry = Geometry(3, 3, 7, dtype, 8)
    assert geometry.record_bytes < geometry.stride
    db = Database.write(tmp_path / "db", [plain.encoded(9, 1, geometry)], geometry=geometry)
    for rows in (9, 2):
        cache = FeatureCache(db, host_bytes=rows * geometry.stride)
        ids = [[3, 0], [8, -1]]
        assert torch.equal(cache.rows(ids), db.features(ids))
        assert not cache.rows([-1]).any()


def test_a_database_that_fits_is_read_once(database):
    cache = FeatureCache(database, host_bytes=budget(N))
    assert cache.resident
    cache.rows(range(N))
    assert cache.stats.disk_reads == 0 and cache.stats.host_hits == N


def test_what_is_asked_for_often_stays(database, rng):
    """Three favourites among a stream of one-time rows through eight slots."""
    cache = FeatureCache(database, host_bytes=budget(8))
    for i in range(300):
        cache.rows([i % 3])
        cache.rows([3 + i % (N - 3)])
    favourites = cache._table.row_slot[:3]
    assert (favourites >= 0).all()
    assert cache.stats.host_hits >= 290


def test_the_hot_set_is_promoted_to_the_device(database):
    cache = FeatureCache(database, host_bytes=budget(8), device_bytes=budget(3))
    for _ in range(3):
        cache.rows([1, 2])
    before = cache.stats.disk_reads
    cache.rows([1, 2])
    assert cache.stats.device_hits >= 2 and cache.stats.promoted == 2 and cache.stats.disk_reads == before


def test_the_base_addresses_never_move(database, rng):
    cache = FeatureCache(database, host_bytes=budget(6), device_bytes=budget(2))
    host, device = cache.host_ptr, cache.device_ptr
    for _ in range(50):
        cache.rows(rng.integers(0, N, 6))
    assert (cache.host_ptr, cache.device_ptr) == (host, device)
    assert host % 4096 == 0


def ask_often(cache: FeatureCache, ids: range) -> None:
    for _ in range(8):
        for i in ids:
            cache.rows([i])


def test_a_leased_row_is_not_overwritten_until_it_is_released(database):
    cache = FeatureCache(database, host_bytes=budget(6))
    lease = cache.lease([10, 11])
    held = cache.host_rows[lease.host_slots].copy()
    for i in range(N):
        cache.rows([i])
    np.testing.assert_array_equal(cache.host_rows[lease.host_slots], held)
    lease.release()
    ask_often(cache, range(30, 40))
    assert not np.array_equal(cache.host_rows[lease.host_slots], held)


class Event:
    """A CUDA event as the cache sees it."""

    def __init__(self) -> None:
        self.passed = False

    def query(self) -> bool:
        return self.passed


def test_a_row_a_kernel_still_reads_outlives_its_release(database):
    cache = FeatureCache(database, host_bytes=budget(4))
    event = Event()
    lease = cache.lease([20, 21])
    held = cache.host_rows[lease.host_slots].copy()
    lease.release(after=event)
    for i in range(N):
        cache.rows([i])
    np.testing.assert_array_equal(cache.host_rows[lease.host_slots], held)
    event.passed = True
    ask_often(cache, range(30, 40))
    assert not np.array_equal(cache.host_rows[lease.host_slots], held)


def test_a_full_cache_waits_for_a_release_and_then_refuses(database, monkeypatch):
    monkeypatch.setattr("ragturbo.retrieval.features._PATIENCE", 0.2)
    cache = FeatureCache(database, host_bytes=budget(3))
    lease = cache.lease([0, 1, 2])
    with pytest.raises(Overloaded, match="no free slot among 3"):
        cache.rows([5])
    threading.Timer(0.05, lease.release).start()
    assert torch.equal(cache.rows([5]), database.features([5]))
    with pytest.raises(InvalidRequest, match="4 rows at once do not fit in the 3"):
        cache.lease([0, 1, 2, 3])
    with pytest.raises(InvalidRequest, match="holds no row"):
        FeatureCache(database, host_bytes=100)


def test_a_damaged_row_is_named_and_the_next_request_is_unharmed(plain, tmp_path):
    db = Database.write(tmp_path / "db", [plain.encoded(12, 3, GEOMETRY)], geometry=GEOMETRY)
    path = tmp_path / "db" / "segments" / "000000.hseg"
    data = bytearray(path.read_bytes())
    data[GEOMETRY.offset(7) + 100] ^= 4
    path.write_bytes(data)
    cache = FeatureCache(db, host_bytes=budget(3))
    for _ in range(3):
        with pytest.raises(DatabaseCorrupt, match=r"000000.hseg: record 7 \(id 7\): .*"):
            cache.rows([6, 7])
        assert torch.equal(cache.rows([6, 5]), db.features([6, 5]))
    assert not cache._table.pins.any()
    with pytest.raises(DatabaseCorrupt, match="id 7"):
        FeatureCache(db, host_bytes=budget(12))


@pytest.mark.parametrize("device", [0, 6])
def test_sixteen_threads_read_what_is_stored_while_rows_come_and_go(device, database, long_count, rng):
    whole = database.features(range(N))
    seeds = rng.integers(0, 2**31, 16)
    errors: list[BaseException] = []

    cache = FeatureCache(database, host_bytes=budget(20), device_bytes=budget(device))

    def read(seed: int) -> None:
        own = np.random.default_rng(seed)
        try:
            for _ in range(long_count(400)):
                ids = own.zipf(1.3, own.integers(1, 5)) % N
                if own.random() < 0.3:
                    with cache.lease(ids) as lease:
                        time.sleep(0.0005)
                        for id, slot in zip(ids, lease.host_slots, strict=True):
                            if slot >= 0:
                                row = cache.host_rows[slot, : GEOMETRY.record_bytes]
                                assert np.array_equal(row.view(np.float16), whole[id].numpy().reshape(-1))
                else:
                    assert torch.equal(cache.rows(ids), whole[ids])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in seeds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors[0]
    assert not cache._table.pins.any()


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 12), st.lists(st.tuples(st.booleans(), st.integers(0, 19)), max_size=60))
def test_a_slot_table_never_gives_away_a_slot_in_use(count, steps):
    table, wanted = SlotTable(20, count), Frequencies(20, count)
    reading: list[tuple[int, int]] = []
    for release, row in steps:
        if release and reading:
            with table.lock:
                table.unpin(np.array([reading.pop(0)[1]]))
            continue
        wanted.add(np.array([row]))
        slot = int(table.row_slot[row])
        if slot >= 0:
            table.pin(np.array([slot]))
        elif table.can_place(1):
            slot = int(table.place(np.array([row]), wanted)[0])
            table.ready[slot] = True
        else:
            assert len({held for held, _ in reading}) >= count
            continue
        reading.append((row, slot))
        for held, where in reading:
            assert table.slot_row[where] == held and table.row_slot[held] == where
    used = table.slot_row[table.slot_row >= 0]
    assert len(set(used.tolist())) == len(used) <= count
