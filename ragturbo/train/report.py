"""What a `ragturbo data` command made and what it left out. The shards hold it, so no kill loses any of it."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ragturbo.errors import InvalidRequest
from ragturbo.folders import make_folder
from ragturbo.messages import cut, many
from ragturbo.train.folder import INDEX, SKIPPED, shard_path

log = logging.getLogger("ragturbo")

_EXAMPLES, _REASONS = 5, 6
# Samples that are stored but worth knowing about: what is said of one, and of several.
_NOTES = {
    "cut_off": ("prompt is longer than the text encoder reads", "prompts are longer than the text encoder reads"),
    "unknown_words": ("prompt has words the model does not know", "prompts have words the model does not know"),
    "few_neighbors": ("sample has too few neighbours", "samples have too few neighbours"),
    "no_neighbors": ("sample has no neighbour", "samples have no neighbour"),
}  # fmt: skip


class Left:
    """The inputs of a shard that were left out, and notes on those that are in it."""

    def __init__(self) -> None:
        self.skipped: list[dict[str, Any]] = []
        self.notes: dict[str, dict[str, Any]] = {}

    def skip(self, item: int, source: Any, reason: str) -> None:
        """reason: its kind, then details after a colon."""
        self.skipped.append({"item": item, "source": None if source is None else str(source), "reason": reason[:500]})

    def note(self, kind: str, example: str, count: int = 1) -> None:
        entry = self.notes.setdefault(kind, {"count": 0, "examples": []})
        entry["count"] += count
        entry["examples"] = [*entry["examples"], cut(example, 200)][:_EXAMPLES]

    def note_tokens(self, prompts: Sequence[str], tokens: Any) -> None:
        """tokens: what `TextEncoder.tokenize` makes of the prompts."""
        for prompt, dropped, unknown in zip(prompts, tokens.dropped, tokens.unknown, strict=True):
            if dropped:
                self.note("cut_off", f"{many(dropped, 'token')} of {cut(prompt)!r}")
            if unknown:
                self.note("unknown_words", f"{', '.join(unknown)} in {cut(prompt)!r}")

    def merge(self, other: Mapping[str, Any]) -> None:
        """Add those of a later shard, in the form of `to_dict`."""
        self.skipped += other.get("skipped", [])
        for kind, theirs in other.get("notes", {}).items():
            entry = self.notes.setdefault(kind, {"count": 0, "examples": []})
            entry["count"] += theirs["count"]
            entry["examples"] = [*entry["examples"], *theirs["examples"]][:_EXAMPLES]

    def to_dict(self) -> dict[str, Any]:
        """Empty if there is nothing to say."""
        parts = {"skipped": self.skipped, "notes": self.notes}
        return {name: value for name, value in parts.items() if value}


@dataclass
class DataReport:
    """What a command made. `print(report)` says it in a few lines."""

    out: str
    made: int = 0
    """Shards that this process wrote in this run."""
    shards: int = 0
    """Shards of the folder."""
    missing: int = 0
    """Shards that are not there yet, because other processes make them."""
    samples: int = 0
    """Samples in the folder, by all runs and processes."""
    skipped: int = 0
    """Inputs that were left out."""
    reasons: dict[str, int] = field(default_factory=dict)
    """Number of skipped inputs by kind of reason, the most frequent first."""
    examples: list[dict[str, Any]] = field(default_factory=list)
    """The first skipped input of each kind."""
    skipped_list: str | None = None
    """A file with a line for each skipped input: its number, its source and the reason."""
    notes: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Facts about samples that are in the folder, by kind: their number and the first examples."""
    seconds: float = 0.0

    def lines(self) -> list[str]:
        """What was left out, and the notes; empty if there is nothing to say."""
        lines = []
        if self.skipped:
            lines.append(f"{self.out}: {self.skipped} of {many(self.samples + self.skipped, 'input')} left out:")
            for entry in self.examples[:_REASONS]:
                count = self.reasons[_kind(entry["reason"])]
                lines.append(f"  {f'{count} × ' if count > 1 else ''}{_item(entry)}")
            if rest := sum(self.reasons[_kind(entry["reason"])] for entry in self.examples[_REASONS:]):
                lines.append(f"  {rest} for other reasons")
            if self.skipped_list:
                lines.append(f"  all of them are in {self.skipped_list}")
        for kind, entry in self.notes.items():
            text = _NOTES[kind][entry["count"] > 1]
            said = "; ".join(entry["examples"][:2])
            lines.append(f"{self.out}: {entry['count']} {text}{f': {said}' if said else ''}")
        return lines

    def __str__(self) -> str:
        text = f"wrote {many(self.made, 'shard')} to {self.out}"
        if self.missing:
            return f"{text}; {self.missing} of {many(self.shards, 'shard')} are still missing"
        return f"{text}, which has {many(self.samples, 'sample')} in {many(self.shards, 'shard')}"

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def gather(
    out: Path, kind: str, shards: int, made: int, began: float, left_out: Sequence[dict[str, Any]] = ()
) -> DataReport:
    """Read the reports of all shards and log what they left out. The process that completes the folder also writes
    skipped.jsonl.

    Args:
        kind: what an input is.
        made: shards that this process wrote.
        began: `time.monotonic()` at its start.
        left_out: entries of inputs that were left out before they were divided into shards.

    Raises:
        InvalidRequest: all inputs were left out. The folder can be used again.
    """
    from ragturbo.train.shards import read_report

    paths = [shard_path(out, i) for i in range(shards)]
    here = [path for path in paths if path.is_file()]
    report = DataReport(str(out), made, shards, shards - len(here))
    left = Left()
    left.merge({"skipped": list(left_out)})
    for path in here:
        samples, theirs = read_report(path)
        report.samples += samples
        left.merge(theirs)
    report.skipped, report.notes = len(left.skipped), left.notes
    counts, first = count_reasons(left.skipped)
    report.reasons, report.examples = counts, list(first.values())
    if not report.missing:
        if left.skipped:
            report.skipped_list = str(out / SKIPPED)
            _write_list(out, left.skipped)
        else:
            # Of an earlier run with other settings.
            (out / SKIPPED).unlink(missing_ok=True)
        if not report.samples:
            # An index without samples would only refuse other settings.
            for path in (*paths, out / INDEX):
                path.unlink(missing_ok=True)
            raise InvalidRequest(none_left(kind, left.skipped, out / SKIPPED))
        for line in report.lines():
            log.warning("%s", line)
    report.seconds = time.monotonic() - began
    return report


