"""Builds by several processes, started by torchrun: each writes its own segments, the first one commits.

The processes communicate through files and locks in the database's folder.
"""

from __future__ import annotations

import os
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from ragturbo.errors import DatabaseError
from ragturbo.retrieval import durable
from ragturbo.retrieval.manifest import Manifest, load

# Seconds after which a process without a lock, which also has not finished, counts as dead.
PATIENCE = 600.0


@dataclass
class Rank:
    """The rank of this process among the processes of a build."""

    rank: int
    world: int
    _absent_since: dict[int, float] = field(default_factory=dict)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def owns(self, position: int) -> bool:
        """Whether this process writes segment `position` of the build."""
        return position % self.world == self.rank

    def lock(self, folder: Path) -> AbstractContextManager[None]:
        # Other processes take this lock for a moment to see whether its owner is alive.
        return durable.writer_lock(folder, _lock_name(self.rank), patience=2.0 if self.world == 1 else 30.0)

    def _marker(self, folder: Path, rank: int) -> Path:
        return folder / "segments" / f"rank-{rank}-of-{self.world}.done"

    def announce(self, folder: Path, job: str) -> None:
        """Tell the first process that the segments of this one are complete."""
        durable.write_file(self._marker(folder, self.rank), job.encode())
        durable.sync_folder(folder / "segments")

    def wait_for_others(self, folder: Path, job: str) -> None:
        for rank in range(1, self.world):
            marker = self._marker(folder, rank)
            while not marker.exists() or marker.read_bytes() != job.encode():
                self._wait(folder, rank)

    def wait_for_commit(self, folder: Path, job: str) -> Manifest:
        while not (folder / "CURRENT").exists() or (manifest := load(folder)).job != job:
            self._wait(folder, 0)
        return manifest

    def _wait(self, folder: Path, rank: int) -> None:
        """Wait a moment. Raises DatabaseError if process `rank` has been absent for too long."""
        try:
            with durable.writer_lock(folder, _lock_name(rank), patience=0):
                pass
        except DatabaseError:
            # It holds its lock, so it is alive.
            self._absent_since.pop(rank, None)
        else:
            since = self._absent_since.setdefault(rank, time.monotonic())
            if time.monotonic() - since > PATIENCE:
                raise DatabaseError(f"{folder}: process {rank} of {self.world} ended before it finished; run again")
        time.sleep(0.2)

    def clear(self, folder: Path) -> None:
        for rank in range(1, self.world):
            self._marker(folder, rank).unlink(missing_ok=True)


def _lock_name(rank: int) -> str:
    return "LOCK" if rank == 0 else f"LOCK.{rank}"


def current() -> Rank:
    """Return rank and world size from the environment that torchrun sets; 0 of 1 without it."""
    try:
        rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    except ValueError as error:
        raise DatabaseError(f"RANK and WORLD_SIZE must be whole numbers: {error}") from None
    if not 0 <= rank < world:
        raise DatabaseError(f"RANK={rank} is not below WORLD_SIZE={world}")
    return Rank(rank, world)
