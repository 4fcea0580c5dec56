"""Checks of one call's options against each other and against the loaded model, before anything runs.

An option given where it has no effect is an error: a caller who passes `w` in adapter mode expects it to do something.
Every function returns the checked, expanded value or raises InvalidRequest with the value and the reason.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ragturbo.checks import FLOAT32_MAX, check_has_guidance, check_seed, listed, number, texts, whole
from ragturbo.config import MAX_NEIGHBORS, MAX_PHRASES, MAX_SIDE, Compose
from ragturbo.errors import InvalidRequest
from ragturbo.messages import many, short
from ragturbo.retrieval.phrases import phrases


def check_prompts(prompt: Any, prompt_embeds: Any, width: int) -> tuple[list[str] | None, int]:
    """Return the prompts (None if embeddings were given) and their number."""
    if (prompt is None) == (prompt_embeds is None):
        both = "" if prompt_embeds is None else ", not both"
        raise InvalidRequest(f"give either prompt or prompt_embeds{both}", option="prompt")
    if prompt_embeds is None:
        found = texts("prompt", prompt)
        return found, len(found)
    _check_embeds("prompt_embeds", prompt_embeds, None, width)
    return None, len(prompt_embeds)


def check_neighbors(neighbors: Any, prompts: int) -> list[list[Any]] | None:
    """Return one list of ids, Neighbors or pairs per prompt. A flat list is used for every prompt."""
    if neighbors is None:
        return None
    if getattr(neighbors, "ndim", 0) in (1, 2):
        neighbors = neighbors.tolist()
    if not isinstance(neighbors, (list, tuple)) or not neighbors:
        raise InvalidRequest(
            "neighbors must be a non-empty list of ids, Neighbors or (caption, image) pairs", option="neighbors"
        )
    nested = all(isinstance(entry, list) for entry in neighbors)
    lists = [list(entry) for entry in neighbors] if nested else [list(neighbors)] * prompts
    if len(lists) != prompts:
        raise InvalidRequest(f"neighbors has {len(lists)} lists for {prompts} prompts", option="neighbors")
    if len({len(entry) for entry in lists}) != 1 or not lists[0]:
        raise InvalidRequest(
            "neighbors must name the same number of pairs, at least one, for every prompt", option="neighbors"
        )
    return lists


def choose_compose(compose: Any, default: Compose) -> Callable[[str], list[str]] | None:
    """Return the function that cuts a prompt into phrases, or None."""
    chosen = default if compose is None else compose
    if isinstance(chosen, bool):
        return phrases if chosen else None
    if not callable(chosen):
        raise InvalidRequest(
            f"compose={short(chosen)} must be True, False or a function from a prompt to its phrases", option="compose"
        )
    return chosen


def cut_into_phrases(
    prompts: list[str], cut: Callable[[str], list[str]]
) -> tuple[list[tuple[str, ...]], dict[int, int]]:
    """Return each prompt's phrases, padded with "" to one power of two. A prompt without phrases is one.

    Also returns how many phrases were joined into the last one, by the place of the prompt.
    """
    rows: list[list[str]] = []
    joined: dict[int, int] = {}
    for i, prompt in enumerate(prompts):
        found = cut(prompt)
        if not isinstance(found, (list, tuple)) or any(not isinstance(p, str) or not p.strip() for p in found):
            raise InvalidRequest(f"compose must return a list of phrases, not {short(found)}", option="compose")
        if len(found) > MAX_PHRASES:
            joined[i] = len(found) - MAX_PHRASES + 1
            found = [*found[: MAX_PHRASES - 1], ", ".join(found[MAX_PHRASES - 1 :])]
        rows.append(list(found) if len(found) > 1 else [prompt])
    # A power of two, so that requests batch up.
    width = 1 << (max(map(len, rows)) - 1).bit_length()
    return [tuple(row + [""] * (width - len(row))) for row in rows], joined


def choose_num_neighbors(
    mode: str, num_neighbors: Any, neighbors: list[list[Any]] | None, trained_with: int, *, composed: bool = False
) -> int:
    """Return k: the caller's, or the number the adapter was trained with; of each phrase if the prompt is composed."""
    if mode == "none":
        return 0
    if neighbors is not None:
        k = len(neighbors[0])
        if num_neighbors is not None and num_neighbors != k:
            raise InvalidRequest(f"num_neighbors={num_neighbors} but neighbors names {k}", option="num_neighbors")
    elif num_neighbors is not None:
        k = whole("num_neighbors", num_neighbors, 1, MAX_NEIGHBORS)
    else:
        k = trained_with if mode == "adapter" else 1
    if k > MAX_NEIGHBORS:
        raise InvalidRequest(f"{k} neighbours are more than {MAX_NEIGHBORS}, the most of a request", option="neighbors")
    if composed and k * MAX_PHRASES > MAX_NEIGHBORS:
        raise InvalidRequest(
            f"{k} neighbours for each of {MAX_PHRASES} phrases are more than the {MAX_NEIGHBORS} the adapter attends "
            "to; use fewer, or compose=False",
            option="num_neighbors",
        )
    return k


