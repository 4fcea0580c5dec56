"""The student f_θ and its trainable parameters: the adapter and the decoder's LoRA (Sec. 3.4), or the whole UNet."""

from __future__ import annotations

import re
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ragturbo.errors import InvalidRequest, ModelError
from ragturbo.model import lora
from ragturbo.model.adapter import HSpaceAdapter
from ragturbo.model.inject import inject
from ragturbo.model.onestep import EulerSchedule, make_schedule
from ragturbo.model.unet import HSpaceUNet, UNetState
from ragturbo.train import require
from ragturbo.train.config import LADDConfig, LoRAConfig


class Neighbors(NamedTuple):
    """The features that the adapter reads. Without valid neighbours, a sample is that of the plain student."""

    h_retr: Tensor
    """(B, k, S, C)"""
    lam: Tensor
    """(B, k)"""
    valid: Tensor
    """(B, k) bool"""
    phrases: Tensor | None = None
    """(B, k) bool: the phrases of each prompt, of which neighbour i belongs to the i-th; None for whole prompts."""


class Student(nn.Module):
    """ẑ_0 = f_θ(z_{t_i}, t_i, τ(p), h_retr) for t_i of T_n; i may differ within a batch."""

    from_z0: Tensor
    from_noise: Tensor
    to_input: Tensor
    x0_from_x: Tensor
    x0_from_out: Tensor
    timesteps: Tensor

    def __init__(self, unet: HSpaceUNet, scheduler: Any, config: LADDConfig) -> None:
        super().__init__()
        if unet.unet.config.in_channels != unet.unet.config.out_channels:
            raise ModelError("the UNet has different numbers of input and output channels")
        self.config = config
        self.hspace = unet
        self.unet = unet.unet.requires_grad_(config.mode == "student")
        self.adapter: HSpaceAdapter | None = None
        if config.retrieves:
            student = config.student
            self.adapter = HSpaceAdapter(unet.channels, student.heads, student.adapter, student.phrases)
        if config.mode == "adapter" and config.student.lora.rank:
            add_lora(self.unet, config.student.lora)
        if config.loop.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()

        steps = config.student.steps
        schedule = make_schedule(scheduler, steps, distilled=True)
        if not isinstance(schedule, EulerSchedule):
            raise ModelError(
                f"a student is trained on deterministic Euler steps, but its scheduler is {type(scheduler).__name__}: "
                "save an EulerDiscreteScheduler with timestep_spacing trailing in its folder"
            )
        sigma = torch.tensor(schedule.sigmas[:steps], dtype=torch.float64)
        a, b = zip(*(schedule.x0_coefficients(i) for i in range(steps)), strict=True)
        share = sigma / sigma[0]
        constants = {
            # z_{t_i} is the result of Euler steps from pure noise with every estimate equal to z_0.
            "from_z0": 1 - share,
            "from_noise": share * schedule.init_sigma,
            "to_input": (sigma**2 + 1).rsqrt(),
            "x0_from_x": torch.tensor(a, dtype=torch.float64),
            "x0_from_out": torch.tensor(b, dtype=torch.float64),
        }
        for name, value in constants.items():
            self.register_buffer(name, value.float(), persistent=False)
        self.register_buffer("timesteps", schedule.timesteps.cpu().float(), persistent=False)

    @property
    def steps(self) -> int:
        return len(self.timesteps)

    def trainable(self) -> dict[str, nn.Parameter]:
        """The trainable parameters by name: "adapter.…" and "unet.….lora_A.…", or all of "unet.…"."""
        return {name: value for name, value in self.named_parameters() if value.requires_grad}

    def noisy(self, z0: Tensor, noise: Tensor, i: Tensor) -> Tensor:
        """z_{t_i} in the scale of the scheduler, fp32. i: (B,) positions in T_n; position 0 is pure noise."""
        return _each(self.from_z0, i) * z0 + _each(self.from_noise, i) * noise

    def forward(self, x: Tensor, i: Tensor, text: Tensor, retrieved: Neighbors | None = None) -> tuple[Tensor, Tensor]:
        """x: (B, c, H, W) fp32 from `noisy`; i: (B,); text: (B, L, D) -> ẑ_0, fp32 as x, and the feature h that it was
        decoded from."""
        # The frozen encoder stores no activations.
        with torch.no_grad() if self.config.mode == "adapter" else nullcontext():
            state = self.encode(x, i, text)
        h, dtype = state.h, self.hspace.dtype
        if self.adapter is not None and retrieved is not None:
            h_retr, lam, valid, phrases = retrieved
            h = inject("adapter", h, h_retr.to(dtype), lam=lam, valid=valid, adapter=self.adapter, phrases=phrases)
        out = self.hspace.decode(state, h)
        return _each(self.x0_from_x, i) * x + _each(self.x0_from_out, i) * out.float(), h

    def encode(self, x: Tensor, i: Tensor, text: Tensor) -> UNetState:
        dtype = self.hspace.dtype
        return self.hspace.encode((_each(self.to_input, i) * x).to(dtype), self.timesteps[i], text.to(dtype))


