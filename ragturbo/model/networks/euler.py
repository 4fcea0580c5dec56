"""EulerDiscreteScheduler's noise levels and timesteps; its other methods are those of diffusers' class."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ragturbo.model.networks.config import Config, Options

OPTIONS = Options(
    free={
        "num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear",
        "prediction_type": "epsilon", "timestep_spacing": "linspace", "steps_offset": 0,
        "rescale_betas_zero_snr": False, "final_sigmas_type": "zero",
        # Of Karras' noise levels.
        "sigma_min": None, "sigma_max": None,
    },
    fixed={
        "trained_betas": None, "interpolation_type": "linear", "use_karras_sigmas": False,
        "use_exponential_sigmas": False, "use_beta_sigmas": False, "timestep_type": "discrete",
    },
    allowed={
        "beta_schedule": ("linear", "scaled_linear"), "prediction_type": ("epsilon", "v_prediction", "sample"),
        "timestep_spacing": ("linspace", "leading", "trailing"), "final_sigmas_type": ("zero", "sigma_min"),
        "rescale_betas_zero_snr": (True, False),
    },
    # Options of other schedulers, which stay in the files of models whose scheduler was changed.
    ignored=("clip_sample", "sample_max_value", "set_alpha_to_one", "skip_prk_steps", "thresholding"),
)  # fmt: skip


class EulerDiscreteScheduler:
    def __init__(self, config: Config) -> None:
        self.config = config
        self._steps: tuple[int, torch.device | str | None] | None = None
        # The order of the operations is diffusers', so that the bits are equal.
        start, end, power = config.beta_start, config.beta_end, 1
        if config.beta_schedule == "scaled_linear":
            start, end, power = start**0.5, end**0.5, 2
        betas = torch.linspace(start, end, config.num_train_timesteps, dtype=torch.float32)
        if power == 2:
            betas = betas**2
        if config.rescale_betas_zero_snr:
            betas = _rescaled(betas)
        products = torch.cumprod(1.0 - betas, dim=0)
        if config.rescale_betas_zero_snr:
            # Nearly 0, so that the first noise level is finite: the smallest subnormal number of fp16.
            products[-1] = 2**-24
        self.alphas_cumprod = products
        sigmas = (((1 - products) / products) ** 0.5).flip(0)
        self.sigmas = torch.cat([sigmas, torch.zeros(1)])
        steps = np.arange(config.num_train_timesteps, dtype=np.float64)[::-1].copy()
        self.timesteps = torch.from_numpy(steps).to(torch.float32)

    @classmethod
    def load(cls, values: dict[str, Any]) -> EulerDiscreteScheduler | None:
        """Make it from scheduler_config.json; None if diffusers is needed for an option."""
        if values.get("_class_name") != "EulerDiscreteScheduler":
            return None
        config = OPTIONS.read(values)
        return None if config is None else cls(config)

    @classmethod
    def from_config(cls, config: Any, **options: Any) -> Any:
        """diffusers' scheduler."""
        import diffusers

        return diffusers.EulerDiscreteScheduler.from_config(config, **options)

    @property
    def init_noise_sigma(self) -> Tensor:
        most = self.sigmas.max()
        return most if self.config.timestep_spacing in ("linspace", "trailing") else (most**2 + 1) ** 0.5

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        c, n = self.config, num_inference_steps
        if c.timestep_spacing == "linspace":
            timesteps = np.linspace(0, c.num_train_timesteps - 1, n, dtype=np.float32)[::-1].copy()
        elif c.timestep_spacing == "leading":
            timesteps = (np.arange(n) * (c.num_train_timesteps // n)).round()[::-1].copy().astype(np.float32)
            timesteps += c.steps_offset
        else:
            timesteps = np.arange(c.num_train_timesteps, 0, -(c.num_train_timesteps / n)).round().astype(np.float32)
            timesteps -= 1
        self._steps = num_inference_steps, device
        levels = (((1 - self.alphas_cumprod) / self.alphas_cumprod) ** 0.5).numpy()
        last = 0 if c.final_sigmas_type == "zero" else levels[0]
        sigmas = np.interp(timesteps, np.arange(len(levels)), levels)
        self.sigmas = torch.from_numpy(np.concatenate([sigmas, [last]]).astype(np.float32))
        self.timesteps = torch.from_numpy(timesteps).to(device)

    def __getattr__(self, name: str) -> Any:
        # Asked for what only diffusers' class has, this object becomes one, as `Network` does.
        if name.startswith("_") or "config" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self)
        become_diffusers_scheduler(self)
        return getattr(self, name)


def become_diffusers_scheduler(scheduler: Any) -> Any:
    """Change a scheduler, in place, into diffusers' class. One that is already is returned as it is."""
    if isinstance(scheduler, EulerDiscreteScheduler):
        theirs = scheduler.from_config(scheduler.config)
        if scheduler._steps is not None:
            theirs.set_timesteps(*scheduler._steps)
        # With what this class reads as well: another thread may use it between the two assignments.
        scheduler.__dict__ = {**theirs.__dict__, "config": scheduler.config, "_steps": scheduler._steps}
        scheduler.__class__ = type(theirs)
    return scheduler


def _rescaled(betas: Tensor) -> Tensor:
    """Betas with no signal left at the last timestep."""
    roots = torch.cumprod(1.0 - betas, dim=0).sqrt()
    first, last = roots[0].clone(), roots[-1].clone()
    roots -= last
    roots *= first / (first - last)
    products = roots**2
    return 1 - torch.cat([products[0:1], products[1:] / products[:-1]])
