"""Real model sizes without a GPU: fake CUDA tensors, with checks of every operation on them.

FakeTensorMode propagates shapes, types and devices through the whole step and raises if a value is read (`.item()`,
`.tolist()`, `nonzero`, indexing by a mask). The checks find what it allows and a capture does not: tensors made on the
host, and host-device copies outside the arenas.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

from ragturbo.engine import fast_model as fast
from ragturbo.engine.recorder import Uncaptured
from ragturbo.model.adapter import HSpaceAdapter
from ragturbo.model.bundle import Bundle
from ragturbo.model.info import BundleInfo
from ragturbo.model.text import TextEncoder
from ragturbo.model.unet import HSpaceUNet
from ragturbo.model.vae import VAE

SD21 = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "attention_head_dim": (5, 10, 20, 20),
    "cross_attention_dim": 1024,
    "norm_num_groups": 32,
}
SD_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 512,
}


NO_LAUNCH = ("aten::empty", "aten::new_empty", "prim::")


class Broken(AssertionError):
    """A capture on a GPU would fail here, or replay something stale."""


class Watch(TorchDispatchMode):
    def __init__(self, recorder: StagedRecorder) -> None:
        super().__init__()
        self.recorder = recorder
        self.launches: Counter[str] = Counter()
        self.by_stage: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.name() == "aten::scaled_dot_product_attention":
            # The GPU's kernels lay their output out as (B, L, heads, d); the fake one is the host's formula.
            out = out.transpose(1, 2).contiguous().transpose(1, 2)
        devices = {t.device.type for t in _tensors((args, kwargs, out))}
        if "cpu" in devices and not self.recorder.border:
            what = "crosses the border outside an arena" if "cuda" in devices else "works on the host"
            raise Broken(f"{func} {what}, in stage {self.recorder.now!r}")
        if _works(func, args, kwargs, out):
            self.launches[func.name()] += 1
            self.by_stage[self.recorder.now] += 1
        return out


def _works(func: Any, args: Any, kwargs: Any, out: Any) -> bool:
    """Whether an operation reads and writes memory. A name does not show a view: `reshape` and `to` may copy."""
    if func.name().startswith(NO_LAUNCH):
        return False
    if func._schema.is_mutable:
        return True
    given = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
    return any(t.untyped_storage()._cdata not in given for t in _tensors(out))


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(tree) if isinstance(t, torch.Tensor)]


class StagedRecorder(Uncaptured):
    """Records the running stage; only "copy" may copy between host and device."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.border = "", False

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        before = self.now, self.border
        self.now, self.border = name, name == "copy"
        yield
        self.now, self.border = before


@contextmanager
def fake_cuda() -> Iterator[None]:
    """Inside, new tensors are fake; schedules, whose constants are numbers on the host, are made for real."""
    real = fast.constant_schedules

    def outside(*args: Any, **options: Any) -> Any:
        with unset_fake_temporarily():
            return real(*args, **options)

    fast.constant_schedules = outside
    try:
        with FakeTensorMode(), torch.inference_mode():
            yield
    finally:
        fast.constant_schedules = real


def make_bundle(tiny: ModuleType, *, real_sizes: bool, adapter: str | None = "transformer") -> Bundle:
    """On fake CUDA, in fp16: sd-turbo's sizes, or tests/tiny.py's. Call it inside `fake_cuda`."""
    from diffusers import AutoencoderKL

    with unset_fake_temporarily():
        tokenizer = tiny.clip_tokenizer(77 if real_sizes else 16)
        scheduler = tiny.scheduler()
    if real_sizes:
        text = tiny.text_encoder(tokenizer, 1024, 23, num_attention_heads=16)
        unet, vae = tiny.unet(**SD21), AutoencoderKL(**SD_VAE)
    else:
        text, unet, vae = tiny.text_encoder(tokenizer), tiny.unet(), tiny.vae()
    made = None if adapter is None else HSpaceAdapter(unet.config.block_out_channels[-1], kind=adapter)
    # Made on the fake host and then moved: some of transformers' initialisation makes real scalars.
    for module in (text, unet, vae, made):
        if module is not None:
            _place(module)
    names = {"text_encoder": "", "unet_encoder": "", "vae_encoder": ""}
    return Bundle(
        name="fake",
        info=BundleInfo(distilled=True, key_kind="pooled", base_model="fake"),
        text=TextEncoder(tokenizer, text),
        unet=HSpaceUNet(unet),
        vae=VAE(vae),
        scheduler=scheduler,
        adapter=made,
        fingerprints=names,
    )


def _place(model: nn.Module) -> None:
    """`model.to("cuda", torch.float16).eval()`, which torch does by swapping tensors and fake ones do not allow."""
    for module in model.eval().modules():
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None:
                continue
            moved = tensor.detach().to("cuda", torch.float16 if tensor.is_floating_point() else None)
            if name in module._parameters:
                module._parameters[name] = nn.Parameter(moved, requires_grad=False)
            else:
                module._buffers[name] = moved
