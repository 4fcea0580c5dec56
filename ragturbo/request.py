"""One call's options, checked against each other and the model before anything runs.

An option given where it has no effect is an error: a caller who passes `w` in adapter mode believes something untrue.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ragturbo.config import MODES, OUTPUT_TYPES, one_of
from ragturbo.errors import InvalidRequest

MAX_NEIGHBORS = 16
MAX_SEED = 2**64 - 1
DEFAULT_W = 0.8
# What the device's float32 holds.
GREATEST = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Abilities:
    """What the loaded model can do, as far as a request must know it."""

    has_adapter: bool
    has_database: bool
    distilled: bool
    factor: int
    """Pixels a latent cell."""
    multiple: int
    """Height and width must be multiples of this."""
    default_size: int
    latent_channels: int
    text_width: int
    key_width: int
    max_steps: int
    num_neighbors: int = 1
    """What the adapter was trained with."""


@dataclass
class Request:
    """The keyword arguments of `Generator.__call__`, normalised by `resolve`."""

    prompt: str | Sequence[str] | None = None
    seed: int | Sequence[int] | None = None
    mode: str | None = None
    w: float | Sequence[float] | None = None
    num_neighbors: int | None = None
    lam: float | Sequence[float] | None = None
    min_score: float | None = None
    neighbors: Sequence[Any] | None = None
    query: Any = None
    negative_prompt: str | Sequence[str] | None = None
    prompt_embeds: Tensor | None = None
    negative_prompt_embeds: Tensor | None = None
    num_images_per_prompt: int = 1
    generator: torch.Generator | Sequence[torch.Generator] | None = None
    latents: Tensor | None = None
    num_inference_steps: int = 1
    guidance_scale: float = 0.0
    height: int | None = None
    width: int | None = None
    output_type: str = "pil"
    postprocess: Callable[[Any], Any] | None = None
    return_dict: bool = True
    timeout: float | None = None
    per: str | None = None

    @classmethod
    def of(cls, prompt: Any, options: dict[str, Any]) -> Request:
        known = cls.__dataclass_fields__.keys()
        if unknown := sorted(options.keys() - known):
            raise InvalidRequest(f"unknown option {unknown[0]!r}; there are: {', '.join(sorted(known - {'prompt'}))}")
        return cls(prompt=prompt, **options)


@dataclass
class Plan:
    """A request made plain: `count` images, every per-image value written out."""

    prompts: list[str] | None
    """One an image, or None where embeddings were given."""
    count: int
    per_prompt: int
    mode: str
    k: int
    lam: Tensor
    w: Tensor
    min_score: float
    seeds: list[int | None]
    latents: Tensor
    height: int
    width: int
    negative: list[str] | None
    query_texts: list[str] | None
    query_key: Tensor | None
    neighbors: list[list[Any]] | None
    """Per prompt, the ids, Neighbors or (caption, image) pairs the caller chose."""
    want: str


def resolve(request: Request, can: Abilities) -> Plan:
    one_of("output_type", request.output_type, OUTPUT_TYPES)
    prompts, n_prompts = _prompts(request, can)
    per_prompt = _positive("num_images_per_prompt", request.num_images_per_prompt)
    count = n_prompts * per_prompt
    mode = _mode(request, can)
    neighbors = _neighbors(request, n_prompts, mode)
    k = _num_neighbors(request, can, mode, neighbors)
    _check_retrieval_options(request, can, mode)
    _check_steps(request, can)
    negative = _negative(request, n_prompts)
    height, width = _size(request, can)
    seeds, latents = _noise(request, can, n_prompts, per_prompt, height, width)
    query_texts, query_key = _query(request, can, n_prompts, mode)
    lam = _per_image("lam", request.lam, float("nan"), count, n_prompts, 0.0, None)
    w = _per_image("w", request.w, DEFAULT_W, count, n_prompts, 0.0, 1.0)
    want = {"np": "float", "pt": "float", "latent": "latent"}.get(request.output_type, "uint8")
    if request.postprocess is not None and want != "uint8":
        raise InvalidRequest(
            f"postprocess sees the uint8 batch, which output_type={request.output_type!r} never makes; "
            "use 'pil', 'uint8', 'png', 'jpeg' or 'webp'"
        )
    if request.timeout is not None and not request.timeout > 0:
        raise InvalidRequest(f"timeout={request.timeout!r} must be more than 0 seconds")
    return Plan(
        prompts=_repeat(prompts, per_prompt),
        count=count,
        per_prompt=per_prompt,
        mode=mode,
        k=k,
        lam=lam,
        w=w,
        min_score=_min_score(request.min_score),
        seeds=seeds,
        latents=latents,
        height=height,
        width=width,
        negative=_repeat(negative, per_prompt),
        query_texts=_repeat(query_texts, per_prompt),
        query_key=None if query_key is None else query_key.repeat_interleave(per_prompt, 0),
        neighbors=neighbors,
        want=want,
    )


def _repeat(values: list[str] | None, times: int) -> list[str] | None:
    return None if values is None else [v for v in values for _ in range(times)]


def _positive(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidRequest(f"{name}={value!r} must be a whole number of at least 1")
    return value


def _texts(name: str, value: Any, *, empty: bool = False) -> list[str]:
    texts = [value] if isinstance(value, str) else list(value) if isinstance(value, (list, tuple)) else None
    if not texts or any(not isinstance(t, str) for t in texts):
        raise InvalidRequest(f"{name} must be a text or a list of texts, not {str(value)[:80]!r}")
    if not empty and any(not t.strip() for t in texts):
        raise InvalidRequest(f"{name} is empty; say what the image should show")
    return texts


def _prompts(request: Request, can: Abilities) -> tuple[list[str] | None, int]:
    embeds = request.prompt_embeds
    if (request.prompt is None) == (embeds is None):
        raise InvalidRequest("give either prompt or prompt_embeds" + (", not both" if embeds is not None else ""))
    if embeds is None:
        texts = _texts("prompt", request.prompt)
        return texts, len(texts)
    if not isinstance(embeds, Tensor) or embeds.ndim != 3 or embeds.shape[-1] != can.text_width or not len(embeds):
        shape = tuple(getattr(embeds, "shape", ()))
        raise InvalidRequest(f"prompt_embeds must be (B, L, {can.text_width}), not {shape}")
    return None, len(embeds)


def _mode(request: Request, can: Abilities) -> str:
    mode = request.mode
    retrievable = can.has_database or request.neighbors is not None
    if mode is None:
        mode = "adapter" if can.has_adapter and retrievable else "none"
        if mode == "adapter" and request.prompt is None and request.query is None and request.neighbors is None:
            raise InvalidRequest(
                "prompt_embeds carry no search key: give query= or neighbors=, or mode='none' to go without retrieval"
            )
        return mode
    one_of("mode", mode, MODES)
    if mode == "adapter" and not can.has_adapter:
        raise InvalidRequest("mode='adapter' needs an adapter: adapter= or load_adapter(); or use mode='slerp'")
    if mode != "none" and not retrievable:
        raise InvalidRequest(f"mode={mode!r} needs a database (database= or use_database()) or neighbors=")
    if mode != "none" and request.prompt is None and request.query is None and request.neighbors is None:
        raise InvalidRequest("prompt_embeds carry no search key: give query= or neighbors=, or mode='none'")
    return mode


def _neighbors(request: Request, n_prompts: int, mode: str) -> list[list[Any]] | None:
    given = request.neighbors
    if given is None:
        return None
    if not isinstance(given, (list, tuple)) or not given:
        raise InvalidRequest("neighbors must be a non-empty list of ids, Neighbors or (caption, image) pairs")
    # One list serves every prompt; a list of lists holds one list a prompt.
    nested = all(isinstance(entry, list) for entry in given)
    lists = [list(entry) for entry in given] if nested else [list(given)] * n_prompts
    if len(lists) != n_prompts:
        raise InvalidRequest(f"neighbors has {len(lists)} lists for {n_prompts} prompts")
    if len({len(entry) for entry in lists}) != 1 or not lists[0]:
        raise InvalidRequest("neighbors must name the same number of pairs, at least one, for every prompt")
    return lists


def _num_neighbors(request: Request, can: Abilities, mode: str, neighbors: list[list[Any]] | None) -> int:
    if mode == "none":
        return 0
    if neighbors is not None:
        k = len(neighbors[0])
        if request.num_neighbors is not None and request.num_neighbors != k:
            raise InvalidRequest(f"num_neighbors={request.num_neighbors} but neighbors names {k}")
    else:
        own = can.num_neighbors if mode == "adapter" else 1
        k = own if request.num_neighbors is None else _positive("num_neighbors", request.num_neighbors)
    if k > MAX_NEIGHBORS:
        raise InvalidRequest(f"{k} neighbours are more than the {MAX_NEIGHBORS} the adapter attends to")
    return k


def _check_retrieval_options(request: Request, can: Abilities, mode: str) -> None:
    if mode == "none":
        for name in ("w", "lam", "num_neighbors", "min_score", "neighbors", "query", "per"):
            if getattr(request, name) is not None:
                why = "" if request.mode == "none" else " (what mode=None means here: no adapter or no database)"
                raise InvalidRequest(f"{name} has no effect with mode='none'{why}")
    if mode == "adapter" and request.w is not None:
        raise InvalidRequest("w is the blend of mode='slerp'; the adapter's strength is lam")
    if mode in ("slerp", "lerp") and request.lam is not None:
        raise InvalidRequest(f"lam is the adapter's strength; the blend of mode={mode!r} is w")
    if request.per is not None:
        if mode != "slerp":
            raise InvalidRequest(f"per= belongs to mode='slerp', not {mode!r}")
        one_of("per", request.per, ("sample", "token"))
    if mode == "adapter" and request.prompt is None and request.query is None and request.lam is None:
        raise InvalidRequest("prompt_embeds carry no key to weigh the neighbours by: give query= or lam=")
    if request.query is not None and request.neighbors is not None and mode == "adapter" and request.lam is not None:
        raise InvalidRequest("query has no effect where both neighbors and lam are given")


def _check_steps(request: Request, can: Abilities) -> None:
    steps = _positive("num_inference_steps", request.num_inference_steps)
    if steps > can.max_steps:
        kind = "a distilled model takes" if can.distilled else "this scheduler takes"
        raise InvalidRequest(f"num_inference_steps={steps}: {kind} 1 to {can.max_steps}")
    scale = request.guidance_scale
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 <= scale < 1000:
        raise InvalidRequest(f"guidance_scale={scale!r} must be a number of at least 0")
    if scale > 1 and can.distilled:
        raise InvalidRequest(f"guidance_scale={scale}: a distilled model overshoots under guidance; leave it at 0")
    if 0 < scale <= 1:
        raise InvalidRequest(f"guidance_scale={scale} guides nothing: use 0, or more than 1")


def _negative(request: Request, n_prompts: int) -> list[str] | None:
    guided = request.guidance_scale > 1
    for name in ("negative_prompt", "negative_prompt_embeds"):
        if getattr(request, name) is not None and not guided:
            raise InvalidRequest(f"{name} has no effect without guidance (guidance_scale > 1)")
    if request.negative_prompt_embeds is not None:
        embeds = request.negative_prompt_embeds
        if request.negative_prompt is not None:
            raise InvalidRequest("give either negative_prompt or negative_prompt_embeds, not both")
        if not isinstance(embeds, Tensor) or embeds.ndim != 3 or embeds.shape[0] not in (1, n_prompts):
            raise InvalidRequest(f"negative_prompt_embeds must be ({n_prompts}, L, D)")
        return None
    if not guided:
        return None
    texts = _texts("negative_prompt", "" if request.negative_prompt is None else request.negative_prompt, empty=True)
    if len(texts) not in (1, n_prompts):
        raise InvalidRequest(f"{len(texts)} negative prompts for {n_prompts} prompts")
    return texts * n_prompts if len(texts) == 1 else texts


def _size(request: Request, can: Abilities) -> tuple[int, int]:
    sizes = []
    for name in ("height", "width"):
        value = getattr(request, name)
        if value is None:
            value = can.default_size
            if isinstance(request.latents, Tensor) and request.latents.ndim == 4:
                value = request.latents.shape[2 if name == "height" else 3] * can.factor
        if isinstance(value, bool) or not isinstance(value, int) or value < can.multiple or value % can.multiple:
            raise InvalidRequest(f"{name}={value!r} must be a positive multiple of {can.multiple}")
        sizes.append(value)
    return sizes[0], sizes[1]


def _noise(
    request: Request, can: Abilities, n_prompts: int, per_prompt: int, height: int, width: int
) -> tuple[list[int | None], Tensor]:
    """An image's noise is a function of its seed alone: drawn alone, in fp32, by a CPU generator."""
    count = n_prompts * per_prompt
    shape = (can.latent_channels, height // can.factor, width // can.factor)
    given = [n for n in ("seed", "generator", "latents") if getattr(request, n) is not None]
    if len(given) > 1:
        raise InvalidRequest(f"{' and '.join(given)} each decide the noise; give one of them")
    if request.latents is not None:
        latents = request.latents
        if not isinstance(latents, Tensor) or tuple(latents.shape) not in ((count, *shape), (1, *shape)):
            got = tuple(getattr(latents, "shape", ()))
            raise InvalidRequest(f"latents must be {(count, *shape)} for {count} images of {height}x{width}, not {got}")
        if not bool(torch.isfinite(latents).all()):
            raise InvalidRequest("latents hold NaN or infinity")
        return [None] * count, latents.detach().to("cpu", torch.float32).expand(count, *shape).clone()
    if request.generator is not None:
        return [None] * count, _drawn(request.generator, count, shape)
    seeds = _seeds(request.seed, n_prompts, per_prompt)
    rows = [torch.randn((1, *shape), generator=torch.Generator("cpu").manual_seed(s)) for s in seeds]
    return list(seeds), rows[0] if len(rows) == 1 else torch.cat(rows)


def _drawn(generator: Any, count: int, shape: tuple[int, ...]) -> Tensor:
    generators = list(generator) if isinstance(generator, (list, tuple)) else [generator]
    if any(not isinstance(g, torch.Generator) for g in generators):
        raise InvalidRequest("generator must be a torch.Generator or a list of them")
    if any(g.device.type != "cpu" for g in generators):
        raise InvalidRequest("generator must live on the CPU: noise must not depend on the device")
    if isinstance(generator, torch.Generator):
        return torch.randn((count, *shape), generator=generator)
    if len(generators) != count:
        raise InvalidRequest(f"{len(generators)} generators for {count} images")
    return torch.cat([torch.randn((1, *shape), generator=g) for g in generators])


def _seeds(seed: Any, n_prompts: int, per_prompt: int) -> list[int]:
    if seed is None:
        # Below 2**32 so that a seed can be read out, typed again and passed through JSON.
        seed = [secrets.randbits(32) for _ in range(n_prompts * per_prompt)]
    bases = list(seed) if isinstance(seed, (list, tuple)) else [seed] * n_prompts
    if any(isinstance(s, bool) or not isinstance(s, int) or not 0 <= s <= MAX_SEED - per_prompt for s in bases):
        raise InvalidRequest(f"seed={seed!r} must be whole numbers from 0 to 2**64 - 1")
    if len(bases) == n_prompts:
        return [base + i for base in bases for i in range(per_prompt)]
    if len(bases) == n_prompts * per_prompt:
        return bases
    raise InvalidRequest(f"{len(bases)} seeds for {n_prompts} prompts of {per_prompt} images each")


def _query(request: Request, can: Abilities, n_prompts: int, mode: str) -> tuple[list[str] | None, Tensor | None]:
    query = request.query
    if query is None:
        return None, None
    if isinstance(query, Tensor):
        key = query.detach().to("cpu", torch.float32)
        key = key[None] if key.ndim == 1 else key
        if key.ndim != 2 or key.shape[1] != can.key_width or key.shape[0] not in (1, n_prompts):
            raise InvalidRequest(f"query key must be ({n_prompts}, {can.key_width}), not {tuple(query.shape)}")
        norm = key.norm(dim=1, keepdim=True)
        if not bool(torch.isfinite(key).all()) or not bool((norm > 0).all()):
            raise InvalidRequest("query key holds NaN, infinity or only zeros")
        return None, (key / norm).expand(n_prompts, -1)
    texts = _texts("query", query)
    if len(texts) not in (1, n_prompts):
        raise InvalidRequest(f"{len(texts)} queries for {n_prompts} prompts")
    return (texts * n_prompts if len(texts) == 1 else texts), None


def _min_score(value: Any) -> float:
    if value is None:
        return float("-inf")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= GREATEST:
        raise InvalidRequest(f"min_score={value!r} must be a number within ±{GREATEST:.4g}, as scores are")
    return float(value)


def _per_image(
    name: str, value: Any, default: float, count: int, n_prompts: int, low: float, high: float | None
) -> Tensor:
    if value is None:
        return torch.full((count,), default)
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    for v in values:
        bad = isinstance(v, bool) or not isinstance(v, (int, float)) or not low <= v <= GREATEST
        if bad or (high is not None and v > high):
            bound = f"in [{low:g}, {high:g}]" if high is not None else f"a number from {low:g} to {GREATEST:.4g}"
            raise InvalidRequest(f"{name}={v!r} must be {bound}")
    if len(values) == n_prompts != count:
        values = [v for v in values for _ in range(count // n_prompts)]
    if len(values) not in (1, count):
        raise InvalidRequest(f"{len(values)} values of {name} for {count} images")
    return torch.tensor([float(v) for v in values]).expand(count).clone()
