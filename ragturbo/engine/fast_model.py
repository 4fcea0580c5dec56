"""The bundle's networks as the graph engine runs them: folded, packed and fused, with LoRA merged.

The bundle's own modules compute the same as before; on a GPU their weights are converted to channels_last in place.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ragturbo.engine import attention as attention_of
from ragturbo.engine import packing, upsampling
from ragturbo.errors import ModelError
from ragturbo.model.adapter import HSpaceAdapter
from ragturbo.model.bundle import Bundle
from ragturbo.model.fold import FoldedUNet, StepConstants
from ragturbo.model.fused_text import FusedText
from ragturbo.model.fused_vae import fused_decoder
from ragturbo.model.onestep import EulerSchedule, make_schedule
from ragturbo.model.text import TextStates
from ragturbo.model.ties import Replaced, sharing_copy

log = logging.getLogger("ragturbo")
MAX_STEPS = 4
_COMPILATIONS = 256
# Pixels the VAE decodes at once. Two images of 512x512 fill a GPU; eight would take four times the memory.
_DECODED_AT_ONCE = 2 * 512 * 512


@dataclass(frozen=True)
class ConstantSchedule:
    """A deterministic scheduler's timesteps and coefficients as Python numbers, which a graph captures as constants."""

    timesteps: tuple[float, ...]
    constants: tuple[StepConstants, ...]


def constant_schedules(bundle: Bundle) -> dict[int, ConstantSchedule]:
    """The schedules that can be captured, by number of steps."""
    found = {}
    for steps in range(1, MAX_STEPS + 1):
        schedule = make_schedule(bundle.scheduler, steps, distilled=bundle.info.distilled)
        if isinstance(schedule, EulerSchedule):
            timesteps = tuple(float(t) for t in schedule.timesteps.tolist())
            found[steps] = ConstantSchedule(timesteps, tuple(StepConstants.of(schedule)))
    return found


