"""A UNet for known timesteps: what depends on t alone is a constant, and is added up before the first image.

One denoising step means one t. Its sinusoid, the time MLP and every resnet's projection of it are then fixed vectors
that end as part of a convolution's bias; Q, K and V of self-attention are one product, and the keys and values that
all cross-attentions take from the text are another. Few-step use keeps one set of biases for every timestep.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ragturbo.errors import InvalidRequest, ModelError
from ragturbo.model.fused import NormAct, Resnet, TextKVLayout, Transformer
from ragturbo.model.fused_vae import Upsample, can_upsample
from ragturbo.model.onestep import EulerSchedule
from ragturbo.model.ties import Replaced, Ties, sharing_copy
from ragturbo.model.unet import HSpaceUNet, UNetState


class FoldedUNet(HSpaceUNet):
    """encode and decode of `unet` at `timesteps` only, over shared weights; `unet` itself stays as it is.

    `encode(sample, i, text_kv)` takes the index of a timestep for the timestep and `text_kv(text)` for the text.
    """

    def __init__(self, unet: HSpaceUNet, timesteps: Sequence[int | float] | Tensor, attention: str = "sdpa") -> None:
        config = unet.unet.config
        for name in ("addition_embed_type", "class_embed_type", "num_class_embeds", "encoder_hid_dim_type"):
            if getattr(config, name, None) is not None:
                raise ModelError(
                    f"this UNet cannot be folded: {name}={getattr(config, name)!r} is more than t and text"
                )
        super().__init__(sharing_copy(unet.unet, ("ResnetBlock2D", "Transformer2DModel")))
        self.original = unet
        self.timesteps = torch.as_tensor(timesteps, device=unet.device).reshape(-1)
        self.ties = Ties(unet.unet)
        self.replaced: list[Replaced] = []
        self._layout = TextKVLayout()
        # The loops below ask the original's modules: those of the copy are on their way out.
        embeddings = [_embedding(unet, t) for t in self.timesteps]
        for path, module in list(unet.unet.named_modules()):
            kind = type(module).__name__
            if kind == "ResnetBlock2D":
                self._replace(path, module, Resnet(self.ties, path, module, embeddings))
            elif kind == "Transformer2DModel":
                self._replace(path, module, Transformer(self.ties, path, module, self._layout, attention))
            elif can_upsample(module):
                self._replace(path, module, Upsample(self.ties, path))
            elif kind == "ResnetBlockCondNorm2D":
                raise ModelError(f"{path} cannot be folded: it normalises by the time embedding")
        if isinstance(self.unet.conv_act, torch.nn.SiLU) and self.unet.conv_norm_out is not None:
            self._replace("conv_norm_out", self.unet.conv_norm_out, NormAct(self.unet.conv_norm_out))
            self.unet.conv_act = torch.nn.Identity()
        self.unet.eval()
        self.text_kv_weight = self.ties.packed(*self._layout.paths) if self._layout.paths else None

    def _replace(self, path: str, was: Any, now: torch.nn.Module) -> None:
        self.unet.set_submodule(path, now)
        self.replaced.append(Replaced(path, type(was).__name__, type(now).__name__))

    @property
    def text_kv_width(self) -> int:
        """ΣC of `text_kv`."""
        return self.text_width if self.text_kv_weight is None else self.text_kv_weight.shape[0]

    def text_kv(self, text: Tensor) -> Tensor:
        """(B, L, D) -> the keys and values of every cross-attention side by side, (B, L, ΣC): one launch."""
        return text if self.text_kv_weight is None else F.linear(text, self.text_kv_weight)

    def encode(self, sample: Tensor, timestep: Any, text: Tensor, **conditions: Any) -> UNetState:
        """sample: (B, c, H, W); timestep: an index into `timesteps`; text: what `text_kv` gave."""
        if any(value is not None for value in conditions.values()):
            raise InvalidRequest(f"a folded UNet takes no conditions: {', '.join(conditions)}")
        if not isinstance(timestep, int) or not 0 <= timestep < len(self.timesteps):
            raise InvalidRequest(f"timestep {timestep!r} is not the index of one of {len(self.timesteps)} folded ones")
        return super().encode(sample, timestep, text)

    def _embed(self, sample: Tensor, timestep: Any, *conditions: Any) -> tuple[Any, None]:
        """The blocks hand their `temb` to the resnets as it is: here, the index that picks a folded bias."""
        return timestep, None

    def refresh(self) -> bool:
        """After a LoRA came, went or changed: new values into the same memory. False: make a new FoldedUNet."""
        return self.ties.refresh()

    def unfold(self) -> HSpaceUNet:
        """The UNet this one was made from, which folding never touched."""
        return self.original


def _embedding(unet: HSpaceUNet, timestep: Tensor) -> Tensor:
    """(1, E): the time embedding as the model itself makes it."""
    model = unet.unet
    with torch.no_grad():
        sample = torch.zeros((1, model.config.in_channels, 1, 1), device=unet.device, dtype=unet.dtype)
        emb = model.time_embedding(model.get_time_embed(sample=sample, timestep=timestep[None]), None)
        return emb if model.time_embed_act is None else model.time_embed_act(emb)


@dataclass(frozen=True)
class StepConstants:
    """The scheduler, for x_0 = unit noise n: the UNet's input is p·x, the next x is a·x + b·out."""

    p: float
    a: float
    b: float

    @classmethod
    def of(cls, schedule: EulerSchedule) -> list[StepConstants]:
        """One for every step; the first takes the noise with the schedule's σ folded in."""
        rows = []
        for i in range(len(schedule)):
            scale = schedule.init_sigma if i == 0 else 1.0
            a, b = schedule.step_coefficients(i)
            rows.append(cls(scale / math.sqrt(schedule.sigmas[i] ** 2 + 1), scale * a, b))
        return rows
