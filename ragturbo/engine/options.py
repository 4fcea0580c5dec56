"""Checks of one call's options against each other and against the loaded model, before anything runs.

An option given where it has no effect is an error: a caller who passes `w` in adapter mode expects it to do something.
Every function returns the checked, expanded value or raises InvalidRequest with the value and the reason.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ragturbo.config import MAX_NEIGHBORS, MAX_PHRASES, MAX_SEED, MODES, OUTPUT_TYPES, Compose, one_of
from ragturbo.errors import InvalidRequest
from ragturbo.retrieval.phrases import phrases

FLOAT32_MAX = torch.finfo(torch.float32).max
UINT8_TYPES = ("pil", "uint8", "png", "jpeg", "webp")


def positive(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidRequest(f"{name}={value!r} must be a whole number of at least 1")
    return value


def check_output(output_type: Any, postprocess: Callable[[Any], Any] | None, timeout: Any) -> None:
    one_of("output_type", output_type, OUTPUT_TYPES)
    if postprocess is not None and output_type not in UINT8_TYPES:
        raise InvalidRequest(
            f"postprocess runs on the uint8 batch, which output_type={output_type!r} does not make; "
            "use 'pil', 'uint8', 'png', 'jpeg' or 'webp'"
        )
    if timeout is not None and not timeout > 0:
        raise InvalidRequest(f"timeout={timeout!r} must be more than 0 seconds")


def check_prompts(prompt: Any, prompt_embeds: Any, width: int) -> tuple[list[str] | None, int]:
    """Return the prompts (None if embeddings were given) and their number."""
    if (prompt is None) == (prompt_embeds is None):
        both = "" if prompt_embeds is None else ", not both"
        raise InvalidRequest(f"give either prompt or prompt_embeds{both}")
    if prompt_embeds is None:
        texts = _texts("prompt", prompt)
        return texts, len(texts)
    shape = tuple(getattr(prompt_embeds, "shape", ()))
    if not isinstance(prompt_embeds, Tensor) or len(shape) != 3 or shape[-1] != width or not shape[0]:
        raise InvalidRequest(f"prompt_embeds must be (B, L, {width}), not {shape}")
    return None, len(prompt_embeds)


def choose_mode(mode: Any, *, has_adapter: bool, can_retrieve: bool, has_key: bool) -> str:
    """Return the mode, which defaults to "adapter" if there is an adapter and something to retrieve from.

    Args:
        can_retrieve: there is a database, or the call brings its own neighbours.
        has_key: there is a prompt or query to search by, or the call brings its own neighbours.
    """
    if mode is None:
        mode = "adapter" if has_adapter and can_retrieve else "none"
    else:
        one_of("mode", mode, MODES)
        if mode == "adapter" and not has_adapter:
            raise InvalidRequest("mode='adapter' needs an adapter: adapter= or load_adapter(); or use mode='slerp'")
        if mode != "none" and not can_retrieve:
            raise InvalidRequest(f"mode={mode!r} needs a database (database= or use_database()) or neighbors=")
    if mode != "none" and not has_key:
        raise InvalidRequest(
            "prompt_embeds carry no search key: give query= or neighbors=, or mode='none' to generate without retrieval"
        )
    return mode


def check_retrieval_options(mode: str, asked_mode: Any, given: dict[str, Any], *, has_key: bool) -> None:
    """Refuse retrieval options that have no effect in this mode.

    Args:
        asked_mode: the caller's `mode`, None if it was chosen for them.
        given: w, lam, num_neighbors, min_score, neighbors, query, per and compose as the caller gave them.
        has_key: there is a prompt or query whose key gives λ.
    """
    names = [name for name, value in given.items() if value is not None]
    if mode == "none" and names:
        why = "" if asked_mode == "none" else ", the default here: there is no adapter or no database"
        raise InvalidRequest(f"{names[0]} has no effect with mode='none'{why}")
    if mode == "adapter" and "w" in names:
        raise InvalidRequest("w is the blend of mode='slerp'; the adapter's strength is lam")
    if mode in ("slerp", "lerp") and "lam" in names:
        raise InvalidRequest(f"lam is the adapter's strength; the blend of mode={mode!r} is w")
    if "per" in names:
        if mode != "slerp":
            raise InvalidRequest(f"per is an option of mode='slerp', not of {mode!r}")
        one_of("per", given["per"], ("sample", "token"))
    if mode == "adapter" and not has_key and "lam" not in names:
        raise InvalidRequest("prompt_embeds carry no key to weigh the neighbours by: give query= or lam=")
    if mode == "adapter" and {"query", "neighbors", "lam"} <= set(names):
        raise InvalidRequest("query has no effect if both neighbors and lam are given")
    if "compose" in names and (others := {"query", "neighbors"} & set(names)):
        raise InvalidRequest(f"compose searches by the prompt's phrases: it has no effect with {min(others)}")


def check_neighbors(neighbors: Any, prompts: int) -> list[list[Any]] | None:
    """Return one list of ids, Neighbors or pairs per prompt. A flat list is used for every prompt."""
    if neighbors is None:
        return None
    if not isinstance(neighbors, (list, tuple)) or not neighbors:
        raise InvalidRequest("neighbors must be a non-empty list of ids, Neighbors or (caption, image) pairs")
    nested = all(isinstance(entry, list) for entry in neighbors)
    lists = [list(entry) for entry in neighbors] if nested else [list(neighbors)] * prompts
    if len(lists) != prompts:
        raise InvalidRequest(f"neighbors has {len(lists)} lists for {prompts} prompts")
    if len({len(entry) for entry in lists}) != 1 or not lists[0]:
        raise InvalidRequest("neighbors must name the same number of pairs, at least one, for every prompt")
    return lists


def choose_compose(compose: Any, default: Compose) -> Callable[[str], list[str]] | None:
    """Return the function that cuts a prompt into phrases, or None."""
    chosen = default if compose is None else compose
    if isinstance(chosen, bool):
        return phrases if chosen else None
    if not callable(chosen):
        raise InvalidRequest(f"compose={chosen!r} must be True, False or a function from a prompt to its phrases")
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
            raise InvalidRequest(f"compose must return a list of phrases, not {str(found)[:80]!r}")
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
            raise InvalidRequest(f"num_neighbors={num_neighbors} but neighbors names {k}")
    elif num_neighbors is not None:
        k = positive("num_neighbors", num_neighbors)
    else:
        k = trained_with if mode == "adapter" else 1
    if k > MAX_NEIGHBORS:
        raise InvalidRequest(f"{k} neighbours are more than the {MAX_NEIGHBORS} the adapter attends to")
    if composed and k * MAX_PHRASES > MAX_NEIGHBORS:
        raise InvalidRequest(
            f"{k} neighbours for each of {MAX_PHRASES} phrases are more than the {MAX_NEIGHBORS} the adapter attends "
            "to; use fewer, or compose=False"
        )
    return k


def check_steps(num_inference_steps: Any, guidance_scale: Any, *, most: int, distilled: bool) -> None:
    if positive("num_inference_steps", num_inference_steps) > most:
        kind = "a distilled model takes" if distilled else "this scheduler takes"
        raise InvalidRequest(f"num_inference_steps={num_inference_steps}: {kind} 1 to {most}")
    number = isinstance(guidance_scale, (int, float)) and not isinstance(guidance_scale, bool)
    if not number or not 0 <= guidance_scale < 1000:
        raise InvalidRequest(f"guidance_scale={guidance_scale!r} must be a number of at least 0")
    if guidance_scale > 1 and distilled:
        raise InvalidRequest(f"guidance_scale={guidance_scale}: a distilled model overshoots with guidance; use 0")
    if 0 < guidance_scale <= 1:
        raise InvalidRequest(f"guidance_scale={guidance_scale} has no effect: use 0, or more than 1")


def check_negative(
    negative_prompt: Any, negative_prompt_embeds: Any, prompts: int, *, guided: bool
) -> list[str] | None:
    """Return one negative prompt per prompt, or None if there is no guidance or embeddings were given."""
    for name, value in (("negative_prompt", negative_prompt), ("negative_prompt_embeds", negative_prompt_embeds)):
        if value is not None and not guided:
            raise InvalidRequest(f"{name} has no effect without guidance (guidance_scale > 1)")
    if negative_prompt_embeds is not None:
        embeds = negative_prompt_embeds
        if negative_prompt is not None:
            raise InvalidRequest("give either negative_prompt or negative_prompt_embeds, not both")
        if not isinstance(embeds, Tensor) or embeds.ndim != 3 or embeds.shape[0] not in (1, prompts):
            raise InvalidRequest(f"negative_prompt_embeds must be ({prompts}, L, D)")
        return None
    if not guided:
        return None
    texts = _texts("negative_prompt", "" if negative_prompt is None else negative_prompt, empty=True)
    return _one_per_prompt("negative prompts", texts, prompts)


def check_query(query: Any, prompts: int, key_width: int) -> tuple[list[str] | None, Tensor | None]:
    """Return what to search by instead of the prompts: texts, or normalised keys (prompts, key_width)."""
    if query is None:
        return None, None
    if not isinstance(query, Tensor):
        return _one_per_prompt("queries", _texts("query", query), prompts), None
    key = query.detach().to("cpu", torch.float32)
    key = key[None] if key.ndim == 1 else key
    if key.ndim != 2 or key.shape[1] != key_width or key.shape[0] not in (1, prompts):
        raise InvalidRequest(f"query key must be ({prompts}, {key_width}), not {tuple(query.shape)}")
    norm = key.norm(dim=1, keepdim=True)
    if not bool(torch.isfinite(key).all()) or not bool((norm > 0).all()):
        raise InvalidRequest("query key holds NaN, infinity or only zeros")
    return None, (key / norm).expand(prompts, -1).contiguous()


def choose_size(height: Any, width: Any, latents: Any, *, factor: int, default: int) -> tuple[int, int]:
    """Return height and width in pixels; both default to the latents' size, or else to the model's.

    Args:
        factor: pixels per latent cell, of which both must be multiples.
    """
    sizes = []
    for dim, (name, value) in enumerate((("height", height), ("width", width)), start=2):
        if value is None:
            value = latents.shape[dim] * factor if isinstance(latents, Tensor) and latents.ndim == 4 else default
        if isinstance(value, bool) or not isinstance(value, int) or value < factor or value % factor:
            raise InvalidRequest(f"{name}={value!r} must be a positive multiple of {factor}")
        sizes.append(value)
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
        raise InvalidRequest(f"{' and '.join(given)} each decide the noise; give one of them")
    if latents is not None:
        if not isinstance(latents, Tensor) or tuple(latents.shape) not in ((count, *shape), (1, *shape)):
            got = tuple(getattr(latents, "shape", ()))
            raise InvalidRequest(f"latents must be {(count, *shape)} for {count} images of this size, not {got}")
        if not bool(torch.isfinite(latents).all()):
            raise InvalidRequest("latents hold NaN or infinity")
        return [None] * count, latents.detach().to("cpu", torch.float32).expand(count, *shape).clone()
    if generator is not None:
        return [None] * count, _draw(generator, count, shape)
    seeds = _seeds(seed, prompts, repeats)
    rows = [torch.randn((1, *shape), generator=torch.Generator("cpu").manual_seed(s)) for s in seeds]
    return list(seeds), rows[0] if len(rows) == 1 else torch.cat(rows)


def per_image(name: str, value: Any, default: float, count: int, prompts: int, most: float | None = None) -> Tensor:
    """Return (count,) fp32 from None, one number, one per prompt or one per image; 0 is the least."""
    if value is None:
        return torch.full((count,), default)
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    for v in values:
        number = isinstance(v, (int, float)) and not isinstance(v, bool)
        if not number or not 0 <= v <= (FLOAT32_MAX if most is None else most):
            bound = f"a number from 0 to {FLOAT32_MAX:.4g}" if most is None else f"in [0, {most:g}]"
            raise InvalidRequest(f"{name}={v!r} must be {bound}")
    if len(values) == prompts != count:
        values = [v for v in values for _ in range(count // prompts)]
    if len(values) not in (1, count):
        raise InvalidRequest(f"{len(values)} values of {name} for {count} images")
    return torch.tensor([float(v) for v in values]).expand(count).clone()


def check_min_score(value: Any) -> float:
    if value is None:
        return float("-inf")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= FLOAT32_MAX:
        raise InvalidRequest(f"min_score={value!r} must be a number within ±{FLOAT32_MAX:.4g}, as scores are")
    return float(value)


def _texts(name: str, value: Any, *, empty: bool = False) -> list[str]:
    texts = [value] if isinstance(value, str) else list(value) if isinstance(value, (list, tuple)) else None
    if not texts or any(not isinstance(t, str) for t in texts):
        raise InvalidRequest(f"{name} must be a text or a list of texts, not {str(value)[:80]!r}")
    if not empty and any(not t.strip() for t in texts):
        raise InvalidRequest(f"{name} is empty; say what the image should show")
    return texts


def _one_per_prompt(what: str, texts: list[str], prompts: int) -> list[str]:
    if len(texts) not in (1, prompts):
        raise InvalidRequest(f"{len(texts)} {what} for {prompts} prompts")
    return texts * prompts if len(texts) == 1 else texts


def _draw(generator: Any, count: int, shape: tuple[int, int, int]) -> Tensor:
    generators = list(generator) if isinstance(generator, (list, tuple)) else [generator]
    if any(not isinstance(g, torch.Generator) for g in generators):
        raise InvalidRequest("generator must be a torch.Generator or a list of them")
    if any(g.device.type != "cpu" for g in generators):
        raise InvalidRequest("generator must be on the CPU, so that noise does not depend on the device")
    if isinstance(generator, torch.Generator):
        return torch.randn((count, *shape), generator=generator)
    if len(generators) != count:
        raise InvalidRequest(f"{len(generators)} generators for {count} images")
    return torch.cat([torch.randn((1, *shape), generator=g) for g in generators])


def _seeds(seed: int | Sequence[int] | None, prompts: int, repeats: int) -> list[int]:
    if seed is None:
        # Below 2**32, so that a seed can be typed in again and passed through JSON without losing precision.
        seed = [secrets.randbits(32) for _ in range(prompts * repeats)]
    bases = list(seed) if isinstance(seed, (list, tuple)) else [seed] * prompts
    if any(isinstance(s, bool) or not isinstance(s, int) or not 0 <= s <= MAX_SEED - repeats for s in bases):
        raise InvalidRequest(f"seed={seed!r} must be whole numbers from 0 to 2**64 - 1")
    if len(bases) == prompts:
        return [base + i for base in bases for i in range(repeats)]  # type: ignore[operator]
    if len(bases) == prompts * repeats:
        return bases  # type: ignore[return-value]
    raise InvalidRequest(f"{len(bases)} seeds for {prompts} prompts of {repeats} images each")
