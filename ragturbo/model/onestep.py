"""The steps from noise to latents: closed form for deterministic Euler, diffusers' schedulers for everything else.

sd-turbo's one step is x0 = x - σ·ε̂(x/√(σ²+1), t = 999). With σ known on the host, a step is x·a + out·b: two constants,
without a search for the timestep and without a synchronization with the device.
"""

from __future__ import annotations

import copy
import inspect
import math
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ragturbo.errors import InvalidRequest, ModelError
from ragturbo.model.info import DISTILLED_MAX_STEPS

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


class EulerSchedule:
    """Deterministic Euler in closed form, from the sigmas of an EulerDiscreteScheduler; constants in fp64 on the host.

    A sampler computes `out = unet(scale_input(x, i), timesteps[i])` and `x = step(x, out, i)` for each step i, starting
    from unit noise times `init_sigma`.
    """

    def __init__(self, sigmas: list[float], timesteps: Tensor, init_sigma: float, prediction_type: str) -> None:
        if prediction_type not in PREDICTION_TYPES:
            raise ModelError(f"prediction type {prediction_type!r}; known: {', '.join(PREDICTION_TYPES)}")
        self.sigmas = sigmas
        self.timesteps = timesteps
        self.init_sigma = init_sigma
        self.prediction_type = prediction_type

    def __len__(self) -> int:
        return len(self.timesteps)

    def scale_input(self, x: Tensor, i: int) -> Tensor:
        """The UNet's input for latents x (B, c, h, w) at step i."""
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
        """(a, b) of x_next = a·x + b·out: x + (σ' - σ)(x - x0)/σ is r·x + (1 - r)·x0 with r = σ'/σ."""
        a, b = self.x0_coefficients(i)
        r = self.sigmas[i + 1] / self.sigmas[i]
        return r + (1 - r) * a, (1 - r) * b

    def x0(self, x: Tensor, out: Tensor, i: int) -> Tensor:
        """The denoised latents predicted at step i. x: fp32; out: the UNet's output, any dtype -> x's dtype."""
        return _linear(x, out, *self.x0_coefficients(i))

    def step(self, x: Tensor, out: Tensor, i: int, generator: Any = None) -> Tensor:
        """The latents after step i; `generator` is not used."""
        return _linear(x, out, *self.step_coefficients(i))


class SchedulerLoop:
    """Any other diffusers scheduler behind the methods of EulerSchedule. It holds the state of one run."""

    def __init__(self, scheduler: Any, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        self.scheduler = copy.deepcopy(scheduler)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        self.timesteps: Tensor = self.scheduler.timesteps
        self.init_sigma = float(self.scheduler.init_noise_sigma)
        self._takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters

    def __len__(self) -> int:
        return len(self.timesteps)

    def scale_input(self, x: Tensor, i: int) -> Tensor:
        return self.scheduler.scale_model_input(x, self.timesteps[i])

    def step(self, x: Tensor, out: Tensor, i: int, generator: Any = None) -> Tensor:
        """The latents after step i. generator: one torch.Generator or a list, for schedulers that draw noise."""
        extra = {"generator": generator} if self._takes_generator else {}
        return self.scheduler.step(out.to(x.dtype), self.timesteps[i], x, **extra, return_dict=False)[0]


Schedule: TypeAlias = EulerSchedule | SchedulerLoop


def make_schedule(
    scheduler: Any, num_inference_steps: int, *, distilled: bool, device: torch.device | str | None = None
) -> Schedule:
    """Make the steps of a bundle's scheduler, which is not modified.

    Args:
        num_inference_steps: 1 to 4 for distilled models, otherwise 1 to the scheduler's number of training timesteps.
        device: where the timesteps are placed.

    Raises:
        InvalidRequest: num_inference_steps is out of range.
        ModelError: the scheduler's prediction type is not supported.
    """
    most = max_steps(scheduler, distilled=distilled)
    if not 1 <= num_inference_steps <= most:
        why = "a distilled model" if distilled else "this model"
        raise InvalidRequest(f"num_inference_steps={num_inference_steps}: {why} takes 1 to {most}")
    # Ancestral Euler draws noise, and continuous timesteps are scaled differently: both use diffusers' own scheduler.
    if type(scheduler).__name__ != "EulerDiscreteScheduler" or scheduler.config.timestep_type != "discrete":
        return SchedulerLoop(scheduler, num_inference_steps, device)
    own = copy.deepcopy(scheduler)
    own.set_timesteps(num_inference_steps, device=device)
    return EulerSchedule(own.sigmas.tolist(), own.timesteps, float(own.init_noise_sigma), own.config.prediction_type)


def max_steps(scheduler: Any, *, distilled: bool) -> int:
    return DISTILLED_MAX_STEPS if distilled else int(scheduler.config.num_train_timesteps)


def guided(out_negative: Tensor, out: Tensor, guidance_scale: float) -> Tensor:
    """Classifier-free guidance."""
    return out_negative + guidance_scale * (out - out_negative)


def _linear(x: Tensor, out: Tensor, a: float, b: float) -> Tensor:
    return x * a + out.to(x.dtype) * b
