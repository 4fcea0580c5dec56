"""The report of a build or an append: what was skipped and why, and what was stored but is worth knowing."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ragturbo.errors import DatabaseCorrupt, DatabaseError
from ragturbo.messages import cut, many
from ragturbo.retrieval import durable

FILE = "build-report.json"
_EXAMPLES = 5
_GROUPS = 6
# What is counted, for one and for several, in the order in which it is said.
_KINDS = {
    "duplicate": ("pair has the caption and image of an earlier one", "pairs have caption and image of earlier ones"),
    "cut_off": ("caption is longer than the text encoder reads", "captions are longer than the text encoder reads"),
    "unknown_words": ("caption has words that the model does not know", "captions have words the model does not know"),
    "shared_text": ("caption file belongs to several images", "caption files belong to several images each"),
    "text_without_image": (".txt file has no image", ".txt files have no image"),
    "long_row": ("row has more fields than the header", "rows have more fields than the header"),
    "own_name": (
        "column is left out, because the database has its own of that name",
        "columns are left out, because the database has its own of those names",
    ),
    "empty_row": ("empty row is left out", "empty rows are left out"),
    "linked_folder": ("linked folder is not entered", "linked folders are not entered"),
    "ignored_file": ("other file is ignored", "other files are ignored"),
}


class Notes:
    """Counts of what is worth knowing about an input, by kind, each with its first examples."""

    def __init__(self) -> None:
        self._found: dict[str, dict[str, Any]] = {}

    def add(self, kind: str, example: str) -> None:
        entry = self._found.setdefault(kind, {"count": 0, "examples": []})
        entry["count"] += 1
        if len(entry["examples"]) < _EXAMPLES:
            entry["examples"].append(cut(example, 200))

    def merge(self, other: Mapping[str, Mapping[str, Any]]) -> None:
        """Add the notes of a later part of the input, in the form of `to_dict`."""
        for kind, theirs in other.items():
            entry = self._found.setdefault(kind, {"count": 0, "examples": []})
            entry["count"] += theirs["count"]
            entry["examples"] = [*entry["examples"], *theirs["examples"]][:_EXAMPLES]

    def to_dict(self) -> dict[str, dict[str, Any]]:
        return {kind: self._found[kind] for kind in _KINDS if kind in self._found}


@dataclass(repr=False)
class BuildReport:
    """What a build or an append did. `print(report)` says it in a few lines."""

    path: str
    generation: int
    pairs: int
    """Pairs that it stored."""
    skipped: list[dict[str, Any]] = field(default_factory=list)
    """One entry per item: its number in the input, its source and the reason."""
    seconds: float = 0.0
    encoded: int = 0
    """Pairs encoded in this run, not in an earlier one or by another process."""
    first_id: int = 0
    """Item i has id `first_id` + i."""
    total: int = 0
    """Pairs in the database afterwards, without removed ones."""
    notes: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Things that are stored or left out but worth knowing, by kind: their count and the first examples."""
    model: str | None = None
    """Name or folder of the model that encoded the pairs, if it is known."""
    already: bool = False
    """Whether an earlier run had committed the same change, so that this one stored nothing."""

    @property
    def items(self) -> int:
        """Items of the input."""
        return self.pairs + len(self.skipped)

    @property
    def ids(self) -> list[int]:
        """Ids of the pairs that were stored."""
        skipped = {entry["item"] for entry in self.skipped}
        return [self.first_id + item for item in range(self.items) if item not in skipped]

    @property
    def rate(self) -> float:
        return self.encoded / self.seconds if self.seconds else 0.0

    def lines(self) -> list[str]:
        """Say what was skipped and noted, each kind in one line; empty if there is nothing to say."""
        lines = []
        if self.skipped:
            lines.append(f"{len(self.skipped)} of {many(self.items, 'item')} skipped:")
            groups = _grouped(self.skipped)
            shown = len(groups) if len(groups) <= _GROUPS + 1 else _GROUPS
            lines += [f"  {_skip_line(group)}" for group in groups[:shown]]
            if rest := sum(map(len, groups[shown:])):
                lines.append(f"  {rest} for other reasons")
        for kind, (one, several) in _KINDS.items():
            if (entry := self.notes.get(kind)) is None:
                continue
            said = "; ".join(map(cut, entry["examples"][:2]))
            more = "; …" if entry["count"] > min(2, len(entry["examples"])) else ""
            lines.append(f"{entry['count']} {one if entry['count'] == 1 else several}: {said}{more}")
        if len(self.skipped) > 1 or any(entry["count"] > 2 for entry in self.notes.values()):
            lines.append(f"see {Path(self.path) / FILE}")
        return lines

    def __str__(self) -> str:
        done = "stored by an earlier run" if self.already else "stored"
        return "\n".join([f"{many(self.pairs, 'pair')} {done} in {self.path}", *self.lines()])

    def __repr__(self) -> str:
        noted = "".join(f", {kind}: {entry['count']}" for kind, entry in self.notes.items())
        return f"BuildReport({self.path!r}, pairs={self.pairs}, skipped: {len(self.skipped)}{noted})"

    @classmethod
    def read(cls, folder: Path) -> BuildReport:
        """Read the report of the last build or append.

        Raises:
            DatabaseCorrupt: there is none, or it is not a report.
        """
        with durable.naming(folder / FILE, "reading"):
            raw = (folder / FILE).read_bytes()
        try:
            body = json.loads(raw)
            if not isinstance(body.get("model"), (str, type(None))):
                raise TypeError("model is not a text")
            for entry in body.get("notes", {}).values():
                entry["count"] + 0, [cut(example) for example in entry["examples"]]
            return cls(
                str(folder), body["generation"], body["pairs"], list(body["skipped"]),
                first_id=body.get("first_id", 0), total=body.get("total", body["pairs"]),
                notes=dict(body.get("notes", {})), model=body.get("model"),
            )  # fmt: skip
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DatabaseCorrupt(f"{folder / FILE}: not the report of a build: {error}") from error

    @classmethod
    def find(cls, folder: Path) -> BuildReport | None:
        """Read the report; None if there is none or it is damaged, since no search depends on it."""
        try:
            return cls.read(folder)
        except DatabaseError:
            return None

    def save(self, folder: Path) -> None:
        """Write the report, without times: a resumed build must leave the same bytes as an uninterrupted one."""
        body = {
            "generation": self.generation, "pairs": self.pairs, "total": self.total, "first_id": self.first_id,
            "model": self.model, "skipped": self.skipped, "notes": self.notes,
        }  # fmt: skip
        durable.write_file(folder / FILE, (json.dumps(body, indent=1, sort_keys=True) + "\n").encode())
        durable.sync_folder(folder)


