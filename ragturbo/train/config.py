"""The configuration of a training run: frozen dataclasses that validate their values, read from YAML."""

from __future__ import annotations

import dataclasses
import difflib
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar

from ragturbo.config import one_of
from ragturbo.errors import InvalidRequest
from ragturbo.train import require
from ragturbo.train.settings import build, check_range, or_list, put, yaml_problem

log = logging.getLogger("ragturbo")

# The largest micro-batch that is chosen if none is set.
MICRO_BATCH = 16


@dataclass(frozen=True)
class LoRAConfig:
    """The decoder's LoRA, trained with peft."""

    rank: int = 64
    """0: no LoRA."""
    alpha: float = 64.0
    dropout: float = 0.0
    targets: str = (
        r"up_blocks\..*\.(to_q|to_k|to_v|to_out\.0|proj_in|proj_out|ff\.net\.0\.proj|ff\.net\.2"
        r"|conv1|conv2|conv_shortcut)"
    )
    """A regular expression over module names. It may match decoder modules only."""

    def __post_init__(self) -> None:
        check_range("student.lora", self, rank=0, alpha=0, dropout=(0, 1))


@dataclass(frozen=True)
class StudentConfig:
    steps: int = 1
    """Number of steps, the n of T_n: 1 to 4."""
    adapter: str = "transformer"
    heads: int | None = None
    num_neighbors: int = 1
    phrases: int = 0
    """Rows of the adapter's phrase embeddings. Neighbour i of a sample then belongs to its prompt's i-th phrase."""
    lam: float | None = None
    """λ of Eq. 5; None: the cosine of the prompt's key and the neighbour's, as in the paper."""
    neighbors: str = "nearest"
    """"random" trains with random rows of the database, as a control."""
    retrieval_dropout: float = 0.0
    """Share of samples trained without neighbours."""
    lora: LoRAConfig = field(default_factory=LoRAConfig)

    def __post_init__(self) -> None:
        one_of("student.adapter", self.adapter, ("transformer", "attention", "none"))
        one_of("student.neighbors", self.neighbors, ("nearest", "random"))
        check_range(
            "student", self, steps=(1, 4), num_neighbors=(1, 64), phrases=0, lam=(0, 1), retrieval_dropout=(0, 1)
        )
        if self.phrases > self.num_neighbors:
            raise InvalidRequest(
                f"student.phrases={self.phrases} is more than student.num_neighbors={self.num_neighbors}: each phrase "
                "has one neighbour"
            )
        if self.phrases and (self.adapter == "none" or self.neighbors == "random"):
            raise InvalidRequest("student.phrases needs an adapter, and neighbours that belong to phrases")


@dataclass(frozen=True)
class OptimConfig:
    """AdamW. The default rate is constant, as in the paper."""

    lr: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 1.0
    """Largest gradient norm; 0: no clipping."""
    warmup: int = 0
    decay: str = "none"
    """"cosine" decays to lr / 50 at loop.max_steps; a resumed run uses the schedule of its own max_steps."""

    def __post_init__(self) -> None:
        check_range("optim", self, lr=0, eps=0, weight_decay=0, clip=0, warmup=0)
        one_of("optim.decay", self.decay, ("none", "cosine"))
        if not all(0 <= beta < 1 for beta in self.betas):
            raise InvalidRequest(f"optim.betas={self.betas} must be two numbers in [0, 1)")

    def rate(self, update: int, steps: int) -> float:
        """The learning rate of update number `update`, counted from 0, in a run of `steps`."""
        if update < self.warmup:
            return self.lr * (update + 1) / self.warmup
        if self.decay == "none":
            return self.lr
        done = min(1.0, (update - self.warmup) / max(1, steps - self.warmup))
        return self.lr * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


@dataclass(frozen=True)
class DiscriminatorConfig:
    stages: tuple[str, ...] | None = None
    """"down_0", … and "mid"; None: all."""
    width: int = 256
    spectral_norm: bool = True
    normalise: bool = True
    """GroupNorm without affine parameters on the input of each head."""
    r1: float = 0.0
    """γ of the R1 penalty on real features; 0: none."""
    misaligned: bool = False
    """Also use real images paired with other samples' prompts as fakes, for heads whose stage sees the prompt."""
    real: str = "all"
    """The samples that D treats as real: "all", as in the paper, or "images", only those without a stored noise. The
    student's output soon resembles the teacher's latents, and D learns nothing from telling them apart."""
    shared_fake: bool = True
    """Use one backbone pass of the fakes for both D and G. False: D runs a separate pass, batched with the real samples
    and without gradients. The gradients are the same."""
    optim: OptimConfig = field(default_factory=OptimConfig)

    def __post_init__(self) -> None:
        one_of("discriminator.real", self.real, ("all", "images"))
        check_range("discriminator", self, width=1, r1=0)


