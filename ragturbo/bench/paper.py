"""The paper's figures, each with its place, and what follows from them: where text and tables disagree, we say so."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("paper.json")
ROWS = ("teacher", "lcm", "turbo", "ours")


@lru_cache(maxsize=1)
def paper() -> dict[str, Any]:
    return json.loads(FILE.read_text("utf-8"))


def figure(name: str) -> float:
    return float(paper()["figures"][name]["value"])


@dataclass(frozen=True)
class Claim:
    says: str
    place: str
    stated: float
    computed: float
    unit: str
    """What the paper's own figures give."""
    agrees: bool
    """As far as the stated digits go."""
    note: str


def claims() -> list[Claim]:
    """Every relative claim of the paper, computed again from its own figures."""
    return [_claim(entry) for entry in paper()["claims"]]


def footnotes() -> list[str]:
    """One sentence for each place where the paper disagrees with itself."""
    return [f"{c.place}: {c.says}; {c.note}." for c in claims() if not c.agrees]


def _claim(entry: dict[str, Any]) -> Claim:
    of = figure(entry["of"])
    over = figure(entry["over"]) if "over" in entry else 0.0
    computed, unit = {
        "relative": lambda: ((of / over - 1) * 100, " %"),
        "difference": lambda: (of - over, ""),
        "ratio": lambda: (of / over, " times"),
        "value": lambda: (of, ""),
    }[entry["kind"]]()
    stated = float(entry["stated"])
    digits = len(str(entry["stated"]).partition(".")[2])
    # A figure given to n digits stands for all that lies within half of its last one.
    agrees = abs(computed - stated) <= 0.5 * 10**-digits + 1e-9
    note = f"its own figures give {computed:.2f}{unit}"
    if not agrees and entry["kind"] == "relative":
        points = (of - over) * 100
        if abs(points - stated) <= 0.5 * 10**-digits + 1e-9:
            note = f"that is the difference in points, relatively it is {computed:.1f} %"
        elif abs(-computed - stated) <= 0.5:
            note = f"it is {-computed:.0f} % less, not more: the other is {(over / of - 1) * 100:.0f} % slower"
    return Claim(entry["says"], entry["place"], stated, computed, unit, agrees, note)