def none_stored(items: int, skipped: Mapping[str, Any] | None) -> str:
    """Say that nothing could be stored. skipped: the first entry of a report's `skipped`."""
    if skipped is None:
        return "the input has no pairs"
    return f"none of {many(items, 'item')} can be stored; the first: {item_line(skipped)}"


def item_line(entry: Mapping[str, Any]) -> str:
    return f"{_item(entry)}: {cut(entry['reason'], 300)}"


def _item(entry: Mapping[str, Any]) -> str:
    return f"item {entry['item']}" + ("" if entry["source"] is None else f" ({cut(str(entry['source']))})")


def _grouped(skipped: Iterable[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Entries by kind, the largest group first."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for entry in skipped:
        groups.setdefault(_kind(entry), []).append(entry)
    return sorted(groups.values(), key=len, reverse=True)


def _kind(entry: Mapping[str, Any]) -> str:
    """The reason without what differs from item to item: names of files, quoted texts and numbers."""
    reason, source = str(entry["reason"]), Path(str(entry["source"] or ""))
    if source.suffix:
        for own in (str(source), source.name, f"{source.stem}.txt"):
            reason = reason.replace(own, "…")
    return re.sub(r"'[^']*'|(?<!\S)/[^:;]*|(?<![-\w])(?:0x[0-9a-f]+|\d+(?:x\d+)?)", "…", reason)


def _skip_line(group: list[dict[str, Any]]) -> str:
    if len(group) == 1:
        return item_line(group[0])
    kind, first = _kind(group[0]), group[0]
    named = _item(first) if kind == first["reason"] else item_line(first)
    return f"{len(group)} × {cut(kind, 120)}; the first is {named}"