@dataclass(frozen=True)
class LossConfig:
    """The weights of Eq. 10."""

    adversarial: float = 1.0
    alpha: float = 2.5
    beta: float = 1.0
    lpips_weights: str | None = None
    """A safetensors file, or "random" for untrained features."""
    augment: float = 1.0
    """Probability of each augmentation before the LPIPS network."""
    hspace: float = 0.0
    """Weight of the regression of h_tgt + λ·g onto the h of the teacher's prompt at the same noise, for samples whose
    prompt is not the one that the teacher drew."""

    def __post_init__(self) -> None:
        check_range("loss", self, adversarial=0, alpha=0, beta=0, augment=(0, 1), hspace=0)


@dataclass(frozen=True)
class SourceConfig:
    EXAMPLE: ClassVar[str] = "path: FOLDER, weight: 1"
    path: str
    weight: float = 1.0
    """Share of the samples, relative to the other sources."""

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise InvalidRequest(f"data.sources: {self.path} has weight {self.weight}; remove the source instead")


@dataclass(frozen=True)
class DataConfig:
    sources: tuple[SourceConfig, ...] = ()
    held_out: str | None = None
    """A folder made by `ragturbo data teacher` that is not trained on; its loss is reported."""
    prefetch: int = 2
    """Micro-batches read ahead by a thread."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise InvalidRequest("data.sources is empty: add a folder made by `ragturbo data teacher` or `data encode`")
        check_range("data", self, prefetch=1)


@dataclass(frozen=True)
class LoopConfig:
    batch: int = 2048
    """Samples per optimiser step, over all processes."""
    micro_batch: int | None = None
    """Samples per forward pass of one process; gradients are accumulated up to `batch`. None: the largest divisor of a
    process's share of the batch up to 16 (see `settle`)."""
    max_steps: int = 20_000
    precision: str = "bf16"
    gradient_checkpointing: bool = False
    compile: bool = False
    ema: float = 0.999
    """Decay of the moving average that is exported; 0: no average."""
    max_skipped: int = 50
    """Stop after this many consecutive steps with a gradient that is not finite."""
    log_every: int = 10
    held_out_every: int = 100
    """Steps between measurements of data.held_out; a multiple of log_every."""
    save_every: int = 500
    keep: int = 2
    sample_every: int = 500
    """Steps between sample grids; 0: none."""
    samples: int = 8
    dead_after: int = 200
    """Report a discriminator head that is still at its initial loss after this many steps."""
    tensorboard: bool = False

    def __post_init__(self) -> None:
        one_of("loop.precision", self.precision, ("fp32", "bf16"))
        ones = ("batch", "micro_batch", "max_steps", "max_skipped", "log_every", "held_out_every", "save_every", "keep",
                "samples", "dead_after")  # fmt: skip
        check_range("loop", self, **dict.fromkeys(ones, 1), sample_every=0)
        if not 0 <= self.ema < 1:
            raise InvalidRequest(f"loop.ema={self.ema} must be in [0, 1)")
        if self.micro_batch is not None and self.batch % self.micro_batch:
            raise InvalidRequest(
                f"loop.batch={self.batch} is not a multiple of loop.micro_batch={self.micro_batch}: set "
                f"loop.micro_batch={largest_divisor(self.batch, self.micro_batch)}, or leave it out to have it chosen"
            )


@dataclass(frozen=True)
class LADDConfig:
    """mode "adapter": train an adapter and a decoder LoRA on a frozen student (Sec. 3.4). "student": a whole UNet."""

    model: str
    data: DataConfig
    mode: str = "adapter"
    revision: str | None = None
    teacher: str | None = None
    """The model whose UNet D uses. None: the model's own teacher_unet/; "self": the student's frozen encoder."""
    database: str | None = None
    """None: the model's own database/."""
    seed: int = 0
    student: StudentConfig = field(default_factory=StudentConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)

    def __post_init__(self) -> None:
        if self.mode not in ("adapter", "student"):
            raise InvalidRequest(f"the setting mode is {self.mode!r}; it must be 'adapter' or 'student'")
        student, loop = self.student, self.loop
        no_adapter = student.adapter == "none" and student.lora.rank == 0
        if self.mode == "adapter" and no_adapter:
            raise InvalidRequest("student.adapter=none and student.lora.rank=0 leave nothing to train")
        if self.mode == "student" and not no_adapter:
            raise InvalidRequest(
                "`mode=student` trains the whole UNet: set student.adapter=none and student.lora.rank=0, and train an "
                "adapter on the result with `mode=adapter`"
            )
        if self.loss.hspace and not self.retrieves:
            raise InvalidRequest("loss.hspace trains the adapter, and this configuration has none")
        if self.mode == "student" and self.teacher == "self":
            raise InvalidRequest(
                "`mode=student` trains the student's encoder: with `teacher=self` D would change with it"
            )
        if self.data.held_out is not None and loop.held_out_every % loop.log_every:
            raise InvalidRequest(
                f"loop.held_out_every={loop.held_out_every} is not a multiple of loop.log_every={loop.log_every}"
            )
        if self.discriminator.misaligned and min(loop.batch, loop.micro_batch or loop.batch) < 2:
            raise InvalidRequest(
                "discriminator.misaligned takes other samples' prompts from the micro-batch, which has "
                f"{min(loop.batch, loop.micro_batch or loop.batch)} here: set loop.batch and loop.micro_batch to 2 or "
                "more for each process, or discriminator.misaligned=false"
            )

    @property
    def retrieves(self) -> bool:
        return self.mode == "adapter" and self.student.adapter != "none"