def check_negative(
    negative_prompt: Any, negative_prompt_embeds: Any, prompts: int, *, guidance: float, width: int, distilled: bool
) -> list[str] | None:
    """Return one negative prompt per prompt, or None if there is no guidance or embeddings were given."""
    check_has_guidance("negative_prompt", negative_prompt, guidance, distilled=distilled)
    check_has_guidance("negative_prompt_embeds", negative_prompt_embeds, guidance, distilled=distilled)
    if negative_prompt_embeds is not None:
        if negative_prompt is not None:
            raise InvalidRequest(
                "give either negative_prompt or negative_prompt_embeds, not both", option="negative_prompt"
            )
        _check_embeds("negative_prompt_embeds", negative_prompt_embeds, prompts, width)
        return None
    if not guidance:
        return None
    return _one_per_prompt("negative_prompt", "" if negative_prompt is None else negative_prompt, prompts, empty=True)


def check_query(query: Any, prompts: int, key_width: int) -> tuple[list[str] | None, Tensor | None]:
    """Return what to search by instead of the prompts: texts, or normalised keys (prompts, key_width)."""
    if query is None:
        return None, None
    if isinstance(query, np.ndarray) and query.dtype.kind == "f":
        query = torch.from_numpy(query)
    if not isinstance(query, Tensor):
        return _one_per_prompt("query", query, prompts), None
    key = query.detach().to("cpu", torch.float32)
    # A key without a batch dimension is every prompt's, like one text.
    key = key.expand(prompts, -1) if key.ndim == 1 else key
    if tuple(key.shape) != (prompts, key_width):
        raise InvalidRequest(
            f"a query key must be ({key_width},) or ({prompts}, {key_width}), not {tuple(query.shape)}", option="query"
        )
    norm = key.norm(dim=1, keepdim=True)
    if not bool(torch.isfinite(key).all()) or not bool((norm > 0).all()):
        raise InvalidRequest("the query key holds NaN, infinity or only zeros", option="query")
    return None, (key / norm).contiguous()


def choose_size(height: Any, width: Any, latents: Any, *, factor: int, default: int) -> tuple[int, int]:
    """Return height and width in pixels; both default to the latents' size, or else to the model's.

    Args:
        factor: pixels per latent cell, of which both must be multiples.
    """
    sizes = []
    for dim, (name, value) in enumerate((("height", height), ("width", width)), start=2):
        if value is None:
            value = latents.shape[dim] * factor if isinstance(latents, Tensor) and latents.ndim == 4 else default
        if (side := whole(name, value, 1, MAX_SIDE)) % factor:
            raise InvalidRequest(f"{name}={side} must be a multiple of {factor}", option=name)
        sizes.append(side)
    return sizes[0], sizes[1]


def make_noise(
    seed: Any, generator: Any, latents: Any, *, prompts: int, repeats: int, shape: tuple[int, int, int]
) -> tuple[list[int | None], Tensor]:
    """Return the seed (None if there is none) and the noise of each image, fp32 on the CPU.

    An image's noise is a function of its seed alone: each image draws its own from a CPU generator.

    Args:
        repeats: images per prompt; an int seed counts up from itself for them and starts again at the next prompt.
        shape: channels, height and width of an image's latents.
    """
    count = prompts * repeats
    given = [n for n, v in (("seed", seed), ("generator", generator), ("latents", latents)) if v is not None]
    if len(given) > 1:
        raise InvalidRequest(f"{' and '.join(given)} each decide the noise; give one of them", option=given[0])
    if latents is not None:
        if not isinstance(latents, Tensor) or tuple(latents.shape) != (count, *shape):
            got = tuple(latents.shape) if isinstance(latents, Tensor) else short(latents)
            images = "one image" if count == 1 else f"{count} images"
            raise InvalidRequest(
                f"latents must be a tensor {(count, *shape)} for {images} of this size, not {got}", option="latents"
            )
        if not latents.is_floating_point():
            raise InvalidRequest(f"latents are {latents.dtype}, not of a floating-point type", option="latents")
        if not bool(torch.isfinite(latents).all()):
            raise InvalidRequest("latents hold NaN or infinity", option="latents")
        return [None] * count, latents.detach().to("cpu", torch.float32, copy=True)
    if generator is not None:
        return [None] * count, _draw(generator, count, shape)
    seeds = _seeds(seed, prompts, repeats)
    rows = [torch.randn((1, *shape), generator=torch.Generator("cpu").manual_seed(s)) for s in seeds]
    return list(seeds), rows[0] if len(rows) == 1 else torch.cat(rows)


