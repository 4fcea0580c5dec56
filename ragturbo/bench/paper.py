"""The paper's figures with their sources, and the claims that its own figures do not support."""

from __future__ import annotations

import json
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
# How the bars are measured, and the models of random weights they are measured on.
PROFILES = ("paper", "turbo")
RANDOM_WEIGHTS = ("sd21", "rehearsal")


@lru_cache(maxsize=1)
def paper() -> dict[str, Any]:
    return json.loads(FILE.read_text("utf-8"))


def figure(name: str) -> float:
    return float(paper()["figures"][name]["value"])


def footnotes() -> list[str]:
    """Return one sentence for each claim that the paper's figures contradict."""
    notes = ((claim, _contradiction(claim)) for claim in paper()["claims"])
    return [f"{claim['place']}: {claim['says']}; {note}." for claim, note in notes if note is not None]


def _contradiction(claim: dict[str, Any]) -> str | None:
    of = figure(claim["of"])
    over = figure(claim["over"]) if "over" in claim else 0.0
    computed, unit = {
        "relative": lambda: ((of / over - 1) * 100, " %"),
        "difference": lambda: (of - over, ""),
        "ratio": lambda: (of / over, " times"),
        "value": lambda: (of, ""),
    }[claim["kind"]]()
    stated = float(claim["stated"])
    # Half of the last stated digit.
    tolerance = 0.5 * 10 ** -len(str(claim["stated"]).partition(".")[2]) + 1e-9
    if abs(computed - stated) <= tolerance:
        return None
    if claim["kind"] == "relative" and abs((of - over) * 100 - stated) <= tolerance:
        return f"that is the difference in points, relatively it is {computed:.1f} %"
    if claim["kind"] == "relative" and abs(-computed - stated) <= 0.5:
        return f"it is {-computed:.0f} % less, not more: the other is {(over / of - 1) * 100:.0f} % slower"
    return f"its own figures give {computed:.2f}{unit}"
