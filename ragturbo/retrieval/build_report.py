"""The report of a build: how many pairs it stored, which it skipped and why."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ragturbo.errors import DatabaseCorrupt
from ragturbo.retrieval import durable

FILE = "build-report.json"


@dataclass
class BuildReport:
    """`skipped` has one entry per item: its number in the input, its source and the reason."""

    path: str
    generation: int
    pairs: int
    skipped: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    encoded: int = 0
    """Pairs encoded in this run, not in an earlier one or by another process."""

    @property
    def rate(self) -> float:
        return self.encoded / self.seconds if self.seconds else 0.0

    @classmethod
    def read(cls, folder: Path) -> BuildReport:
        with durable.naming(folder / FILE, "reading"):
            raw = (folder / FILE).read_bytes()
        try:
            body = json.loads(raw)
            return cls(str(folder), body["generation"], body["pairs"], body["skipped"])
        except (ValueError, KeyError, TypeError) as error:
            raise DatabaseCorrupt(f"{folder / FILE}: not the report of a build: {error}") from error

    def save(self, folder: Path) -> None:
        """Write the report, without times: a resumed build must leave the same bytes as an uninterrupted one."""
        body = {"generation": self.generation, "pairs": self.pairs, "skipped": self.skipped}
        durable.write_file(folder / FILE, (json.dumps(body, indent=1, sort_keys=True) + "\n").encode())
        durable.sync_folder(folder)
