"""The words of captions and queries, as search by words compares them: lower case, singular, without stop words."""

from __future__ import annotations

import re
from functools import lru_cache

_WORD = re.compile(r"\w\w+")
# Lucene's list.
_STOP = frozenset(
    "a an and are as at be but by for if in into is it no not of on or such that the their then there these they this "
    "to was will with".split()
)
# Words of English that say how many, where, or that there is a picture. They are searched, but are never names.
_FUNCTION = frozenset(
    "about above across after against all along also am among another any around atop away back background because "
    "been before behind being below beneath beside between beyond both bottom can center centre close containing "
    "corner did do does down drawing during each edge eight either far featuring few five foreground four from front "
    "full had has have having he her here his how illustration image inside its itself just left less lots lower made "
    "many middle more most much my near nearby next nine off one only onto other our out outside over painting pair "
    "photo photograph picture placed render right same seen set seven several shot showing shown side six sketch so "
    "some standing ten than them three through together top toward towards two under underneath until up upon upper "
    "us very via view we were what when where which while who whose within without you your".split()
)


def words(text: str) -> list[str]:
    """Return the words of a text in order, repeated ones included."""
    return [singular(word) for word in _WORD.findall(text.lower()) if word not in _STOP]


def may_be_name(word: str) -> bool:
    """Whether a word from `words` can name what a picture shows."""
    return word not in _FUNCTION_SINGULAR


@lru_cache(1 << 16)
def singular(word: str) -> str:
    """Return one form for a noun's singular and its regular plural: zib, zibs; cross, crosses; city, cities.

    It need not be a word: "house" and "houses" both give "hou". Nothing shorter than four letters changes.
    """
    while len(word) > 3:
        if word[-1] == "s" and word[-2] != "s":
            word = word[:-1]
        elif word.endswith(("se", "xe", "ze", "che", "she", "oe")):
            word = word[:-1]
        elif word.endswith("ie"):
            word = word[:-2] + "y"
        else:
            break
    return word


_FUNCTION_SINGULAR = frozenset(map(singular, _FUNCTION))
