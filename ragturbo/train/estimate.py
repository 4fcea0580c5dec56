"""`ragturbo train --dry-run`: parameters, memory and FLOPs of a configuration, computed without weights or a GPU."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from ragturbo.errors import ModelError, RagTurboError
from ragturbo.model.bundle import TEACHER
from ragturbo.model.source import resolve
from ragturbo.model.unet import HSpaceUNet
from ragturbo.train.config import LADDConfig, settle, to_dict
from ragturbo.train.discriminator import Discriminator
from ragturbo.train.lpips import LatentLPIPS, LatentVGG
from ragturbo.train.models import make_discriminator
from ragturbo.train.stats import STATS
from ragturbo.train.student import Neighbors, Student

# Stable Diffusion 2.1 and sd-turbo, used if the configured model is not on this machine.
SD21: dict[str, Any] = {
    "sample_size": 64, "in_channels": 4, "out_channels": 4, "layers_per_block": 2, "use_linear_projection": True,
    "block_out_channels": (320, 640, 1280, 1280), "attention_head_dim": (5, 10, 20, 20), "cross_attention_dim": 1024,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}  # fmt: skip
_TEXT_TOKENS = 77


def estimate(config: LADDConfig, out: str | Path | None = None, processes: int = 1) -> dict[str, Any]:
    """Parameters by module, memory of one process and FLOPs, from one training step traced on meta tensors.

    If `out` is the folder of a run, its median samples/s is reported too.
    """
    config = settle(config, processes)
    assert config.loop.micro_batch is not None
    unet_config, notes = _unet_config(config)
    vgg_width = _vgg_width(config)
    if config.loss.beta and vgg_width is None:
        notes.append(f"{config.loss.lpips_weights} is not on this machine: assuming latent LPIPS of width 64")
    dtype = torch.bfloat16 if config.loop.precision == "bf16" else torch.float32
    student, discriminator, lpips = _build(config, unet_config, vgg_width or 64, dtype)
    flops, activations = _trace(config, student, discriminator, lpips, dtype)
    width = dtype.itemsize
    trainable = sum(p.numel() for p in student.trainable().values())
    heads = sum(p.numel() for p in discriminator.parameters())
    frozen = sum(p.numel() for p in student.unet.parameters() if not p.requires_grad)
    teacher = 0 if config.teacher == "self" else _numel(discriminator.backbone.unet.unet)
    vgg = _numel(lpips)
    memory = {
        "frozen weights": width * (frozen + teacher + vgg),
        # Working copy and gradient; in fp32: master, gradient, two moments and the moving average.
        "trainable student": trainable * (2 * width + 4 * (4 + bool(config.loop.ema))),
        "discriminator heads": heads * 4 * 4,
        "stored activations": activations,
    }
    per_sample = sum(flops.values())
    return {
        "config": to_dict(config),
        "notes": notes,
        "parameters": {
            "trainable": {
                "adapter": _numel(student.adapter),
                "decoder LoRA" if config.mode == "adapter" else "unet": trainable - _numel(student.adapter),
                "discriminator heads": heads,
            },
            "frozen": {"student unet": frozen, "teacher encoder": teacher, "latent LPIPS": vgg},
        },
        "memory_bytes": {**memory, "total": sum(memory.values())},
        "flops_per_sample": {**flops, "total": per_sample},
        "flops_per_step": per_sample * config.loop.batch,
        "micro_batches_per_step": config.loop.batch // (config.loop.micro_batch * processes),
        "samples_per_s": _measured(out),
    }


def _unet_config(config: LADDConfig) -> tuple[dict[str, Any], list[str]]:
    notes = []
    try:
        folder = resolve(config.model, local_files_only=True, revision=config.revision)
        values = json.loads((folder / "unet" / "config.json").read_text("utf-8"))
        if config.teacher is None and not (folder / TEACHER).is_dir():
            notes.append(f"{config.model} has no {TEACHER}/: training needs teacher to be set")
        return values, notes
    except (RagTurboError, OSError, ValueError):
        notes.append(f"{config.model} is not on this machine: assuming the UNet of Stable Diffusion 2.1")
        return dict(SD21), notes


def _build(
    config: LADDConfig, unet_config: dict[str, Any], vgg_width: int, dtype: torch.dtype
) -> tuple[Student, Discriminator, LatentLPIPS | None]:
    from diffusers import EulerDiscreteScheduler, UNet2DConditionModel

    with torch.device("meta"):
        unet, teacher = (UNet2DConditionModel.from_config(unet_config) for _ in range(2))
    # nn.Module.to, because diffusers' own `to` warns about an empty list of fp32 modules.
    nn.Module.to(unet, dtype), nn.Module.to(teacher, dtype)
    student = Student(HSpaceUNet(unet), EulerDiscreteScheduler(timestep_spacing="trailing"), config).to("meta")
    for parameter in student.parameters():
        parameter.data = parameter.data.to(dtype)
    discriminator = make_discriminator(None if config.teacher == "self" else teacher, student, config).to("meta")
    lpips = None
    if config.loss.beta:
        lpips = LatentLPIPS(LatentVGG(unet.config.in_channels, vgg_width)).to("meta", dtype)
    return student.train(), discriminator.train(), lpips


def _trace(
    config: LADDConfig, student: Student, discriminator: Discriminator, lpips: LatentLPIPS | None, dtype: torch.dtype
) -> tuple[dict[str, int], int]:
    """FLOPs per sample and part, and the bytes that one micro-batch stores for its backward pass."""
    model, size = student.unet.config, config.loop.micro_batch
    assert size is not None
    side = model.sample_size if isinstance(model.sample_size, int) else model.sample_size[0]

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(size, *shape, dtype=dtype, device="meta")

    z0, noise = empty(model.in_channels, side, side), empty(model.in_channels, side, side)
    text = empty(_TEXT_TOKENS, student.hspace.text_width, dtype=dtype)
    i = torch.zeros(size, dtype=torch.int64, device="meta")
    grid = student.hspace.grid(side, side)
    retrieved = None
    if student.adapter is not None:
        k = config.student.num_neighbors
        rows = empty(k, grid[0] * grid[1], student.hspace.channels, dtype=dtype)
        valid = torch.ones(size, k, dtype=torch.bool, device="meta")
        retrieved = Neighbors(rows, empty(), valid, valid if config.student.phrases else None)
    flops: dict[str, int] = {}
    modules = [module for module in (student, discriminator, lpips) if module is not None]
    weights = {p.untyped_storage()._cdata for module in modules for p in module.parameters()}
    # Gradient checkpointing stores nothing inside a block, and its recomputation fails under this mode.
    attention = nullcontext if config.loop.gradient_checkpointing else _FlashAttention
    with attention(), _stored(weights) as kept:
        if config.loss.hspace:
            with _counted(flops, "target of the regression on h"), torch.no_grad():
                student.encode(student.noisy(z0, noise, i), i, text)
        with _counted(flops, "student forward"):
            z0_hat, _ = student(student.noisy(z0, noise, i), i, text, retrieved)
        with _counted(flops, "discriminator backbone forward"):
            with torch.no_grad():
                real = discriminator.backbone(z0, i, text)
                wrong = discriminator.backbone(z0, i, text) if config.discriminator.misaligned else None
                seen = None if config.discriminator.shared_fake else discriminator.backbone(z0_hat.detach(), i, text)
            fake = discriminator.backbone(z0_hat, i, text)
        with _counted(flops, "discriminator heads, forward and backward"):
            groups = [real, seen or [f.detach() for f in fake], *([wrong] if wrong else [])]
            logits = discriminator([torch.cat(stage) for stage in zip(*groups, strict=True)])
            torch.stack([x.mean() for x in logits]).sum().backward()
            judged = discriminator.judge(fake)
        if lpips is not None:
            with _counted(flops, "latent LPIPS forward"):
                distance = lpips(z0_hat, z0)
    with attention(), _counted(flops, "backward to the student"):
        loss = torch.stack([x.mean() for x in judged]).sum() + z0_hat.square().mean()
        (loss + distance.mean() if lpips is not None else loss).backward()
    return {name: count // size for name, count in flops.items()}, kept[0]


class _FlashAttention(TorchFunctionMode):
    """Use flash attention, as on a GPU. On meta tensors torch would choose the kernel that stores T×T matrices."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention or (kwargs or {}).get("attn_mask") is not None:
            return func(*args, **(kwargs or {}))
        return torch.ops.aten._scaled_dot_product_flash_attention(*args[:3])[0]


@contextmanager
def _counted(flops: dict[str, int], name: str) -> Iterator[None]:
    with FlopCounterMode(display=False) as counter:
        yield
    flops[name] = counter.get_total_flops()


@contextmanager
def _stored(weights: set[int]) -> Iterator[list[int]]:
    """Count the bytes that autograd saves, each storage once, without the weights."""
    total, seen = [0], set(weights)
    alive: list[Any] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            # Keep a reference, so that no later storage gets the same address.
            alive.append(storage)
            total[0] += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield total


def _measured(out: str | Path | None) -> float | None:
    if out is None or not (path := Path(out) / STATS).is_file():
        return None
    rates = [json.loads(line)["samples_per_s"] for line in path.read_text("utf-8").splitlines() if line]
    return sorted(rates)[len(rates) // 2] if rates else None


def _vgg_width(config: LADDConfig) -> int | None:
    """None if the file is missing."""
    weights = config.loss.lpips_weights
    if weights in (None, "random"):
        return 64
    try:
        return LatentLPIPS.load(str(weights)).vgg.width
    except ModelError:
        return None


def _numel(module: nn.Module | None) -> int:
    return 0 if module is None else sum(p.numel() for p in module.parameters())
