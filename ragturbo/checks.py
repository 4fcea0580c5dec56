"""Checks of a call's options that need neither a model nor torch, so that a mistake is reported before loading.

`engine/options.py` has those that need the model. Every error says the option, its value and what it may be.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Callable, Sequence
from typing import Any

from ragturbo.config import MAX_NEIGHBORS, MAX_SEED, MODES, OUTPUT_TYPES, one_of, short
from ragturbo.errors import InvalidRequest

UINT8_TYPES = ("pil", "uint8", "png", "jpeg", "webp")
FLOAT32_MAX = 3.4028234663852886e38


def whole(name: str, value: Any, least: int = 1, most: int | None = None) -> int:
    """Return a whole number, of Python, NumPy or torch, as an int."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least or (most is not None and number > most):
        bound = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise InvalidRequest(f"{name}={short(value)} must be a whole number {bound}", option=name)
    return number


def number(name: str, value: Any, least: float = 0.0, most: float = FLOAT32_MAX) -> float:
    """Return a finite number, of Python or NumPy, as a float."""
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not real or not least <= value <= most:
        bound = f"in [{least:g}, {most:g}]" if most < FLOAT32_MAX else f"from {least:.4g} to {most:.4g}"
        raise InvalidRequest(f"{name}={short(value)} must be a number {bound}", option=name)
    return float(value)


def texts(name: str, value: Any, *, empty: bool = False) -> list[str]:
    """Return one text or a list of them as a list. empty: whether a text may be empty."""
    found = [value] if isinstance(value, str) else list(value) if isinstance(value, (list, tuple)) else None
    if not found or any(not isinstance(text, str) for text in found):
        raise InvalidRequest(f"{name} must be a text or a list of texts, not {short(value)}", option=name)
    if not empty and any(not text.strip() for text in found):
        raise InvalidRequest(f"{name} is empty; say what the image should show", option=name)
    return found


def listed(value: Any) -> list[Any] | None:
    """Return a list, tuple, range or one-dimensional array as a list; None for a single value."""
    many = isinstance(value, (list, tuple, range)) or getattr(value, "ndim", 0) == 1
    return list(value) if many else None


def check_seed(seed: Any, repeats: int = 1) -> list[int]:
    """Return the seeds; `repeats` images count up from each."""
    try:
        return [whole("seed", value, 0, MAX_SEED - repeats) for value in listed(seed) or [seed]]
    except InvalidRequest:
        raise InvalidRequest(f"seed={short(seed)} must be whole numbers from 0 to 2**64 - 1", option="seed") from None


def check_output(output_type: Any, postprocess: Callable[[Any], Any] | None, timeout: Any) -> None:
    one_of("output_type", output_type, OUTPUT_TYPES)
    if postprocess is not None and not callable(postprocess):
        raise InvalidRequest(f"postprocess={short(postprocess)} must be a function", option="postprocess")
    if postprocess is not None and output_type not in UINT8_TYPES:
        raise InvalidRequest(
            f"postprocess runs on the uint8 batch, which output_type={output_type!r} does not make; "
            "use 'pil', 'uint8', 'png', 'jpeg' or 'webp'",
            option="postprocess",
        )
    if timeout is not None:
        real = isinstance(timeout, numbers.Real) and not isinstance(timeout, bool)
        if not real or not 0 < timeout < math.inf:
            raise InvalidRequest(f"timeout={short(timeout)} must be a number of seconds above 0", option="timeout")


def check_guidance(guidance_scale: Any) -> float:
    value = number("guidance_scale", guidance_scale, 0.0, 1000.0)
    if 0 < value <= 1:
        raise InvalidRequest(
            f"guidance_scale={guidance_scale} has no effect: use 0, or more than 1", option="guidance_scale"
        )
    return value


def check_call(
    prompt: str | Sequence[str] | None = None,
    *,
    prompt_embeds: Any = None,
    seed: Any = None,
    num_images_per_prompt: Any = 1,
    mode: Any = None,
    num_neighbors: Any = None,
    min_score: Any = None,
    lam: Any = None,
    w: Any = None,
    num_inference_steps: Any = None,
    guidance_scale: Any = None,
    height: Any = None,
    width: Any = None,
    output_type: Any = "pil",
    postprocess: Any = None,
    timeout: Any = None,
    **others: Any,
) -> None:
    """Raise InvalidRequest for what is wrong with a call whatever the model. Options in `others` are not checked."""
    if prompt_embeds is None:
        if prompt is None:
            raise InvalidRequest("give a prompt", option="prompt")
        texts("prompt", prompt)
    repeats = whole("num_images_per_prompt", num_images_per_prompt)
    if seed is not None:
        check_seed(seed, repeats)
    if mode is not None:
        one_of("mode", mode, MODES)
    if num_neighbors is not None:
        whole("num_neighbors", num_neighbors, 1, MAX_NEIGHBORS)
    if min_score is not None:
        number("min_score", min_score, -FLOAT32_MAX)
    for name, given, most in (("lam", lam, FLOAT32_MAX), ("w", w, 1.0)):
        if given is not None:
            for value in listed(given) or [given]:
                number(name, value, 0.0, most)
    if num_inference_steps is not None:
        whole("num_inference_steps", num_inference_steps)
    if guidance_scale is not None:
        check_guidance(guidance_scale)
    for name, side in (("height", height), ("width", width)):
        if side is not None:
            whole(name, side)
    check_output(output_type, postprocess, timeout)
