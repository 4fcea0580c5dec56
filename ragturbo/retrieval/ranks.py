"""Builds by several processes, started by torchrun: each writes its own segments, the first one commits.

The processes communicate through files and locks in the database's folder.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ragturbo.errors import DatabaseError
from ragturbo.retrieval import durable
from ragturbo.retrieval.manifest import Manifest, load

T = TypeVar("T")
# Seconds after which a process without a lock, which also has not finished, counts as dead.
PATIENCE = 600.0


@dataclass(frozen=True)
class Rank:
    rank: int
    world: int

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

            def announced(marker: Path = marker) -> bool | None:
                with contextlib.suppress(OSError):
                    return marker.read_bytes() == job.encode() or None
                return None

            _wait(folder, rank, announced, f"process {rank} of {self.world} ended before it finished; run again")

    def wait_for_commit(self, folder: Path, job: str) -> Manifest:
        def committed() -> Manifest | None:
            manifest = load(folder) if (folder / "CURRENT").exists() else None
            return manifest if manifest is not None and manifest.job == job else None

        return _wait(folder, 0, committed, "the first process ended without a commit; run again")

    def clear(self, folder: Path) -> None:
        for rank in range(1, self.world):
            self._marker(folder, rank).unlink(missing_ok=True)


def _lock_name(rank: int) -> str:
    return "LOCK" if rank == 0 else f"LOCK.{rank}"


def _wait(folder: Path, rank: int, ready: Callable[[], T | None], problem: str) -> T:
    """Wait until `ready` returns a value, as long as process `rank` is alive."""
    last_seen = time.monotonic()
    while (found := ready()) is None:
        try:
            with durable.writer_lock(folder, _lock_name(rank), patience=0):
                alive = False
        except DatabaseError:
            alive = True
        if alive:
            last_seen = time.monotonic()
        elif time.monotonic() - last_seen > PATIENCE:
            raise DatabaseError(f"{folder}: {problem}")
        time.sleep(0.2)
    return found


def current() -> Rank:
    """Return rank and world size from the environment that torchrun sets; 0 of 1 without it."""
    try:
        rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    except ValueError as error:
        raise DatabaseError(f"RANK and WORLD_SIZE must be whole numbers: {error}") from None
    if not 0 <= rank < world:
        raise DatabaseError(f"RANK={rank} is not below WORLD_SIZE={world}")
    return Rank(rank, world)
