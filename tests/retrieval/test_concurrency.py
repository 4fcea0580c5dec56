"""Sixteen readers and a writer at once: every read is of one whole generation."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from ragturbo import Database
from ragturbo.errors import DatabaseError
from ragturbo.retrieval import Geometry, Record

GEOMETRY = Geometry(1, 1, 64, "float16", 16)


def batch(first: int, n: int) -> tuple:
    """Pair i has feature i everywhere and a key of its own, so that a wrong row shows."""
    ids = np.arange(first, first + n)
    keys = np.stack([np.random.default_rng(int(i)).standard_normal(16) for i in ids]).astype(np.float32)
    features = np.repeat((ids % 2000).astype(np.float32), 64).reshape(n, 1, 64)
    return [Record(0, f"pair {i}", f"site-{i % 7}") for i in ids], keys, features


@pytest.fixture
def often() -> Iterator[None]:
    """Threads switch fifty times as often. This gives more interleavings, and a writer, which releases the GIL at every
    system call, does not wait for the full switch intervals of sixteen readers each time."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(before)


def test_sixteen_readers_and_a_writer(plain, tmp_path, long_count, record_property, often):
    folder = tmp_path / "db"
    database = Database.write(folder, [batch(0, 60)], geometry=GEOMETRY, segment_records=16)
    # What a reader may see: the live ids of every generation that was ever current.
    history = [frozenset(database.ids.tolist())]
    stop, errors, reads = threading.Event(), [], []

    def read(number: int) -> None:
        rng = np.random.default_rng(number)
        mine, count = Database.open(folder), 0
        try:
            while not stop.is_set():
                if rng.random() < 0.3:
                    mine = Database.open(folder) if rng.random() < 0.5 else mine
                    mine.refresh()
                view = mine.frozen() if number % 2 else database.frozen()
                ids = view.ids
                assert frozenset(ids.tolist()) in history
                wanted = rng.choice(ids, min(6, len(ids)), replace=False)
                rows = view.rows(wanted).view(np.float16)
                assert (rows == (wanted % 2000)[:, None]).all()
                assert [record.caption for record in view.records(wanted)] == [f"pair {i}" for i in wanted]
                found, _ = view.search(batch(int(wanted[0]), 1)[1], 3)
                assert found[0, 0] == wanted[0] and set(found[0].tolist()) <= set(ids.tolist())
                count += 1
        except BaseException as error:
            errors.append(error)
        reads.append(count)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    rng = np.random.default_rng(1)
    changes = long_count(150)
    for _ in range(changes):
        if errors:
            break
        what = rng.choice(["append", "remove", "compact"])
        writer = Database.open(folder)
        ids = set(writer.ids.tolist())
        if what == "append" or len(ids) < 20:
            first = writer.snapshot.manifest.next_id
            history.append(frozenset(ids | set(range(first, first + 5))))
            plain.append_encoded(writer, [batch(first, 5)])
        elif what == "remove":
            gone = rng.choice(sorted(ids), 4, replace=False)
            history.append(frozenset(ids - set(gone.tolist())))
            writer.remove(gone)
        else:
            writer.compact()
        database.refresh()
    stop.set()
    for thread in threads:
        thread.join()
    assert not errors, errors[0]
    record_property("changes", changes)
    record_property("reads", sum(reads))


def test_of_two_writers_at_once_none_is_lost(plain, tmp_path, long_count):
    """Each change is in the final database, or was refused with an error that names the reason."""
    folder = tmp_path / "db"
    Database.write(folder, [batch(0, 20)], geometry=GEOMETRY)
    done = []

    def write() -> None:
        for _ in range(long_count(40)):
            try:
                plain.append_encoded(Database.open(folder), [batch(0, 2)])
                done.append(2)
            except DatabaseError as error:
                assert "another process is writing" in str(error)

    threads = [threading.Thread(target=write) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(Database.open(folder, verify="full")) == 20 + sum(done)
