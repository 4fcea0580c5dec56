"""Several processes at one build, as torchrun starts them: each writes its own segments, the first commits."""

from __future__ import annotations

import contextlib
import os
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from ragturbo.errors import DatabaseError
from ragturbo.retrieval import durable
from ragturbo.retrieval.manifest import Manifest, load

# How long a process may be absent: one that died holds no lock and has announced nothing.
PATIENCE = 600.0


@dataclass(frozen=True)
class Rank:
    rank: int
    world: int

    @property
    def first(self) -> bool:
        return self.rank == 0

    def owns(self, position: int) -> bool:
        """Whether segment `position` of the build is this process's to write."""
        return position % self.world == self.rank

    def _lock_name(self, rank: int) -> str:
        return "LOCK" if rank == 0 else f"LOCK.{rank}"

    def lock(self, folder: Path) -> AbstractContextManager[None]:
        # The others look now and then whether this process lives, by taking its lock for a moment.
        return durable.writer_lock(folder, self._lock_name(self.rank), patience=2.0 if self.world == 1 else 30.0)

    def _marker(self, folder: Path, rank: int) -> Path:
        return folder / "segments" / f"rank-{rank}-of-{self.world}.done"

    def announce(self, folder: Path, job: str) -> None:
        durable.write_file(self._marker(folder, self.rank), job.encode())
        durable.sync_folder(folder / "segments")

    def _absent(self, folder: Path, rank: int) -> bool:
        try:
            with durable.writer_lock(folder, self._lock_name(rank), patience=0):
                return True
        except DatabaseError:
            return False

    def wait_for_others(self, folder: Path, job: str) -> None:
        for rank in range(1, self.world):
            marker, last_seen = self._marker(folder, rank), time.monotonic()
            while True:
                with contextlib.suppress(OSError):
                    if marker.read_bytes() == job.encode():
                        break
                if not self._absent(folder, rank):
                    last_seen = time.monotonic()
                elif time.monotonic() - last_seen > PATIENCE:
                    raise DatabaseError(
                        f"{folder}: process {rank} of {self.world} is gone without finishing; run again"
                    )
                time.sleep(0.2)

    def wait_for_commit(self, folder: Path, job: str) -> Manifest:
        last_seen = time.monotonic()
        while True:
            if (folder / "CURRENT").exists():
                manifest = load(folder)
                if manifest.job == job:
                    return manifest
            if not self._absent(folder, 0):
                last_seen = time.monotonic()
            elif time.monotonic() - last_seen > PATIENCE:
                raise DatabaseError(f"{folder}: the first process is gone without committing; run again")
            time.sleep(0.2)

    def clear(self, folder: Path) -> None:
        for rank in range(1, self.world):
            self._marker(folder, rank).unlink(missing_ok=True)


def current() -> Rank:
    """This process's place, from the environment torchrun sets; alone without it."""
    try:
        rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    except ValueError as error:
        raise DatabaseError(f"RANK and WORLD_SIZE must be whole numbers: {error}") from None
    if not 0 <= rank < world:
        raise DatabaseError(f"RANK={rank} is not below WORLD_SIZE={world}")
    return Rank(rank, world)
