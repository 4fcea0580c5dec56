"""Crash-safe writes: a file is renamed into place after its bytes are on disk and before another file refers to it.

Errors of the operating system are raised as `DatabaseError` with the file's path.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ragturbo.errors import DatabaseCorrupt, DatabaseError


@dataclass(frozen=True)
class FileSum:
    """Size and checksums of a file, as in the manifest."""

    bytes: int
    sha256: str
    crc32: int


@contextlib.contextmanager
def naming(path: str | os.PathLike[str], doing: str) -> Iterator[None]:
    """Raise OSErrors of the block as database errors that name `path` and what was done."""
    try:
        yield
    except FileNotFoundError as error:
        raise DatabaseCorrupt(f"{path}: {doing} failed: the file is missing") from error
    except OSError as error:
        raise DatabaseError(f"{path}: {doing} failed: {error.strerror or error}") from error


def _sync(path: Path, flags: int, doing: str) -> None:
    with naming(path, doing):
        fd = os.open(path, flags)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def sync_folder(path: Path) -> None:
    _sync(path, os.O_RDONLY | os.O_DIRECTORY, "syncing the folder")


def sync_file(path: Path) -> None:
    _sync(path, os.O_RDONLY, "syncing")


class NewFile:
    """A file that is written under a temporary name, with checksums, and renamed in `finish`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._partial = path.with_name(path.name + ".part")
        self._sha = hashlib.sha256()
        self._crc = 0
        self._size = 0
        with naming(self._partial, "creating"):
            self._fd: int | None = os.open(self._partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)

    def write(self, data: bytes | memoryview) -> None:
        assert self._fd is not None
        view = memoryview(data).cast("B")
        self._sha.update(view)
        self._crc = zlib.crc32(view, self._crc)
        with naming(self._partial, f"writing at byte {self._size}"):
            while view:
                written = os.write(self._fd, view)
                if written <= 0:
                    raise OSError("the system wrote 0 bytes")
                view, self._size = view[written:], self._size + written

    def finish(self) -> FileSum:
        assert self._fd is not None
        with naming(self._partial, "syncing"):
            os.fsync(self._fd)
            fd, self._fd = self._fd, None
            os.close(fd)
            os.rename(self._partial, self.path)
        return FileSum(self._size, self._sha.hexdigest(), self._crc)

    def discard(self) -> None:
        """Delete what was written."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
            with contextlib.suppress(OSError):
                os.unlink(self._partial)


def write_file(path: Path, data: bytes) -> FileSum:
    """Write the whole file or nothing. The caller must sync the folder."""
    file = NewFile(path)
    try:
        file.write(data)
        return file.finish()
    except BaseException:
        file.discard()
        raise


def sum_file(path: Path) -> FileSum:
    sha, crc, size = hashlib.sha256(), 0, 0
    with naming(path, "reading"), open(path, "rb", buffering=0) as file:
        while block := file.read(1 << 22):
            sha.update(block)
            crc = zlib.crc32(block, crc)
            size += len(block)
    return FileSum(size, sha.hexdigest(), crc)


def link_or_copy(source: Path, target: Path) -> None:
    """Hard-link a file that never changes, or copy it if the file system has no links."""
    with naming(target, f"linking {source}"):
        try:
            os.link(source, target)
        except OSError:
            shutil.copyfile(source, target)
            sync_file(target)


def remove_tree(path: Path) -> None:
    with naming(path, "deleting"):
        shutil.rmtree(path)


@contextlib.contextmanager
def writer_lock(folder: Path, name: str = "LOCK", patience: float = 2.0) -> Iterator[None]:
    """Allow one writer per database; wait up to `patience` seconds. The kernel releases the lock of a dead process."""
    path = folder / name
    with naming(path, "opening"):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        deadline = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise DatabaseError(
                        f"{folder}: another process is writing to this database; wait for it to end"
                    ) from None
            except OSError as error:
                raise DatabaseError(f"{path}: locking failed: {error.strerror}") from error
            time.sleep(0.02)
        yield
    finally:
        os.close(fd)
