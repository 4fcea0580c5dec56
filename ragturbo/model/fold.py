"""A UNet for known timesteps: everything that depends on t alone is computed once, before the first image.

At a fixed timestep the sinusoid, the time MLP and each resnet's projection of it are constant vectors, which become
part of a convolution's bias. The weights of self-attention's Q, K and V are one matrix, and so are those of all
cross-attentions' K and V, which depend on the text alone. Several timesteps share all weights except for those biases.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ragturbo.errors import InvalidRequest, ModelError
from ragturbo.model.fused import NormAct, Resnet, TextKVLayout, Transformer
from ragturbo.model.fused_vae import PhaseUpsample, Upsample, can_upsample
from ragturbo.model.onestep import EulerSchedule
from ragturbo.model.tied_layers import ConvLayer, TiedLinear, pack_rest
from ragturbo.model.ties import Replaced, Ties, sharing_copy
from ragturbo.model.unet import HSpaceUNet, UNetState


class FoldedUNet(HSpaceUNet):
    """`unet` at given timesteps only, over shared weights; `unet` itself is not changed.

    `encode(sample, i, text_kv)` takes the index of a timestep instead of the timestep, and `text_kv(text)` instead of
    the text.
    """

    def __init__(
        self, unet: HSpaceUNet, timesteps: Sequence[int | float] | Tensor, attention: str = "sdpa", *,
        dtype: torch.dtype | None = None, packs: bool = False,
    ) -> None:  # fmt: skip
        """
        Args:
            attention: an implementation of `fused.attend`.
            dtype: of the products, if it is not the dtype of `unet`; needs packs. The first and the last convolution
                stay in the dtype of `unet`, because all of the result passes through their rounding.
            packs: for CPUs: keep weights in oneDNN's layout, and upsample by phases.
        """
        config = unet.unet.config
        for name in ("addition_embed_type", "class_embed_type", "num_class_embeds", "encoder_hid_dim_type"):
            if (value := getattr(config, name, None)) is not None:
                raise ModelError(f"this UNet cannot be folded: it has conditions besides t and text ({name}={value!r})")
        super().__init__(sharing_copy(unet.unet, ("ResnetBlock2D", "Transformer2DModel")))
        self.timesteps = torch.as_tensor(timesteps, device=unet.device).reshape(-1)
        self._dtype = dtype or unet.dtype
        if self._dtype != unet.dtype and not packs:
            raise ModelError(f"only packed weights can be folded in another dtype than the UNet's, {unet.dtype}")
        self.ties = Ties(unet.unet, None if self._dtype == unet.dtype else dtype, packs)
        self.replaced: list[Replaced] = []
        layout = TextKVLayout()
        # Over the original's modules: those of the copy are being replaced.
        sample = torch.zeros((1, config.in_channels, 1, 1), device=unet.device, dtype=unet.dtype)
        with torch.no_grad():
            embeddings = [unet._embed(sample, t[None])[0] for t in self.timesteps]
        for path, module in list(unet.unet.named_modules()):
            kind = type(module).__name__
            if kind == "ResnetBlock2D":
                self._replace(path, module, Resnet(self.ties, path, module, embeddings))
            elif kind == "Transformer2DModel":
                self._replace(path, module, Transformer(self.ties, path, module, layout, attention))
            elif can_upsample(module):
                self._replace(path, module, (PhaseUpsample if packs else Upsample)(self.ties, path))
            elif kind == "ResnetBlockCondNorm2D":
                raise ModelError(f"{path} cannot be folded: its norms depend on the time embedding")
        if isinstance(self.unet.conv_act, torch.nn.SiLU) and self.unet.conv_norm_out is not None:
            norm = self.ties.norm(self.unet.conv_norm_out)
            self._replace("conv_norm_out", self.unet.conv_norm_out, NormAct(norm))
            self.unet.conv_act = torch.nn.Identity()
        if packs:
            first = ConvLayer(self.ties, "conv_in", cast=False, dtype=self._dtype)
            self._replace("conv_in", self.unet.conv_in, first)
            self._replace("conv_out", self.unet.conv_out, ConvLayer(self.ties, "conv_out", cast=False))
            self.replaced += pack_rest(self.ties, self.unet)
        self.unet.eval()
        if not layout.paths:
            raise ModelError("this UNet cannot be folded: it has no cross-attention")
        self._text_kv = TiedLinear(self.ties, *layout.paths)

    def _replace(self, path: str, was: Any, now: torch.nn.Module) -> None:
        self.unet.set_submodule(path, now)
        self.replaced.append(Replaced(path, type(was).__name__, type(now).__name__))

    @property
    def text_kv_width(self) -> int:
        """ΣC of `text_kv`."""
        return self._text_kv.width

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def device(self) -> torch.device:
        return self.timesteps.device

    def text_kv(self, text: Tensor) -> Tensor:
        """(B, L, D) -> the keys and values of every cross-attention side by side, (B, L, ΣC), in one product."""
        return self._text_kv(text.to(self._dtype))

    def encode(self, sample: Tensor, timestep: Any, text: Tensor, **conditions: Any) -> UNetState:
        """sample: (B, c, H, W); timestep: an index into `timesteps`; text: the result of `text_kv`."""
        if any(value is not None for value in conditions.values()):
            raise InvalidRequest(f"a folded UNet takes no conditions: {', '.join(conditions)}")
        if not isinstance(timestep, int) or not 0 <= timestep < len(self.timesteps):
            raise InvalidRequest(f"timestep {timestep!r} is not the index of one of {len(self.timesteps)} folded ones")
        return super().encode(sample, timestep, text)

    def _embed(self, sample: Tensor, timestep: Any, *conditions: Any) -> tuple[Any, None]:
        """The index of the timestep: the blocks pass it as `temb` to the resnets, which select their bias by it."""
        return timestep, None

    def refresh(self) -> bool:
        """Copy changed weights into place, after a LoRA was added, removed or changed.

        Returns:
            False if a new FoldedUNet is needed instead.
        """
        return self.ties.refresh()


@dataclass(frozen=True)
class StepConstants:
    """A scheduler's step for latents that start as unit noise: the UNet's input is p·x, the next x is a·x + b·out."""

    p: float
    a: float
    b: float

    @classmethod
    def of(cls, schedule: EulerSchedule) -> list[StepConstants]:
        """The constants of each step; those of the first include the scale of the initial noise."""
        rows = []
        for i in range(len(schedule)):
            scale = schedule.init_sigma if i == 0 else 1.0
            a, b = schedule.step_coefficients(i)
            rows.append(cls(scale / math.sqrt(schedule.sigmas[i] ** 2 + 1), scale * a, b))
        return rows
