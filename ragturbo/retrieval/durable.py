"""Writing that survives a crash: whole files appear by rename, after their bytes and before what names them.

Every failure of the operating system becomes a `DatabaseError` that names the file.
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
    """Size and checksums of a finished file, as the manifest records them."""

    bytes: int
    sha256: str
    crc32: int


@contextlib.contextmanager
def naming(path: str | os.PathLike[str], doing: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise DatabaseCorrupt(f"{path}: {doing} failed: the file is missing") from error
    except OSError as error:
        raise DatabaseError(f"{path}: {doing} failed: {error.strerror or error}") from error


def write_all(fd: int, data: bytes | memoryview) -> None:
    """`os.write` until nothing is left: a short write is not an error, a write of nothing is."""
    view = memoryview(data).cast("B")
    while view:
        written = os.write(fd, view)
        if written <= 0:
            raise OSError("the system wrote 0 bytes")
        view = view[written:]


def sync_folder(path: Path) -> None:
    with naming(path, "syncing the folder"):
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


class NewFile:
    """A file that does not exist until `finish`: written beside its place, summed on the way, synced, renamed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._partial = path.with_name(path.name + ".part")
        self._sha = hashlib.sha256()
        self._crc = 0
        self.size = 0
        with naming(self._partial, "creating"):
            self._fd: int | None = os.open(self._partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)

    def write(self, data: bytes | memoryview) -> None:
        assert self._fd is not None
        with naming(self._partial, f"writing at byte {self.size}"):
            write_all(self._fd, data)
        self._sha.update(data)
        self._crc = zlib.crc32(data, self._crc)
        self.size += memoryview(data).nbytes

    def finish(self) -> FileSum:
        assert self._fd is not None
        with naming(self._partial, "syncing"):
            os.fsync(self._fd)
            fd, self._fd = self._fd, None
            os.close(fd)
            os.rename(self._partial, self.path)
        return FileSum(self.size, self._sha.hexdigest(), self._crc)

    def discard(self) -> None:
        """Drops what was written; the place of the file stays as it was."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
            with contextlib.suppress(OSError):
                os.unlink(self._partial)


def write_file(path: Path, data: bytes) -> FileSum:
    """The whole file or none of it. The folder is not synced: whoever writes several files syncs it once."""
    file = NewFile(path)
    try:
        file.write(data)
        return file.finish()
    except BaseException:
        file.discard()
        raise


def sum_file(path: Path) -> FileSum:
    """Size and checksums of a file as it is on disk."""
    sha, crc, size = hashlib.sha256(), 0, 0
    with naming(path, "reading"), open(path, "rb", buffering=0) as file:
        while block := file.read(1 << 22):
            sha.update(block)
            crc = zlib.crc32(block, crc)
            size += len(block)
    return FileSum(size, sha.hexdigest(), crc)


def sync_file(path: Path) -> None:
    with naming(path, "syncing"):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def link_or_copy(source: Path, target: Path) -> None:
    """The same immutable bytes under a second name: a hard link, or a copy where the file system has none."""
    with naming(target, f"linking {source}"):
        try:
            os.link(source, target)
        except OSError:
            shutil.copyfile(source, target)
            sync_file(target)


def remove_tree(path: Path) -> None:
    """Deletes a folder that no generation names any more."""
    with naming(path, "deleting"):
        shutil.rmtree(path)


def _locked(fd: int, path: Path) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise DatabaseError(f"{path}: locking failed: {error.strerror}") from error
    return True


@contextlib.contextmanager
def writer_lock(folder: Path, name: str = "LOCK", patience: float = 2.0) -> Iterator[None]:
    """One writer a database, waiting up to `patience` seconds. The kernel drops the lock with its process."""
    path = folder / name
    with naming(path, "opening"):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        deadline = time.monotonic() + patience
        while not _locked(fd, path):
            if time.monotonic() >= deadline:
                raise DatabaseError(f"{folder}: another process is writing to this database; wait for it to end")
            time.sleep(0.02)
        yield
    finally:
        os.close(fd)
