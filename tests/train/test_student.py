"""The student's steps, its fp32 masters and their moving average."""

from __future__ import annotations

import pytest
import torch

from ragturbo.errors import InvalidRequest, ModelError
from ragturbo.model.onestep import make_schedule
from ragturbo.model.unet import HSpaceUNet
from ragturbo.train.config import LoRAConfig
from ragturbo.train.student import EMA, Masters, Student, add_lora


@pytest.fixture
def student(world, tiny):
    def make(steps=1, prediction_type="epsilon", **changes):
        config = world.config(student__steps=steps, student__adapter="none", **changes)
        return Student(HSpaceUNet(tiny.unet("sd21")), tiny.scheduler(prediction_type=prediction_type), config)

    return make


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_a_students_steps_are_those_a_generator_takes(student, tiny, prediction_type):
    """Training's z_{t_i} and ẑ_0 are the scheduler's: a run of Euler steps whose every estimate is z_0 visits exactly
    the training inputs."""
    model = student(4, prediction_type)
    schedule = make_schedule(tiny.scheduler(prediction_type=prediction_type), 4, distilled=True)
    assert model.timesteps.tolist() == [999, 749, 499, 249] == schedule.timesteps.tolist()
    z0, noise = torch.randn(1, 4, 16, 16), torch.randn(1, 4, 16, 16)
    x = noise * schedule.init_sigma
    for i in range(4):
        torch.testing.assert_close(model.noisy(z0, noise, torch.tensor([i])), x, atol=1e-4, rtol=1e-4)
        sigma, sigma_next = schedule.sigmas[i], schedule.sigmas[i + 1]
        x = z0 + sigma_next / sigma * (x - z0)
    torch.testing.assert_close(x, z0, atol=1e-4, rtol=1e-4)


def test_at_the_first_step_the_input_is_pure_noise(student):
    """α of t = 999 is 0.068, not 0; a trace of z_0 there would be a leak that no prompt has at inference."""
    model, noise = student(), torch.randn(2, 4, 16, 16)
    i = torch.zeros(2, dtype=torch.int64)
    a, b = (model.noisy(z0, noise, i) for z0 in (torch.zeros_like(noise), 100 * torch.ones_like(noise)))
    assert torch.equal(a, b)


def test_every_sample_of_a_batch_takes_its_own_step(student):
    model = student(2).eval()
    x, text = torch.randn(2, 4, 16, 16), torch.randn(2, 8, 32)
    with torch.no_grad():
        both, _ = model(x, torch.tensor([0, 1]), text)
        for n in (0, 1):
            alone, _ = model(x[n : n + 1], torch.tensor([n]), text[n : n + 1])
            torch.testing.assert_close(both[n : n + 1], alone, atol=1e-4, rtol=1e-4)


def test_a_lora_outside_the_decoder_is_refused(tiny):
    with pytest.raises(InvalidRequest, match="only the decoder may change"):
        add_lora(tiny.unet("sd21"), LoRAConfig(rank=2, targets=r".*\.to_q"))
    with pytest.raises(InvalidRequest, match="matches no module"):
        add_lora(tiny.unet("sd21"), LoRAConfig(rank=2, targets="nothing"))


def test_only_euler_students_are_trained(world, tiny):
    with pytest.raises(ModelError, match="PNDMScheduler"):
        Student(HSpaceUNet(tiny.unet("sd21")), tiny.scheduler("sd15"), world.config(student__adapter="none"))


def test_masters_keep_what_bf16_cannot(student):
    """Updates smaller than a bf16 digit add up in the masters and reach the model in the end."""
    model = student()
    working = model.trainable()
    masters = Masters(working)
    for p in model.parameters():
        p.data = p.data.bfloat16()
    name = next(n for n in working if "lora_A" in n)
    start = masters.parameters[name].detach().clone()
    for _ in range(64):
        working[name].grad = torch.full_like(working[name], 2.0**-12)
        masters.accumulate()
        assert working[name].grad is None
    torch.testing.assert_close(masters.parameters[name].grad, torch.full_like(start, 2.0**-6))
    with torch.no_grad():
        masters.parameters[name].sub_(masters.parameters[name].grad)
    masters.publish()
    torch.testing.assert_close(working[name].detach(), (start - 2.0**-6).bfloat16())


def test_the_averages_decay_grows_to_its_setting(student):
    masters = Masters(student().trainable())
    ema = EMA(masters, 0.9)
    name = next(iter(ema.values))
    with torch.no_grad():
        masters.parameters[name].fill_(1.0)
    ema.values[name].zero_()
    ema.update(masters, 1)
    torch.testing.assert_close(ema.values[name], torch.full_like(ema.values[name], 9 / 11))
    ema.values[name].zero_()
    ema.update(masters, 10_000)
    torch.testing.assert_close(ema.values[name], torch.full_like(ema.values[name], 0.1))
