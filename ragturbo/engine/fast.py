"""The bundle's networks as the graph engine runs them: folded, packed, fused, LoRA merged. The bundle stays as is."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ragturbo.errors import InvalidRequest
from ragturbo.model.adapter import HSpaceAdapter
from ragturbo.model.bundle import Bundle
from ragturbo.model.fold import FoldedUNet, Replaced, StepConstants
from ragturbo.model.fused import NormAct, Resnet
from ragturbo.model.onestep import EulerSchedule, make_schedule
from ragturbo.model.text import TextStates
from ragturbo.model.ties import Ties, sharing_copy
from ragturbo.ops import dispatch

log = logging.getLogger("ragturbo")
MAX_STEPS = 4


@dataclass(frozen=True)
class Schedule:
    """A deterministic scheduler as numbers on the host: a captured step has no others."""

    timesteps: tuple[float, ...]
    constants: tuple[StepConstants, ...]


def schedules_of(bundle: Bundle) -> dict[int, Schedule]:
    """By number of steps: those that can be recorded."""
    found = {}
    for steps in range(1, MAX_STEPS + 1):
        schedule = make_schedule(bundle.scheduler, steps, distilled=bundle.info.distilled)
        if isinstance(schedule, EulerSchedule):
            timesteps = tuple(float(t) for t in schedule.timesteps.tolist())
            found[steps] = Schedule(timesteps, tuple(StepConstants.of(schedule)))
    return found


def choose_attention(name: str, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """What runs the UNet's attention, and why. A name runs or raises; only "auto" chooses."""
    if name == "auto":
        # Torch's own flash kernels; ours has not been measured faster in the UNet on any machine yet.
        return "sdpa", "torch's scaled_dot_product_attention; no machine's measurements say otherwise"
    why_not = dispatch.refusal("cross_attention", name, device.type, dtype)
    if why_not is not None:
        raise InvalidRequest(f"attention={name!r}: {why_not}")
    return name, "asked for"


class FastModel:
    def __init__(self, bundle: Bundle, *, attention: str = "auto", compiled: bool = False) -> None:
        self.bundle, self.compiled = bundle, compiled
        self.attention, self.attention_why = choose_attention(attention, bundle.device, bundle.dtype)
        self.schedules = schedules_of(bundle)
        self._timesteps = sorted({t for s in self.schedules.values() for t in s.timesteps}, reverse=True)
        # fp16 is tried first everywhere; what overflows moves the decoder to fp32, by name and for good.
        self.vae_dtype = bundle.dtype
        self._make()

    @property
    def device(self) -> torch.device:
        return self.bundle.device

    @property
    def dtype(self) -> torch.dtype:
        return self.bundle.dtype

    def _make(self) -> None:
        bundle = self.bundle
        if bundle.device.type == "cuda":
            # The layout of the tensor cores' convolutions, and of H-space tokens. Values stay as they are.
            for weight in (*bundle.unet.unet.parameters(), *bundle.vae.module.parameters()):
                if weight.ndim == 4:
                    weight.data = weight.data.contiguous(memory_format=torch.channels_last)
        # Whole numbers, as the schedulers' own timesteps are where they are whole.
        steps = [int(t) if t == int(t) else t for t in self._timesteps]
        self.unet = FoldedUNet(bundle.unet, steps, self.attention)
        self.vae, self._vae_ties, vae_table = fused_decoder(bundle.vae.module, self.vae_dtype)
        self.replaced: list[Replaced] = [*self.unet.replaced, *vae_table]
        self.adapter = None if bundle.adapter is None else _own_copy(bundle.adapter)
        if self.compiled:
            self._compile()

    def _compile(self) -> None:
        """Inductor within every block; the graph around them is ours."""
        unet = self.unet.unet
        for path, block in [
            *((f"down_blocks.{i}", b) for i, b in enumerate(unet.down_blocks)),
            ("mid_block", unet.mid_block),
            *((f"up_blocks.{i}", b) for i, b in enumerate(unet.up_blocks)),
            ("vae.decoder", self.vae.decoder),
        ]:
            block.compile(dynamic=False, options={"triton.cudagraphs": False})
            self.replaced.append(Replaced(path, type(block).__name__, "torch.compile"))

    def refresh(self) -> bool:
        """After new weights: True where they were copied into the memory that graphs read; False where the networks
        were made anew, and every graph must be recorded again."""
        adapter = self.bundle.adapter
        if self.unet.refresh() and _same_shape(self.adapter, adapter):
            if self.adapter is not None and adapter is not None:
                with torch.no_grad():
                    for own, new in zip(self.adapter.parameters(), adapter.parameters(), strict=True):
                        own.copy_(new)
            return True
        self._make()
        return False

    def use_fp32_vae(self) -> None:
        log.warning("the VAE's decoder overflows in %s: it runs in float32 from now on", self.vae_dtype)
        self.vae_dtype = torch.float32
        self._make()

    def timestep(self, steps: int, i: int) -> int:
        """The folded UNet's index of step i of so many."""
        return self._timesteps.index(self.schedules[steps].timesteps[i])

    def text(self, input_ids: Tensor) -> TextStates:
        return self.bundle.text.encode(input_ids)

    def decode(self, latents: Tensor) -> Tensor:
        """(B, c, h, w) fp32 -> (B, 3, H, W) around [-1, 1], not clamped: an overflow is still to be seen."""
        vae = self.bundle.vae
        return self.vae.decode((latents / vae.scale + vae.shift).to(self.vae_dtype)).sample


def fused_decoder(module: Any, dtype: torch.dtype) -> tuple[Any, Ties, list[Replaced]]:
    """A view of the autoencoder whose decoder is made of fused layers; a copy where its type differs."""
    ties, table = Ties(module), []
    if dtype != next(module.parameters()).dtype:
        other = sharing_copy(module)
        other.encoder = None
        # A real copy before the cast, which works in place.
        was = str(next(module.parameters()).dtype)
        return copy.deepcopy(other).to(dtype), ties, [Replaced("vae.decoder", was, str(dtype))]
    view = sharing_copy(module, ("ResnetBlock2D", "Encoder"))
    for path, part in list(module.decoder.named_modules()):
        if type(part).__name__ == "ResnetBlock2D" and part.time_emb_proj is None:
            view.set_submodule(f"decoder.{path}", Resnet(ties, f"decoder.{path}", part, None))
            table.append(Replaced(f"vae.decoder.{path}", "ResnetBlock2D", "Resnet"))
    if isinstance(getattr(view.decoder, "conv_act", None), nn.SiLU):
        view.decoder.conv_norm_out = NormAct(module.decoder.conv_norm_out)
        view.decoder.conv_act = nn.Identity()
        table.append(Replaced("vae.decoder.conv_norm_out", "GroupNorm + SiLU", "NormAct"))
    return view, ties, table


def _own_copy(adapter: HSpaceAdapter) -> HSpaceAdapter:
    """In memory of its own, which stays where it is when the bundle's adapter is another one."""
    own: HSpaceAdapter = sharing_copy(adapter)
    for module in own.modules():
        for name, weight in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(weight.detach().clone(), requires_grad=False))
    return own


def _same_shape(own: HSpaceAdapter | None, new: HSpaceAdapter | None) -> bool:
    if own is None or new is None:
        return own is new
    return (own.kind, own.channels, own.heads) == (new.kind, new.channels, new.heads)
