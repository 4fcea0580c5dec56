"""The steps from noise to latents: constants for deterministic Euler, diffusers' own scheduler for everything else.

sd-turbo's one step is x0 = x - σ·ε̂(x/√(σ²+1), t = 999). With σ known on the host, a step is x·a + out·b: two numbers,
no search for the timestep, no wait for the device.
"""

from __future__ import annotations

import copy
import inspect
import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from diffusers import EulerDiscreteScheduler
from torch import Tensor

from ragturbo.errors import InvalidRequest, ModelError

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
# What one-step and few-step students are trained for: the paper's T_4 is the longest.
DISTILLED_MAX_STEPS = 4


class Schedule(ABC):
    """n evaluations of the UNet: `out = unet(scale_input(x, i), timesteps[i])`, then `x = step(x, out, i)`."""

    timesteps: Tensor
    """(n,) on the device asked for."""
    init_sigma: float
    """What unit noise is multiplied by at the start."""

    def __len__(self) -> int:
        return len(self.timesteps)

    @abstractmethod
    def scale_input(self, x: Tensor, i: int) -> Tensor:
        """The UNet's input from the latents x (B, c, h, w) at step i."""

    @abstractmethod
    def step(self, x: Tensor, out: Tensor, i: int, generator: Any = None) -> Tensor:
        """The latents after step i. `generator`: one or a list of them, for the schedulers that draw noise."""


class EulerSchedule(Schedule):
    """Deterministic Euler in closed form, by the sigmas of an EulerDiscreteScheduler; constants in fp64 on the host."""

    def __init__(self, sigmas: list[float], timesteps: Tensor, init_sigma: float, prediction_type: str) -> None:
        if prediction_type not in PREDICTION_TYPES:
            raise ModelError(f"prediction type {prediction_type!r}; known: {', '.join(PREDICTION_TYPES)}")
        self.sigmas = sigmas
        self.timesteps = timesteps
        self.init_sigma = init_sigma
        self.prediction_type = prediction_type

    def scale_input(self, x: Tensor, i: int) -> Tensor:
        return x * (1 / math.sqrt(self.sigmas[i] ** 2 + 1))

    def x0_coefficients(self, i: int) -> tuple[float, float]:
        """(a, b) of x0 = a·x + b·out at step i."""
        sigma = self.sigmas[i]
        if self.prediction_type == "epsilon":
            return 1.0, -sigma
        if self.prediction_type == "sample":
            return 0.0, 1.0
        return 1 / (sigma**2 + 1), -sigma / math.sqrt(sigma**2 + 1)

    def step_coefficients(self, i: int) -> tuple[float, float]:
        """(a, b) of x_next = a·x + b·out: x + (σ' - σ)(x - x0)/σ is the mean of x and x0 weighted by r = σ'/σ."""
        a, b = self.x0_coefficients(i)
        r = self.sigmas[i + 1] / self.sigmas[i]
        return r + (1 - r) * a, (1 - r) * b

    def x0(self, x: Tensor, out: Tensor, i: int) -> Tensor:
        """The image the model sees at step i. x: fp32 latents; out: the UNet's output, any dtype -> x's dtype."""
        return _linear(x, out, *self.x0_coefficients(i))

    def step(self, x: Tensor, out: Tensor, i: int, generator: Any = None) -> Tensor:
        return _linear(x, out, *self.step_coefficients(i))


class SchedulerLoop(Schedule):
    """Any other diffusers scheduler, stepped as its pipeline would. It carries a run's state: make one for each run."""

    def __init__(self, scheduler: Any, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        self.scheduler = copy.deepcopy(scheduler)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        self.timesteps = self.scheduler.timesteps
        self.init_sigma = float(self.scheduler.init_noise_sigma)
        self._draws = "generator" in inspect.signature(self.scheduler.step).parameters

    def scale_input(self, x: Tensor, i: int) -> Tensor:
        return self.scheduler.scale_model_input(x, self.timesteps[i])

    def step(self, x: Tensor, out: Tensor, i: int, generator: Any = None) -> Tensor:
        extra = {"generator": generator} if self._draws else {}
        return self.scheduler.step(out.to(x.dtype), self.timesteps[i], x, **extra, return_dict=False)[0]


def make_schedule(
    scheduler: Any, num_inference_steps: int, *, distilled: bool, device: torch.device | str | None = None
) -> EulerSchedule | SchedulerLoop:
    """The steps of a bundle's diffusers scheduler, which is left as it was; the timesteps lie on `device`."""
    most = max_steps(scheduler, distilled=distilled)
    if not 1 <= num_inference_steps <= most:
        why = "a distilled model" if distilled else "this model"
        raise InvalidRequest(f"num_inference_steps={num_inference_steps}: {why} takes 1 to {most}")
    if not _is_plain_euler(scheduler):
        return SchedulerLoop(scheduler, num_inference_steps, device)
    own = copy.deepcopy(scheduler)
    own.set_timesteps(num_inference_steps, device=device)
    return EulerSchedule(own.sigmas.tolist(), own.timesteps, float(own.init_noise_sigma), own.config.prediction_type)


def max_steps(scheduler: Any, *, distilled: bool) -> int:
    return DISTILLED_MAX_STEPS if distilled else int(scheduler.config.num_train_timesteps)


def is_trailing(scheduler: Any) -> bool:
    """The rule for folders that do not say: a scheduler that starts at the last timestep is a distilled model's."""
    return getattr(scheduler.config, "timestep_spacing", None) == "trailing"


def guided(out_negative: Tensor, out: Tensor, guidance_scale: float) -> Tensor:
    """Classifier-free guidance."""
    return out_negative + guidance_scale * (out - out_negative)


def _is_plain_euler(scheduler: Any) -> bool:
    # Ancestral Euler draws noise, and a continuous timestep has another scaling: both stay with diffusers.
    config = scheduler.config
    return type(scheduler) is EulerDiscreteScheduler and config.timestep_type == "discrete"


def _linear(x: Tensor, out: Tensor, a: float, b: float) -> Tensor:
    return x * a + out.to(x.dtype) * b
