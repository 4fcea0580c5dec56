"""What a build did: how many pairs it stored, which it skipped and why."""

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
    """`skipped` has an entry an item: its number in the input, its source and the reason."""

    path: str
    generation: int
    pairs: int
    skipped: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    encoded: int = 0
    """Pairs encoded in this run; the others were done before it resumed, or by other processes."""

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
            raise DatabaseCorrupt(f"{folder / FILE}: not a build's report: {error}") from error

    def save(self, folder: Path) -> None:
        """Beside CURRENT. Without times, so that a resumed build leaves the same bytes as an unbroken one."""
        body = {"generation": self.generation, "pairs": self.pairs, "skipped": self.skipped}
        durable.write_file(folder / FILE, (json.dumps(body, indent=1, sort_keys=True) + "\n").encode())
        durable.sync_folder(folder)