def settle(config: LADDConfig, processes: int = 1) -> LADDConfig:
    """Choose the micro-batch: the largest divisor of a process's share of the batch up to `loop.micro_batch`, or up to
    16 if it is not set. The result always gives the same configuration again.

    Raises:
        InvalidRequest: the batch cannot be divided by the number of processes.
    """
    loop = config.loop
    share, rest = divmod(loop.batch, processes)
    if rest:
        raise InvalidRequest(
            f"loop.batch={loop.batch} cannot be shared by {processes} processes: set it to a multiple of {processes}"
        )
    chosen = largest_divisor(share, loop.micro_batch or MICRO_BATCH)
    if chosen == loop.micro_batch:
        return config
    if loop.micro_batch is not None:
        log.info("loop.micro_batch: %d instead of %d, to divide the batch of %d", chosen, loop.micro_batch, loop.batch)
    return dataclasses.replace(config, loop=dataclasses.replace(loop, micro_batch=chosen))


def largest_divisor(number: int, most: int) -> int:
    return next(d for d in range(min(number, most), 0, -1) if number % d == 0)


def load_config(source: str | Path, changes: Sequence[str] = ()) -> LADDConfig:
    """Read a YAML file or a built-in configuration.

    Args:
        changes: settings to replace, such as "loop.batch=64". If they set the batch and not the micro-batch, that of
            the file is only an upper bound.
    """
    yaml = require("yaml")
    path = find_config(source)
    try:
        values = yaml.safe_load(path.read_text("utf-8"))
    except yaml.YAMLError as error:
        raise InvalidRequest(f"{path} cannot be read as YAML: {yaml_problem(error)}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise InvalidRequest(f"{path} contains no settings")
    names = set()
    for change in changes:
        name, separator, text = change.partition("=")
        if not separator:
            raise InvalidRequest(f"--set {change!r}: write key=value, such as loop.batch=64")
        names.add(name.strip())
        try:
            put(values, name.strip(), yaml.safe_load(text))
        except yaml.YAMLError as error:
            raise InvalidRequest(f"--set {change!r}: {yaml_problem(error)}") from error
    loop = values.get("loop")
    if "loop.batch" in names and "loop.micro_batch" not in names and isinstance(loop, dict):
        batch, bound = loop["batch"], loop.get("micro_batch")
        if type(batch) is int and type(bound) is int and min(batch, bound) > 0:
            loop["micro_batch"] = largest_divisor(batch, bound)
    return from_dict(values)


def find_config(source: str | Path) -> Path:
    path = Path(source).expanduser()
    if path.is_file():
        return path
    built_in = built_in_configs()
    if str(source) in built_in:
        return built_in[str(source)]
    if path.is_dir():
        raise InvalidRequest(f"{source} is a folder, not a configuration: give a YAML file or {or_list(built_in)}")
    near = difflib.get_close_matches(str(source), built_in, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise InvalidRequest(f"no configuration {source}; the built-in ones are: {', '.join(built_in)}{hint}")


def built_in_configs() -> dict[str, Path]:
    folder = Path(str(resources.files("ragturbo") / "train" / "configs"))
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def from_dict(values: dict[str, Any]) -> LADDConfig:
    return build(LADDConfig, values)


def to_dict(config: LADDConfig) -> dict[str, Any]:
    """Nested dicts, lists and scalars."""
    # A round trip through JSON turns tuples into lists.
    return json.loads(json.dumps(dataclasses.asdict(config)))


def to_yaml(config: LADDConfig) -> str:
    return require("yaml").safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)