class Masters:
    """fp32 copies of the trainable parameters, for the optimiser and for accumulating gradients. The model computes on
    copies in its own precision."""

    def __init__(self, working: dict[str, nn.Parameter]) -> None:
        self._working = working
        self.parameters = {name: nn.Parameter(p.detach().float().clone()) for name, p in working.items()}
        for parameter in self.parameters.values():
            parameter.grad = torch.zeros_like(parameter)

    def accumulate(self) -> None:
        """Add the model's gradients to those of the masters and clear them."""
        for name, parameter in self._working.items():
            if parameter.grad is not None:
                grad = self.parameters[name].grad
                assert grad is not None
                grad.add_(parameter.grad)
                parameter.grad = None

    def zero_grad(self) -> None:
        torch._foreach_zero_([grad for parameter in self.parameters.values() if (grad := parameter.grad) is not None])

    @torch.no_grad()
    def publish(self) -> None:
        """Copy the masters into the model, in its precision."""
        torch._foreach_copy_(list(self._working.values()), list(self.parameters.values()))

    def state(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(state[name])
        self.publish()


class EMA:
    """Exponential moving average of the masters. The decay rises from 2/11 to `decay`."""

    def __init__(self, masters: Masters, decay: float) -> None:
        self.decay = decay
        self.values = {name: value.clone() for name, value in masters.state().items()}

    @torch.no_grad()
    def update(self, masters: Masters, updates: int) -> None:
        """updates: optimiser updates done, counted from 1."""
        decay = min(self.decay, (1 + updates) / (10 + updates))
        current = masters.state()
        torch._foreach_lerp_(list(self.values.values()), [current[name] for name in self.values], 1 - decay)

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        for name, value in self.values.items():
            value.copy_(state[name])


def add_lora(unet: Any, config: LoRAConfig) -> None:
    """Add a new LoRA to the decoder; its initial effect is zero."""
    peft = require("peft")
    matched = [name for name, _ in unet.named_modules() if re.fullmatch(config.targets, name)]
    if outside := [name for name in matched if not name.startswith("up_blocks.")]:
        raise InvalidRequest(
            f"student.lora.targets={config.targets!r} matches {outside[0]}: only the decoder may change, because "
            "the database holds features of the encoder"
        )
    if not matched:
        raise InvalidRequest(f"student.lora.targets={config.targets!r} matches no module of the decoder")
    lora.remove_lora(unet)
    settings = peft.LoraConfig(
        r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=config.targets
    )
    peft.inject_adapter_in_model(settings, unet, adapter_name=lora.NAME)
    unet.peft_config = {lora.NAME: settings}
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_("lora_" in name)


def trailing_euler(scheduler: Any) -> Any:
    """An EulerDiscreteScheduler with trailing timesteps and the noise levels of `scheduler`."""
    from diffusers import EulerDiscreteScheduler

    return EulerDiscreteScheduler.from_config(scheduler.config, timestep_spacing="trailing")


def _each(constants: Tensor, i: Tensor) -> Tensor:
    """constants (n,), i (B,) -> (B, 1, 1, 1)."""
    return constants[i].view(-1, 1, 1, 1)
