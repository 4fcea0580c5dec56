"""The closed form equals diffusers' scheduler and pipeline; all other schedulers are diffusers' own."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)
from torch import Tensor

from ragturbo.errors import InvalidRequest, ModelError
from ragturbo.model.bundle import Bundle
from ragturbo.model.info import Sampling
from ragturbo.model.onestep import EulerSchedule, SchedulerLoop, guided, make_schedule

PREDICTIONS = ("epsilon", "v_prediction", "sample")


def denoise(bundle: Bundle, schedule: Any, noise: Tensor, text: Tensor, scale: float = 0.0, seed: int = 0) -> Tensor:
    """A pipeline's loop over our parts; with guidance, text is (negative, prompt)."""
    x = noise * schedule.init_sigma
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for i, timestep in enumerate(schedule.timesteps):
            sample = schedule.scale_input(x, i)
            if scale > 1:
                sample = torch.cat([sample, sample])
            out = bundle.unet.decode(bundle.unet.encode(sample, timestep, text))
            if scale > 1:
                out = guided(*out.chunk(2), scale)
            x = schedule.step(x, out, i, generator)
    return x


def states(bundle: Bundle, *prompts: str) -> Tensor:
    with torch.no_grad():
        return bundle.text.encode(bundle.text.tokenize(prompts).input_ids).hidden_states


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def test_sd_turbos_one_step_is_the_known_constant(tiny: ModuleType) -> None:
    schedule = make_schedule(tiny.scheduler(), 1, distilled=True)
    assert isinstance(schedule, EulerSchedule)
    assert schedule.timesteps.tolist() == [999]
    assert schedule.init_sigma == pytest.approx(14.6146, abs=1e-4)
    x, eps = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    sigma = schedule.sigmas[0]
    torch.testing.assert_close(schedule.x0(x, eps, 0), x - sigma * eps)
    torch.testing.assert_close(schedule.step(x, eps, 0), schedule.x0(x, eps, 0))
    torch.testing.assert_close(schedule.scale_input(x, 0), x / (sigma**2 + 1) ** 0.5)


