"""After a kill, a full or a failing disk: the old generation or the new one, and the same bytes after a resume."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ragturbo import Database
from ragturbo.errors import DatabaseError, RagTurboError
from ragturbo.retrieval import durable

CHANGES = ["build", "append", "add_pair", "remove", "compact"]


def content(folder: Path) -> tuple | None:
    """Everything a reader can see, with every byte verified; None where there is no database yet."""
    if not (folder / "CURRENT").exists():
        with pytest.raises(DatabaseError, match="not a ragturbo database"):
            Database.open(folder)
        return None
    database = Database.open(folder, verify="full")
    ids = database.ids
    captions = [(r.id, r.caption, r.source, r.sha256) for r in database.records(ids, thumbnails=False)]
    return (
        ids.tolist(),
        captions,
        database.rows(ids).tobytes(),
        database.snapshot.keys[database.snapshot.alive].tobytes(),
    )


@pytest.fixture(scope="module")
def outcomes(plain, tmp_path_factory):
    """For each change: the contents before and after it, and the bytes of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole") / "db"
    found, start = {}, None
    for what in CHANGES:
        before = content(folder) if folder.exists() else None
        start = tmp_path_factory.mktemp("start") / what
        if folder.exists():
            shutil.copytree(folder, start)
        plain.change(what, folder, 7)
        found[what] = (start, before, content(folder), plain.tree(folder))
    return found


@pytest.mark.parametrize("what", CHANGES)
def test_a_kill_at_any_moment_leaves_old_or_new_and_a_resume_the_same_bytes(
    what, plain, outcomes, long_count, rng, tmp_path, record_property
):
    start, before, after, bytes_ = outcomes[what]
    kills = long_count(56)
    program = [sys.executable, str(Path(plain.__file__)), what]
    # From the first byte written to the last: how long that takes here, so that kills fall inside it.
    begun, ended = _span(program, start, tmp_path / "timed")
    olds = news = 0
    for i in range(kills):
        folder = tmp_path / f"{i}"
        if start.exists():
            shutil.copytree(start, folder)
        child = subprocess.Popen([*program, str(folder), "7"], stderr=subprocess.DEVNULL)
        _wait_for_first_write(child, folder)
        time.sleep(float(rng.uniform(0, 1.1)) * (ended - begun))
        child.send_signal(signal.SIGKILL)
        child.wait()
        seen = content(folder)
        assert seen in (before, after)
        olds, news = olds + (seen == before), news + (seen != before)
        # A build or an append that was committed is finished; the others run again on what they left.
        if seen == before or what == "build":
            plain.change(what, folder, 7)
            assert content(folder) == after
            assert plain.tree(folder) == bytes_
        shutil.rmtree(folder)
    record_property("kills", kills)
    record_property("left_old", olds)
    record_property("left_new", news)


def _span(program: list[str], start: Path, folder: Path) -> tuple[float, float]:
    if start.exists():
        shutil.copytree(start, folder)
    child = subprocess.Popen([*program, str(folder), "7"])
    _wait_for_first_write(child, folder)
    begun = time.monotonic()
    assert child.wait() == 0
    return begun, time.monotonic()


def _wait_for_first_write(child: subprocess.Popen, folder: Path) -> None:
    """Wait until the writer holds the lock, because it writes nothing before that."""
    lock = folder / "LOCK"
    held = None
    while child.poll() is None and held is None:
        if lock.exists():
            try:
                with durable.writer_lock(folder, patience=0):
                    pass
            except DatabaseError:
                held = True
        time.sleep(0.002)


class Failing:
    """Replaces one function of `os`, and fails at its n-th call as a failing disk does."""

    def __init__(self, name: str, at: int, how: str) -> None:
        self.real, self.at, self.how, self.calls = getattr(os, name), at, how, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        if self.calls < self.at:
            return self.real(*args, **kwargs)
        if self.how == "short":
            fd, data = args
            return self.real(fd, memoryview(data)[: max(1, len(data) // 3)])
        if self.calls == self.at or self.how == "ENOSPC":
            code = getattr(errno, self.how)
            raise OSError(code, os.strerror(code))
        return self.real(*args, **kwargs)


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("name, how", [("write", "ENOSPC"), ("write", "EIO"), ("fsync", "EIO"), ("rename", "EIO"),
                                       ("write", "short"), ("open", "EMFILE")])  # fmt: skip
def test_a_failing_disk_is_a_named_error_and_leaves_old_or_new(
    name, how, what, plain, outcomes, long_count, rng, tmp_path, monkeypatch, record_property
):
    start, before, after, bytes_ = outcomes[what]
    counted = Failing(name, 10**9, how)
    folder = tmp_path / "count"
    if start.exists():
        shutil.copytree(start, folder)
    monkeypatch.setattr(durable.os, name, counted)
    plain.change(what, folder, 7)
    monkeypatch.undo()
    assert plain.tree(folder) == bytes_
    moments = range(1, counted.calls + 1)
    chosen = sorted(rng.choice(moments, min(len(moments), long_count(40)), replace=False).tolist())
    for at in chosen:
        folder = tmp_path / f"{at}"
        if start.exists():
            shutil.copytree(start, folder)
        monkeypatch.setattr(durable.os, name, Failing(name, at, how))
        if how == "short":
            plain.change(what, folder, 7)
        else:
            with pytest.raises((RagTurboError, OSError)) as caught:
                plain.change(what, folder, 7)
            assert isinstance(caught.value, RagTurboError), caught.value
            assert str(folder) in str(caught.value)
        monkeypatch.undo()
        seen = content(folder)
        assert seen in (before, after)
        if seen == before or what == "build":
            plain.change(what, folder, 7)
            assert plain.tree(folder) == bytes_
        assert content(folder) == after
        shutil.rmtree(folder)
    record_property("injected", len(chosen))


def test_a_second_writer_is_refused_while_the_first_lives(plain, tmp_path):
    plain.change("build", tmp_path / "db", 7)
    database = Database.open(tmp_path / "db")
    with durable.writer_lock(tmp_path / "db"):
        with pytest.raises(DatabaseError, match="another process is writing"):
            database.remove([0])
    assert database.remove([0]) == 1


def test_the_writer_needs_neither_torch_nor_diffusers(tmp_path, plain):
    for what in CHANGES:
        subprocess.run([sys.executable, plain.__file__, what, str(tmp_path / "db"), "1"], check=True)
