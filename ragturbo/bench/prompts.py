"""A fixed list of different prompts, the same on every machine."""

from __future__ import annotations

import itertools

_SUBJECTS = ("a red fox", "a lighthouse", "an old bicycle", "a wooden boat", "two horses", "a glass teapot",
             "a small robot", "a stone bridge", "a sleeping cat", "a yellow tram", "a snowy owl", "a paper kite",
             "a marble statue", "a hot air balloon", "a street musician", "a lemon tree")  # fmt: skip
_PLACES = ("beside a river at dawn", "in front of a brick wall", "on a crowded market square", "under a stormy sky",
           "in a field of lavender", "at the edge of a frozen lake", "on a rooftop at night", "in an empty library",
           "behind a rusty gate", "among autumn leaves", "on a foggy pier", "in the light of one lamp")  # fmt: skip
_STYLES = ("", ", a photograph", ", oil on canvas", ", watercolour", ", studio lighting", ", seen from above")


def prompts(count: int) -> list[str]:
    """Return `count` different prompts; consecutive ones differ in subject, place and style."""
    total = len(_SUBJECTS) * len(_PLACES) * len(_STYLES)
    if not 0 < count <= total:
        raise ValueError(f"there are {total} prompts, not {count}")
    every = [f"{s} {p}{t}" for t, p, s in itertools.product(_STYLES, _PLACES, _SUBJECTS)]
    # 485 is coprime to the total, so each prompt occurs once.
    return [every[i * 485 % total] for i in range(count)]
