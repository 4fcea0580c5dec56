"""The paper's figures with their sources, and the claims that its own figures do not support."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("paper.json")
# The bars of Fig. 6 by kind, and one more: without the cache of encoded pairs.
LABELS = {
    "teacher": "SD 2.1, 50 steps, CFG 7.5",
    "lcm": "LCM, 4 steps",
    "turbo": "SD Turbo, 1 step",
    "ours": "ImageRAGTurbo, 1 step",
    "uncached": "ours, pairs encoded at request",
}
ROWS = ("teacher", "lcm", "turbo", "ours")


@lru_cache(maxsize=1)
def paper() -> dict[str, Any]:
    return json.loads(FILE.read_text("utf-8"))


def figure(name: str) -> float:
    return float(paper()["figures"][name]["value"])


@dataclass(frozen=True)
class Claim:
    """A relative claim of the paper, and whether the paper's figures agree with it."""

    says: str
    place: str
    agrees: bool
    note: str


def claims() -> list[Claim]:
    return [_claim(entry) for entry in paper()["claims"]]


def footnotes() -> list[str]:
    """Return one sentence for each claim that the paper's figures contradict."""
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
    # Half of the last stated digit.
    tolerance = 0.5 * 10 ** -len(str(entry["stated"]).partition(".")[2]) + 1e-9
    agrees = abs(computed - stated) <= tolerance
    note = f"its own figures give {computed:.2f}{unit}"
    if not agrees and entry["kind"] == "relative":
        if abs((of - over) * 100 - stated) <= tolerance:
            note = f"that is the difference in points, relatively it is {computed:.1f} %"
        elif abs(-computed - stated) <= 0.5:
            note = f"it is {-computed:.0f} % less, not more: the other is {(over / of - 1) * 100:.0f} % slower"
    return Claim(entry["says"], entry["place"], agrees, note)
