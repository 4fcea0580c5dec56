"""The noun phrases of a prompt, by rules of English: what `compose=True` searches for one by one."""

from __future__ import annotations

import re

from ragturbo.retrieval.words import may_be_name, words

_PICTURE = (
    "picture|photo|photograph|image|drawing|painting|illustration|rendering|render|sketch|scene|view|shot|close-up"
)
_OPENING = re.compile(
    r"^\s*(?:there (?:is|are)\s+|(?:(?:a|an|the)\s+)?"
    rf"(?:(?!(?:with|on|in|of|by|above|below|under|left|right)\b)[\w-]+\s+){{0,3}}(?:{_PICTURE})s?\s+(?:of|showing|with)\s+)",
    re.I,
)
# "on a plain white background", "in the distance".
_GROUND = re.compile(
    r"\b(?:on|in|against|over|with)\s+(?:(?:a|an|the)\s+)?(?:(?!in\b|on\b|of\b)[\w-]+\s+){0,2}"
    r"(?:background|ground|backdrop|foreground|distance)\b",
    re.I,
)
# Longer ones first. "of" does not separate: "a bowl of fruit".
_SEPARATOR = re.compile(
    r"\s*[,;:.!?()]\s*|\s+(?:and|or|plus|but|while|"
    r"(?:(?:to|on|at) the )?(?:left|right)(?:[ -]hand)?(?: side)? of|(?:to|on|at) the (?:top|bottom|side|edge) of|"
    r"in front of|in between|in the (?:middle|centre|center) of|on top of|next to|close to|far from|surrounded by|"
    r"above|below|under|underneath|beneath|beside|besides|behind|before|near|by|over|onto|on|upon|atop|into|inside|"
    r"within|in|at|against|along|across|around|among|between|beyond|through|towards?|from|to|without|with|"
    r"containing|holding|wearing|carrying|riding|watching|eating|chasing|facing|touching|covering|featuring|"
    r"has|have|having)(?=\s)\s*",
    re.I,
)
_COLOURS = frozenset(
    words("black white red green blue yellow orange purple pink brown grey gray golden silver dark light pale bright")
)
_LEADING = re.compile(r"^(?:(?:that|which|who|then|also|both|is|are)\s+)+", re.I)


def phrases(prompt: str) -> list[str]:
    """Return the noun phrases of a prompt in order: "two zibs left of a blue square" -> "two zibs", "a blue square".

    Openings ("a picture of"), grounds ("on a white background"), phrases of place alone ("the left") and what follows
    "without" are left out.
    """
    text = _GROUND.sub(" ", _OPENING.sub("", " ".join(prompt.split())))
    found: list[str] = []
    # " " in front, so that a prompt may begin with a preposition.
    text, start, negated, kept = f" {text} ", 0, False, ""
    for match in [*_SEPARATOR.finditer(text), None]:
        stop = len(text) if match is None else match.start()
        piece = _trimmed(f"{kept}{text[start:stop]}")
        content = [word for word in words(piece) if may_be_name(word)]
        kept = ""
        if match is not None and content and _COLOURS.issuperset(content):
            # An adjective belongs to the next noun: "a black and white cat".
            kept = f"{piece}{match[0]}"
        elif content and not negated:
            found.append(piece)
        if match is not None:
            start, negated = match.end(), match[0].strip().lower() == "without"
    return found


def _trimmed(piece: str) -> str:
    """Without leading conjunctions and trailing words that name nothing: "a zib standing" -> "a zib"."""
    parts = _LEADING.sub("", piece.strip()).split()
    while parts and not any(map(may_be_name, words(parts[-1]))):
        parts.pop()
    return " ".join(parts)