def count_reasons(skipped: Iterable[dict[str, Any]]) -> tuple[dict[str, int], dict[str, dict[str, Any]]]:
    """By kind of reason, the most frequent first: how many inputs, and the first of them."""
    counts: dict[str, int] = {}
    first: dict[str, dict[str, Any]] = {}
    for entry in skipped:
        kind = _kind(entry["reason"])
        counts[kind] = counts.get(kind, 0) + 1
        first.setdefault(kind, entry)
    order = sorted(counts, key=lambda kind: -counts[kind])
    return {kind: counts[kind] for kind in order}, {kind: first[kind] for kind in order}


def none_left(kind: str, skipped: Sequence[dict[str, Any]], file: Path | None = None) -> str:
    """Say on one line why nothing is left."""
    counts, first = count_reasons(skipped)
    why = "; ".join(f"{counts[name]} × {_item(entry)}" for name, entry in list(first.items())[:3])
    see = "" if file is None else f". All of them are in {file}"
    return f"none of {many(len(skipped), kind)} can be used: {why}{see}"


def _write_list(out: Path, skipped: Iterable[dict[str, Any]]) -> None:
    make_folder(out)
    # Several processes may do this at once; all write the same bytes.
    part = out / f".{SKIPPED}.{os.getpid()}.part"
    try:
        with open(part, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(entry, ensure_ascii=False) + "\n" for entry in skipped)
        part.replace(out / SKIPPED)
    except OSError as error:
        raise InvalidRequest(f"{out / SKIPPED} cannot be written: {error.strerror or error}") from error


def _kind(reason: str) -> str:
    return reason.partition(":")[0]


def _item(entry: Mapping[str, Any]) -> str:
    kind, _, detail = str(entry["reason"]).partition(":")
    source = f" ({entry['source']})" if entry["source"] else ""
    return f"{kind}, such as input {entry['item']}{source}{f': {cut(detail, 200)}' if detail else ''}"
