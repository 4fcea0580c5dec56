"""Warnings about the texts of a request, with what retrieval found for the words that the model does not know."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING

import numpy as np

from ragturbo.errors import DatabaseError
from ragturbo.messages import cut
from ragturbo.retrieval.words import words

if TYPE_CHECKING:
    from ragturbo.engine.database import DatabaseGeneration
    from ragturbo.neighbor import Neighbor

_SHOWN = 60
_MOST_WORDS = 8


@dataclass(frozen=True)
class TextNote:
    """What the tokenizer reports of one text."""

    what: str
    """"prompt", "query" or "negative prompt"."""
    text: str
    dropped: int
    """Tokens beyond the text encoder's length."""
    unknown: tuple[str, ...]
    prompt: int | None
    """The number of the prompt whose neighbours the text decides; None if none."""
    joined: int = 0
    """Phrases that are searched as one, because there are too many."""

    def line(self, neighbors: Sequence[Neighbor] | None, database: DatabaseGeneration | None) -> str:
        """Write the note.

        Args:
            neighbors: of the prompt; None if nothing was retrieved, or the text has no influence on it.
            database: that was searched; None if the caller chose the neighbours.
        """
        parts = []
        if self.dropped:
            parts.append(f"its last {self.dropped} tokens were cut off")
        if self.joined:
            parts.append(f"its last {self.joined} phrases are searched as one")
        if unknown := self.unknown[:_MOST_WORDS]:
            where = None if neighbors is None else _places(unknown, neighbors, database)
            if where is None:
                parts.append(f"the model does not know: {', '.join(unknown)}")
            else:
                found = "; ".join(f"{word}: {place}" for word, place in zip(unknown, where, strict=True))
                parts.append(f"the model does not know {found}")
        return f"{self.what} {cut(self.text, _SHOWN)!r}: {'; '.join(parts)}"


def lines(
    notes: Iterable[str | TextNote], neighbors: Sequence[Sequence[Neighbor]] | None, database: DatabaseGeneration | None
) -> list[str]:
    """Write each note once. neighbors: of each prompt; None if nothing was retrieved."""
    written: dict[str, None] = {}
    for note in notes:
        if isinstance(note, TextNote):
            own = None if neighbors is None or note.prompt is None else neighbors[note.prompt]
            note = note.line(own, database)
        written[note] = None
    return list(written)


def _places(
    unknown: Sequence[str], neighbors: Sequence[Neighbor], database: DatabaseGeneration | None
) -> list[str] | None:
    try:
        return [_place(word, neighbors, database) for word in unknown]
    except DatabaseError:
        # The image is made: a damaged caption must not make its request fail.
        return None


def _place(word: str, neighbors: Sequence[Neighbor], database: DatabaseGeneration | None) -> str:
    """Say which pair has a word, in singular or plural."""
    forms = set(words(word))
    for neighbor in neighbors:
        if neighbor.used and forms and forms <= set(words(neighbor.caption or "")):
            return f"found in {_pair(neighbor)}"
    if database is None:
        return "not in the given pairs"
    id = _first_with(forms, database)
    return "not in the database" if id is None else f"in {_pair(database.neighbor(id))}, which was not used"


def _first_with(forms: set[str], database: DatabaseGeneration) -> int | None:
    """Return the lowest live id whose caption has all forms."""
    snapshot = database.database.snapshot
    if not forms:
        return None
    for start, pairs in zip(snapshot.segments.starts[:-1], snapshot.segments.pairs, strict=True):
        rows = reduce(np.intersect1d, (pairs.postings().of(form)[0] for form in forms)) + start
        rows = rows[snapshot.alive[rows]]
        if len(rows):
            return int(snapshot.ids[rows[0]])
    return None


def _pair(neighbor: Neighbor) -> str:
    return f"{'the given pair' if neighbor.id < 0 else f'pair {neighbor.id}'} {cut(neighbor.caption or '', _SHOWN)!r}"