def per_image(name: str, value: Any, default: float, count: int, prompts: int, most: float = FLOAT32_MAX) -> Tensor:
    """Return (count,) fp32 from None, one number, one per prompt or one per image; 0 is the least."""
    if value is None:
        return torch.full((count,), default)
    several = listed(value)
    given = [number(name, entry, 0.0, most) for entry in ([value] * count if several is None else several)]
    if len(given) == prompts != count:
        given = [entry for entry in given for _ in range(count // prompts)]
    if len(given) != count:
        raise InvalidRequest(f"{len(given)} values of {name} for {many(count, 'image')}", option=name)
    return torch.tensor(given, dtype=torch.float32)


def check_min_score(value: Any) -> float:
    return float("-inf") if value is None else number("min_score", value, -FLOAT32_MAX)


def _check_embeds(name: str, embeds: Any, prompts: int | None, width: int) -> None:
    """prompts: how many there are; None: any number."""
    shape = tuple(embeds.shape) if isinstance(embeds, Tensor) else ()
    if len(shape) != 3 or shape[-1] != width or not shape[0] or prompts not in (None, shape[0]):
        wanted = f"({'B' if prompts is None else prompts}, L, {width})"
        raise InvalidRequest(f"{name} must be a tensor {wanted}, not {shape or short(embeds)}", option=name)
    if not embeds.is_floating_point() or not bool(torch.isfinite(embeds).all()):
        raise InvalidRequest(f"{name} must be finite numbers of a floating-point type", option=name)


def _one_per_prompt(name: str, value: Any, prompts: int, *, empty: bool = False) -> list[str]:
    """One text is for every prompt; of a list, each prompt has its own."""
    found = texts(name, value, empty=empty)
    if isinstance(value, str):
        return found * prompts
    if len(found) != prompts:
        raise InvalidRequest(
            f"{name} lists {many(len(found), 'text')} for {many(prompts, 'prompt')}; give one for each, or "
            "a single text for all",
            option=name,
        )
    return found


def _draw(generator: Any, count: int, shape: tuple[int, int, int]) -> Tensor:
    generators = list(generator) if isinstance(generator, (list, tuple)) else [generator]
    if any(not isinstance(g, torch.Generator) for g in generators):
        raise InvalidRequest("generator must be a torch.Generator or a list of them", option="generator")
    if any(g.device.type != "cpu" for g in generators):
        raise InvalidRequest(
            "generator must be on the CPU, so that noise does not depend on the device", option="generator"
        )
    if isinstance(generator, torch.Generator):
        return torch.randn((count, *shape), generator=generator)
    if len(generators) != count:
        raise InvalidRequest(f"{many(len(generators), 'generator')} for {many(count, 'image')}", option="generator")
    return torch.cat([torch.randn((1, *shape), generator=g) for g in generators])


def _seeds(seed: Any, prompts: int, repeats: int) -> list[int]:
    if seed is None:
        # Below 2**32, so that a seed can be typed in again and passed through JSON without losing precision.
        return [secrets.randbits(32) for _ in range(prompts * repeats)]
    bases = check_seed(seed, repeats)
    if listed(seed) is None:
        bases *= prompts
    if len(bases) == prompts:
        return [base + i for base in bases for i in range(repeats)]
    if len(bases) == prompts * repeats:
        return bases
    raise InvalidRequest(
        f"{many(len(bases), 'seed')} for {many(prompts, 'prompt')} of {many(repeats, 'image')} each",
        option="seed",
    )
