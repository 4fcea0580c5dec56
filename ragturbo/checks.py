"""Checks of a call's options that need neither a model nor torch, so that a mistake is reported before loading.

`engine/options.py` has those that need the model. Every error says the option, its value and what it may be.
"""

from __future__ import annotations

import numbers
import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ragturbo.config import MAX_IMAGES, MAX_NEIGHBORS, MAX_SEED, MAX_SIDE, MODES, OUTPUT_TYPES, one_of
from ragturbo.errors import InvalidRequest
from ragturbo.messages import short

if TYPE_CHECKING:
    from ragturbo.model.find import Parts
    from ragturbo.model.info import Sampling

UINT8_TYPES = ("pil", "uint8", "png", "jpeg", "webp")
FLOAT32_MAX = 3.4028234663852886e38
MAX_SECONDS = 1_000_000


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
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()
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
        hint = "; say what the image should show" if name == "prompt" else ""
        raise InvalidRequest(f"{name} is empty{hint}", option=name)
    try:
        "".join(found).encode()
    except UnicodeEncodeError:
        raise InvalidRequest(f"{name} is not valid Unicode", option=name) from None
    return found


def listed(value: Any) -> list[Any] | None:
    """Return a list, tuple, range or one-dimensional array as a list; None for a single value."""
    many = isinstance(value, (list, tuple, range)) or getattr(value, "ndim", 0) == 1
    return list(value) if many else None


def check_seed(seed: Any, repeats: int = 1) -> list[int]:
    """Return the seeds; `repeats` images count up from each."""
    try:
        return [whole("seed", value, 0, MAX_SEED + 1 - repeats) for value in listed(seed) or [seed]]
    except InvalidRequest:
        what = "a whole number" if listed(seed) is None else "whole numbers"
        raise InvalidRequest(f"seed={short(seed)} must be {what} from 0 to 2**64 - {repeats}", option="seed") from None


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
    check_timeout(timeout)


def check_timeout(timeout: Any) -> None:
    real = isinstance(timeout, numbers.Real) and not isinstance(timeout, bool)
    if timeout is not None and (not real or not 0 < timeout <= MAX_SECONDS):
        raise InvalidRequest(
            f"timeout={short(timeout)} must be a number of seconds above 0, and at most {MAX_SECONDS}", option="timeout"
        )


def check_guidance(guidance_scale: Any) -> float:
    value = number("guidance_scale", guidance_scale, 0.0, 1000.0)
    if 0 < value <= 1:
        raise InvalidRequest(
            f"guidance_scale={guidance_scale} has no effect: use 0, or more than 1", option="guidance_scale"
        )
    return value


def choose_mode(mode: Any, *, has_adapter: bool, can_retrieve: bool, has_key: bool) -> str:
    """Return the mode. Default, if there is something to retrieve from: "adapter", or without an adapter "slerp", the
    paper's blend that needs no training (Sec. 3.2).

    Args:
        can_retrieve: there is a database, or the call brings its own neighbours.
        has_key: there is a prompt or query to search by, or the call brings its own neighbours.
    """
    if mode is None:
        mode = default_mode(has_adapter=has_adapter, can_retrieve=can_retrieve)
    else:
        one_of("mode", mode, MODES)
        if mode == "adapter" and not has_adapter:
            raise InvalidRequest(
                "mode='adapter' needs an adapter: adapter= or load_adapter(); or use mode='slerp'", option="mode"
            )
        if mode != "none" and not can_retrieve:
            raise InvalidRequest(
                f"mode={mode!r} needs a database (database= or use_database()) or neighbors=", option="mode"
            )
    if mode != "none" and not has_key:
        raise InvalidRequest(
            "prompt_embeds carry no search key: give query= or neighbors=, or mode='none' to generate without "
            "retrieval",
            option="prompt_embeds",
        )
    return mode


def default_mode(*, has_adapter: bool, can_retrieve: bool) -> str:
    if not can_retrieve:
        return "none"
    return "adapter" if has_adapter else "slerp"


