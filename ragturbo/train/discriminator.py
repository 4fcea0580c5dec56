"""The discriminator of Eqs. 6-7: the frozen encoder of the teacher's UNet and a small trainable head on each stage."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.checkpoint import checkpoint

from ragturbo.errors import InvalidRequest
from ragturbo.model.adapter import norm_groups
from ragturbo.model.unet import HSpaceUNet
from ragturbo.train.losses import weighted_mean

MID = "mid"


class Head(nn.Module):
    """Features of one stage (B, C, h, w) -> logits (B, P).

    With raw features and spectral norm on every convolution, heads stay at their initial loss and give no signal. So
    the features are normalised, and the last 1×1 convolution has no spectral norm.
    """

    def __init__(self, channels: int, width: int, spectral: bool = True, normalise: bool = True) -> None:
        super().__init__()

        def norm(conv: nn.Conv2d) -> nn.Module:
            return spectral_norm(conv) if spectral else conv

        # No affine parameters: their scale would undo the bound of the spectral norm.
        self.norm = nn.GroupNorm(norm_groups(channels), channels, affine=False) if normalise else nn.Identity()
        self.conv_in = norm(nn.Conv2d(channels, width, 3, stride=2, padding=1))
        self.conv_mid = norm(nn.Conv2d(width, width, 3, padding=1))
        self.act = nn.LeakyReLU(0.2)
        self.conv_out = nn.Conv2d(width, 1, 1)

    def forward(self, features: Tensor) -> Tensor:
        # fp32: the heads are cheap, and the power iteration of spectral norm needs the precision.
        x = self.act(self.conv_in(self.norm(features.float())))
        x = x + self.act(self.conv_mid(x))
        return self.conv_out(x).flatten(1)


class Backbone:
    """The frozen UNet encoder and middle block, conditioned on the text and on the timestep s."""

    def __init__(self, unet: Any, stages: Sequence[str] | None = None, *, shared: bool = False) -> None:
        """stages: "down_0", … and "mid"; None: all of them. shared: use `unet`, a UNet2DConditionModel, itself. False:
        use a copy that shares its weights and has no up blocks, so that these can be freed."""
        if not shared:
            # The copy keeps the number of upsamplers, which HSpaceUNet reads.
            names, unet = ("up_blocks", "conv_out"), copy.copy(unet)
            unet._modules = {name: module for name, module in unet._modules.items() if name not in names}
            unet.requires_grad_(False).eval()
        self.unet = HSpaceUNet(unet)
        model = self.unet.unet
        self.checkpointing = False
        known = [f"down_{i}" for i in range(len(model.down_blocks))] + [MID]
        stages = list(known if stages is None else stages)
        if unknown := [name for name in stages if name not in known] or not stages:
            raise InvalidRequest(f"discriminator.stages={unknown or []}: this teacher has {', '.join(known)}")
        self.stages = stages
        # The last output of every down block: after its downsampler, if it has one.
        counts = [len(block.resnets) + len(block.downsamplers or ()) for block in model.down_blocks]
        self._last = {f"down_{i}": sum(counts[: i + 1]) for i in range(len(counts))}
        # A stage depends on the prompt if there is cross-attention in it or before it.
        blocks = (*model.down_blocks, model.mid_block)
        attends = [bool(getattr(block, "has_cross_attention", False)) for block in blocks]
        reads = {name: any(attends[: i + 1]) for i, name in enumerate(known)}
        self.reads_text = [reads[name] for name in stages]
        widths = model.config.block_out_channels
        self.channels = [widths[-1] if name == MID else widths[int(name.removeprefix("down_"))] for name in stages]
        self._run: Callable[..., list[Tensor]] = self._features

    def compile(self) -> None:
        self._run = torch.compile(self._features)

    def __call__(self, z_s: Tensor, s: Tensor, text: Tensor) -> list[Tensor]:
        """z_s: (B, c, H, W) noised to s; s: (B,) timesteps of N; text: (B, L, D) -> features of every stage."""
        if self.checkpointing and torch.is_grad_enabled():
            return list(checkpoint(self._run, z_s, s, text, use_reentrant=False))
        return self._run(z_s, s, text)

    def _features(self, z_s: Tensor, s: Tensor, text: Tensor) -> list[Tensor]:
        state = self.unet.encode(z_s.to(self.unet.dtype), s, text.to(self.unet.dtype))
        return [state.h if name == MID else state.skips[self._last[name]] for name in self.stages]


class Discriminator(nn.Module):
    """The heads of D. The backbone is not a submodule, so it is in no optimiser and no checkpoint."""

    def __init__(self, backbone: Backbone, width: int = 256, spectral: bool = True, normalise: bool = True) -> None:
        super().__init__()
        self.backbone = backbone
        stages = zip(backbone.stages, backbone.channels, strict=True)
        self.heads = nn.ModuleDict({name: Head(channels, width, spectral, normalise) for name, channels in stages})

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Features of every stage -> logits (B, P_k) of every head. In train mode each call is one power iteration."""
        return [head(f) for head, f in zip(self.heads.values(), features, strict=True)]

    def judge(self, features: Sequence[Tensor]) -> list[Tensor]:
        """The logits for G's loss: gradients reach the features but not the heads, and spectral norm's buffers are not
        updated."""
        was_training = self.training
        self.eval().requires_grad_(False)
        try:
            return self(features)
        finally:
            self.train(was_training).requires_grad_(True)


class NoiseSchedule:
    """α_s and σ_s of the teacher: z_s = α_s z_0 + σ_s ε for each of its N timesteps."""

    def __init__(self, scheduler: Any, device: torch.device | str = "cpu") -> None:
        from diffusers import DDPMScheduler

        alphas_cumprod = DDPMScheduler.from_config(scheduler.config).alphas_cumprod.double()
        self.alpha = alphas_cumprod.sqrt().float().to(device)
        self.sigma = (1 - alphas_cumprod).sqrt().float().to(device)

    def __len__(self) -> int:
        return len(self.alpha)

    def noised(self, z0: Tensor, noise: Tensor, s: Tensor) -> Tensor:
        """z0, noise: (B, c, H, W) fp32; s: (B,) int64."""
        return self.alpha[s].view(-1, 1, 1, 1) * z0 + self.sigma[s].view(-1, 1, 1, 1) * noise


def accuracy(real: Sequence[Tensor], fake: Sequence[Tensor], real_weight: Tensor | None = None) -> Tensor:
    """(K,): share of each head's logits with the right sign; 0.5 is chance. real_weight (B,): of each real sample."""
    right = [weighted_mean((r > 0).float().mean(1), real_weight) for r in real]
    return torch.stack([(r + (f < 0).float().mean()) / 2 for r, f in zip(right, fake, strict=True)])