class FastModel:
    def __init__(
        self, bundle: Bundle, *, attention: str = "auto", compiled: bool = False, packs: bool = True,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        """
        Args:
            packs: whether to pack weights on a CPU.
            dtype: of UNet, adapter and VAE, if it is not the bundle's; needs packed weights.
        """
        self.bundle, self.compiled, self.dtype = bundle, compiled, dtype or bundle.dtype
        able, self.packs_why = packing.choose(bundle.device, self.dtype, compiled)
        self.packs = packs and able
        if able and not packs:
            self.packs_why = "not packed: a recorder watches torch's operations"
        self.attention, self.attention_why = attention_of.choose(attention, bundle.device, self.dtype)
        self.schedules = constant_schedules(bundle)
        if not self.schedules:
            raise ModelError(f"{type(bundle.scheduler).__name__} is not a deterministic Euler scheduler")
        self._timesteps = sorted({t for s in self.schedules.values() for t in s.timesteps}, reverse=True)
        # Until an image overflows; see use_fp32_vae.
        self.vae_dtype = self.dtype
        if bundle.device.type == "cuda":
            # The layout of tensor-core convolutions and of H-space tokens.
            for weight in (*bundle.unet.unet.parameters(), *bundle.vae.module.parameters()):
                if weight.ndim == 4:
                    weight.data = weight.data.contiguous(memory_format=torch.channels_last)
        self.text_encoder = FusedText(bundle.text, packs=self.packs)
        self._make_unet()
        self._make_vae()

    @property
    def device(self) -> torch.device:
        return self.bundle.device

    @property
    def replaced(self) -> list[Replaced]:
        """The replaced modules and their replacements. The bundle keeps the originals."""
        return [*self.text_encoder.replaced, *self.unet.replaced, *self._vae_replaced]

    def _make_unet(self) -> None:
        bundle = self.bundle
        # Integers if they are whole, as in the schedulers.
        steps = [int(t) if t == int(t) else t for t in self._timesteps]
        self.unet = FoldedUNet(bundle.unet, steps, self.attention, dtype=self.dtype, packs=self.packs)
        self.adapter = None if bundle.adapter is None else _own_copy(bundle.adapter, self.dtype)
        if self.compiled:
            unet = self.unet.unet
            blocks = {f"down_blocks.{i}": block for i, block in enumerate(unet.down_blocks)}
            blocks |= {"mid_block": unet.mid_block}
            blocks |= {f"up_blocks.{i}": block for i, block in enumerate(unet.up_blocks)}
            self.unet.replaced += [_compiled(path, block) for path, block in blocks.items()]

    def _make_vae(self) -> None:
        name = "phases" if self.packs else upsampling.choose(self.device)
        self.vae, self._vae_replaced = fused_decoder(self.bundle.vae.module, self.vae_dtype, name, packs=self.packs)
        if self.compiled:
            self._vae_replaced.append(_compiled("vae.decoder", self.vae.decoder))

    def refresh(self) -> bool:
        """Apply new weights. True: copied into the memory that graphs read. False: the networks were rebuilt, and
        every graph must be recorded again."""
        adapter = self.bundle.adapter
        if self.unet.refresh() and _same_shape(self.adapter, adapter):
            if self.adapter is not None and adapter is not None:
                with torch.no_grad():
                    for own, new in zip(self.adapter.parameters(), adapter.parameters(), strict=True):
                        own.copy_(new)
            return True
        self._make_unet()
        return False

    def use_fp32_vae(self) -> None:
        log.warning("the VAE's decoder overflows in %s: it runs in float32 from now on", self.vae_dtype)
        self.vae_dtype = torch.float32
        self._make_vae()

    @property
    def sample_dtype(self) -> torch.dtype:
        """Of the UNet's input, whose first convolution stays in the bundle's dtype."""
        return self.bundle.dtype

    def timestep(self, steps: int, i: int) -> int:
        """The folded UNet's index of step i."""
        return self._timesteps.index(self.schedules[steps].timesteps[i])

    def text(self, input_ids: Tensor) -> TextStates:
        return self.text_encoder.encode(input_ids)

    def decode(self, latents: Tensor) -> Tensor:
        """(B, c, h, w) fp32 -> (B, 3, H, W) around [-1, 1], not clamped, so that an overflow remains visible."""
        vae = self.bundle.vae
        z = latents / vae.scale
        if vae.shift:
            z = z + vae.shift
        pixels = latents.shape[2] * latents.shape[3] * vae.factor**2
        parts = z.to(self.vae_dtype).split(max(1, _DECODED_AT_ONCE // pixels))
        images = [self.vae.decode(part).sample for part in parts]
        return images[0] if len(images) == 1 else torch.cat(images)


def _compiled(path: str, block: nn.Module) -> Replaced:
    """Compile the block with Inductor, without its own CUDA graphs. A graph break is an error."""
    # Each image size, bucket and timestep compiles separately; past torch's default limit of 8, blocks would silently
    # run uncompiled.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _COMPILATIONS)
    block.compile(dynamic=False, fullgraph=True, options={"triton.cudagraphs": False})
    return Replaced(path, type(block).__name__, "torch.compile")


def _own_copy(adapter: HSpaceAdapter, dtype: torch.dtype) -> HSpaceAdapter:
    """A copy in its own memory, whose addresses do not change when the bundle loads another adapter."""
    own: HSpaceAdapter = sharing_copy(adapter)
    for module in own.modules():
        for name, weight in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(weight.detach().to(dtype, copy=True), requires_grad=False))
    return own


def _same_shape(own: HSpaceAdapter | None, new: HSpaceAdapter | None) -> bool:
    if own is None or new is None:
        return own is new
    shapes = [[(name, weight.shape) for name, weight in one.named_parameters()] for one in (own, new)]
    return (own.kind, own.heads) == (new.kind, new.heads) and shapes[0] == shapes[1]