def check_retrieval_options(mode: str, asked_mode: Any, given: dict[str, Any], *, has_key: bool) -> None:
    """Refuse retrieval options that have no effect in this mode.

    Args:
        asked_mode: the caller's `mode`, None if it was chosen for them.
        given: w, lam, num_neighbors, min_score, neighbors, query, per and compose as the caller gave them.
        has_key: there is a prompt or query whose key gives λ.
    """
    names = [name for name, value in given.items() if value is not None]
    if mode == "none" and names:
        why = "" if asked_mode == "none" else ", the default here: there is no database"
        raise InvalidRequest(f"{names[0]} has no effect with mode='none'{why}", option=names[0])
    chosen = "" if asked_mode else ", the default without an adapter"
    if mode == "adapter" and "w" in names:
        raise InvalidRequest("w is the blend of mode='slerp'; the adapter's strength is lam", option="w")
    if mode in ("slerp", "lerp") and "lam" in names:
        raise InvalidRequest(f"lam is the adapter's strength; the blend of mode={mode!r}{chosen} is w", option="lam")
    if "per" in names:
        if mode != "slerp":
            raise InvalidRequest(f"per is an option of mode='slerp', not of {mode!r}", option="per")
        one_of("per", given["per"], ("sample", "token"))
    if mode == "adapter" and not has_key and "lam" not in names:
        raise InvalidRequest(
            "prompt_embeds carry no key to weigh the neighbours by: give query= or lam=", option="prompt_embeds"
        )
    if {"min_score", "neighbors"} <= set(names):
        raise InvalidRequest(
            "min_score has no effect with neighbors: the ones you give are all used", option="min_score"
        )
    if mode == "adapter" and {"query", "neighbors", "lam"} <= set(names):
        raise InvalidRequest("query has no effect if both neighbors and lam are given", option="query")
    if "compose" in names and (others := {"query", "neighbors"} & set(names)):
        raise InvalidRequest(
            f"compose searches by the prompt's phrases: it has no effect with {min(others)}", option="compose"
        )


def check_steps(num_inference_steps: Any, guidance_scale: Any, sampling: Sampling) -> tuple[int, float]:
    """Return steps and guidance; None is the model's default."""
    why = f"it counts as distilled because {sampling.why}; distilled=False says that it is not"
    steps, guidance = sampling.steps, sampling.guidance_scale
    if num_inference_steps is not None:
        steps = whole("num_inference_steps", num_inference_steps)
        if steps > sampling.most_steps:
            limit = f"num_inference_steps={steps}: this model takes 1 to {sampling.most_steps}"
            raise InvalidRequest(f"{limit} ({why})" if sampling.distilled else limit, option="num_inference_steps")
    if guidance_scale is not None:
        guidance = check_guidance(guidance_scale)
        if guidance and sampling.distilled:
            raise InvalidRequest(
                f"guidance_scale={guidance_scale}: a distilled model overshoots with guidance; use 0 ({why})",
                option="guidance_scale",
            )
    return steps, guidance


def check_has_guidance(name: str, value: Any, guidance: float, *, distilled: bool) -> None:
    """Refuse a negative prompt where it has no effect."""
    if value is not None and not guidance:
        why = ": a distilled model takes no guidance" if distilled else ""
        raise InvalidRequest(f"{name} has no effect with guidance_scale=0{why}", option=name)


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
    parts: Parts | None = None,
    **others: Any,
) -> None:
    """Raise InvalidRequest for what is wrong with a call whatever the model, or with the model that `parts` describes.

    Options in `others` that depend on tensors are not checked.
    """
    if prompt_embeds is None:
        if prompt is None:
            raise InvalidRequest("give a prompt", option="prompt")
        count = len(texts("prompt", prompt))
    else:
        count = len(prompt_embeds) if getattr(prompt_embeds, "ndim", 0) == 3 else 1
    repeats = whole("num_images_per_prompt", num_images_per_prompt, 1, max(1, MAX_IMAGES // max(1, count)))
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
            whole(name, side, 1, MAX_SIDE)
    check_output(output_type, postprocess, timeout)
    neighbors, query = others.get("neighbors"), others.get("query")
    if isinstance(query, (str, list, tuple)):
        texts("query", query)
    if parts is None:
        return
    guidance = check_steps(num_inference_steps, guidance_scale, parts.sampling)[1]
    for name in ("negative_prompt", "negative_prompt_embeds"):
        check_has_guidance(name, others.get(name), guidance, distilled=parts.sampling.distilled)
    for name, side in (("height", height), ("width", width)):
        if side is not None and side % parts.factor:
            raise InvalidRequest(f"{name}={side} must be a multiple of {parts.factor}", option=name)
    has_key = prompt is not None or query is not None
    resolved = choose_mode(
        mode,
        has_adapter=parts.has_adapter,
        can_retrieve=parts.database is not None or neighbors is not None,
        has_key=has_key or neighbors is not None,
    )
    given = {
        "w": w, "lam": lam, "num_neighbors": num_neighbors, "min_score": min_score, "neighbors": neighbors,
        "query": query, "per": others.get("per"), "compose": others.get("compose") or None,
    }  # fmt: skip
    check_retrieval_options(resolved, mode, given, has_key=has_key)