@pytest.mark.parametrize("steps, expected", [(2, [999, 499]), (3, [999, 666, 332]), (4, [999, 749, 499, 249])])
def test_few_steps_are_the_schedulers_own_timesteps(tiny: ModuleType, steps: int, expected: list[int]) -> None:
    assert make_schedule(tiny.scheduler(), steps, distilled=True).timesteps.tolist() == expected


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 10])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
def test_the_closed_form_is_diffusers_euler(prediction: str, steps: int, spacing: str) -> None:
    options: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    scheduler = EulerDiscreteScheduler(**options, prediction_type=prediction, timestep_spacing=spacing)
    schedule = make_schedule(scheduler, steps, distilled=False)
    assert isinstance(schedule, EulerSchedule)
    scheduler.set_timesteps(steps)
    x = torch.randn(2, 4, 8, 8) * scheduler.init_noise_sigma
    ours = x
    for i, timestep in enumerate(scheduler.timesteps):
        out = torch.randn(2, 4, 8, 8)
        torch.testing.assert_close(
            schedule.scale_input(ours, i), scheduler.scale_model_input(x, timestep), rtol=1e-5, atol=1e-5
        )
        result = scheduler.step(out, timestep, x)
        torch.testing.assert_close(schedule.x0(ours, out, i), result.pred_original_sample, rtol=1e-5, atol=1e-5)
        x, ours = result.prev_sample, schedule.step(ours, out, i)
        torch.testing.assert_close(ours, x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_same_noise_same_latents_and_image_as_the_pipeline(
    folders: dict[str, Path], prediction: str, steps: int
) -> None:
    folder = folders["sd21" if prediction == "epsilon" else prediction]
    bundle = Bundle.load(folder, device="cpu")
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    noise, prompt = torch.randn(2, 4, 16, 16), ["a red circle left of a blue square", "a dog"]
    common: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": 0.0}
    expected = pipeline(prompt, latents=noise, output_type="latent", **common).images
    schedule = make_schedule(bundle.scheduler, steps, distilled=bundle.info.distilled)
    ours = denoise(bundle, schedule, noise, states(bundle, *prompt))
    assert relative(ours, expected) < 1e-5
    # The controls: another prompt and other noise differ by far more.
    assert relative(denoise(bundle, schedule, noise, states(bundle, "a photo", "a cat")), expected) > 1e-4
    assert relative(denoise(bundle, schedule, noise.flip(0), states(bundle, *prompt)), expected) > 1e-2
    images = pipeline(prompt, latents=noise, output_type="pt", **common).images
    with torch.no_grad():
        torch.testing.assert_close(bundle.vae.decode(ours), images, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "kind",
    [
        DDIMScheduler,
        PNDMScheduler,
        DPMSolverMultistepScheduler,
        UniPCMultistepScheduler,
        HeunDiscreteScheduler,
        EulerAncestralDiscreteScheduler,
        LCMScheduler,
        EulerDiscreteScheduler,
    ],
    ids=lambda kind: kind.__name__,
)
def test_undistilled_bases_take_their_own_scheduler_and_guidance(folders: dict[str, Path], kind: Any) -> None:
    folder = folders["sd15"]
    bundle = Bundle.load(folder, device="cpu")
    assert not bundle.info.distilled
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = kind.from_config(bundle.scheduler.config)
    noise = torch.randn(1, 4, 16, 16)
    expected = pipeline(
        "a red circle",
        negative_prompt="a dog",
        latents=noise,
        num_inference_steps=7,
        guidance_scale=7.5,
        output_type="latent",
        generator=torch.Generator().manual_seed(3),
    ).images
    text = states(bundle, "a dog", "a red circle")
    # Twice: a run must not change the bundle's scheduler.
    scheduler = kind.from_config(bundle.scheduler.config)
    for _ in range(2):
        schedule = make_schedule(scheduler, 7, distilled=False)
        assert relative(denoise(bundle, schedule, noise, text, scale=7.5, seed=3), expected) < 1e-5


def test_a_thousand_steps_and_no_more() -> None:
    scheduler = DDIMScheduler()
    assert len(make_schedule(scheduler, 1000, distilled=False)) == 1000
    assert isinstance(make_schedule(scheduler, 1, distilled=False), SchedulerLoop)
    for steps in (0, -1, 1001):
        with pytest.raises(InvalidRequest, match=f"num_inference_steps={steps}: this model takes 1 to 1000"):
            make_schedule(scheduler, steps, distilled=False)


def test_a_distilled_model_takes_one_to_four(tiny: ModuleType) -> None:
    with pytest.raises(InvalidRequest, match="num_inference_steps=5: a distilled model takes 1 to 4"):
        make_schedule(tiny.scheduler(), 5, distilled=True)


def test_distilled_means_trailing_where_nothing_says_so(tiny: ModuleType) -> None:
    def sampling(scheduler: Any, asked: bool | None = None) -> Sampling:
        return Sampling.of(None, {**scheduler.config, "_class_name": type(scheduler).__name__}, asked)

    turbo = sampling(tiny.scheduler("sd21"))
    assert (turbo.distilled, turbo.steps, turbo.guidance_scale) == (True, 1, 0.0) and "trailing" in turbo.why
    for plain in (sampling(tiny.scheduler("sd15")), sampling(PNDMScheduler())):
        assert (plain.distilled, plain.steps, plain.guidance_scale) == (False, 50, 7.5)
    consistency = sampling(LCMScheduler())
    assert (consistency.distilled, consistency.steps) == (True, 4) and "LCMScheduler" in consistency.why
    assert not sampling(tiny.scheduler("sd21"), False).distilled and sampling(PNDMScheduler(), True).distilled


def test_an_unknown_prediction_type_is_named() -> None:
    with pytest.raises(ModelError, match="flow"):
        make_schedule(EulerDiscreteScheduler(prediction_type="flow"), 1, distilled=True)


def test_fp16_output_is_stepped_in_fp32(tiny: ModuleType) -> None:
    schedule = make_schedule(tiny.scheduler(), 1, distilled=True)
    x, out = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8).half()
    assert schedule.step(x, out, 0).dtype == torch.float32
    torch.testing.assert_close(schedule.step(x, out, 0), schedule.step(x, out.float(), 0), rtol=0, atol=0)
