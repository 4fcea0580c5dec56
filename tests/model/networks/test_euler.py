"""Noise levels and timesteps in the bits of diffusers' EulerDiscreteScheduler."""

from __future__ import annotations

import itertools
from typing import Any

import diffusers
import pytest
import torch

from ragturbo.model.networks.euler import EulerDiscreteScheduler

BASE: dict[str, Any] = {
    "_class_name": "EulerDiscreteScheduler", "_diffusers_version": "0.24.0.dev0", "beta_start": 0.00085,
    "beta_end": 0.012, "clip_sample": False, "skip_prk_steps": True, "set_alpha_to_one": False,
    "sample_max_value": 1.0, "trained_betas": None, "sigma_min": None,
}  # fmt: skip
SPACINGS, SCHEDULES = ("linspace", "leading", "trailing"), ("linear", "scaled_linear")


@pytest.mark.parametrize("spacing, schedule, zero", list(itertools.product(SPACINGS, SCHEDULES, (False, True))))
def test_the_levels_are_those_of_diffusers(spacing: str, schedule: str, zero: bool) -> None:
    for final, offset in (("zero", 0), ("sigma_min", 1)):
        values = {
            **BASE, "timestep_spacing": spacing, "beta_schedule": schedule, "rescale_betas_zero_snr": zero,
            "final_sigmas_type": final, "steps_offset": offset,
        }  # fmt: skip
        ours, theirs = EulerDiscreteScheduler.load(values), diffusers.EulerDiscreteScheduler.from_config(values)
        assert ours is not None
        assert {**theirs.config, "_use_default_values": 0} == {**ours.config, "_use_default_values": 0}
        assert set(theirs.config["_use_default_values"]) == set(ours.config["_use_default_values"])
        for steps in (None, 1, 2, 3, 4, 7, 50, 1000):
            if steps is not None:
                ours.set_timesteps(steps, device="cpu")
                theirs.set_timesteps(steps, device="cpu")
            assert torch.equal(ours.sigmas, theirs.sigmas) and torch.equal(ours.timesteps, theirs.timesteps)
            assert ours.timesteps.dtype == theirs.timesteps.dtype
            assert float(ours.init_noise_sigma) == float(theirs.init_noise_sigma)


@pytest.mark.parametrize(
    "option",
    [
        {"use_karras_sigmas": True}, {"use_beta_sigmas": True}, {"use_exponential_sigmas": True},
        {"timestep_type": "continuous"}, {"interpolation_type": "log_linear"}, {"trained_betas": [0.1]},
        {"beta_schedule": "squaredcos_cap_v2"}, {"prediction_type": "flow"}, {"timestep_spacing": "even"},
        {"new_option": 1}, {"_new_note": 1}, {"_class_name": "EulerAncestralDiscreteScheduler"}, {"_class_name": None},
    ],
)  # fmt: skip
def test_another_scheduler_is_left_to_diffusers(option: dict[str, Any]) -> None:
    assert EulerDiscreteScheduler.load(BASE) is not None
    assert EulerDiscreteScheduler.load({**BASE, **option}) is None


def test_a_step_of_diffusers_keeps_the_number_of_steps_that_was_set() -> None:
    values = {**BASE, "timestep_spacing": "trailing"}
    ours, theirs = EulerDiscreteScheduler.load(values), diffusers.EulerDiscreteScheduler.from_config(values)
    assert ours is not None
    x, out = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(4)
    first = [scheduler.step(out, scheduler.timesteps[0], x).prev_sample for scheduler in (ours, theirs)]
    assert torch.equal(*first) and isinstance(ours, diffusers.EulerDiscreteScheduler)
    assert ours.num_inference_steps == 4
