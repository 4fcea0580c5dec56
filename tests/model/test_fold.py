"""A folded UNet equals the model at its timesteps up to fp32 rounding, and follows changes of its LoRA."""

from __future__ import annotations

import pytest
import torch

from ragturbo.errors import InvalidRequest, ModelError
from ragturbo.model import lora
from ragturbo.model.fold import FoldedUNet, StepConstants
from ragturbo.model.onestep import make_schedule
from ragturbo.model.unet import HSpaceUNet

pytestmark = pytest.mark.usefixtures("no_grad")
FOUR_STEPS = (999, 749, 499, 249)
TARGETS = r"up_blocks\..*(to_q|to_k|to_v|to_out\.0|conv1|proj_in|upsamplers\.0\.conv)"


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def inputs(seed: int, rows: int = 2, side: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 4, side, side, generator=generator), torch.randn(rows, 16, 32, generator=generator)


def random_lora(unet: HSpaceUNet, seed: int):
    import peft

    lora.remove_lora(unet.unet)
    config = peft.LoraConfig(r=4, target_modules=TARGETS, inference_mode=True)
    peft.inject_adapter_in_model(config, unet.unet, adapter_name=lora.NAME)
    unet.unet.peft_config = {lora.NAME: config}
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in unet.unet.named_parameters():
        if "lora_" in name:
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("kind", ["sd21", "sd15"])
@pytest.mark.parametrize("side", [16, 20])
def test_at_every_folded_timestep_it_is_the_model(tiny, kind, side, rng):
    seed = int(rng.integers(2**31))
    torch.manual_seed(seed)
    unet = HSpaceUNet(tiny.unet(kind))
    folded = FoldedUNet(unet, FOUR_STEPS)
    x, text = inputs(seed, side=side)
    kv = folded.text_kv(text)
    for i, t in enumerate(FOUR_STEPS):
        expected = unet.encode(x, t, text)
        got = folded.encode(x, i, kv)
        assert relative(got.h, expected.h) < 1e-5
        assert relative(folded.decode(got), unet.decode(expected)) < 1e-5
        # The control: another timestep gives another result.
        other = unet.decode(unet.encode(x, FOUR_STEPS[i - 1], text))
        assert relative(folded.decode(got), other) > 1e-3


def test_another_h_goes_through_the_decoder(tiny, rng):
    torch.manual_seed(int(rng.integers(2**31)))
    unet = HSpaceUNet(tiny.unet())
    folded = FoldedUNet(unet, [999])
    x, text = inputs(1)
    state = folded.encode(x, 0, folded.text_kv(text))
    h = torch.randn_like(state.h)
    assert relative(folded.decode(state, h), unet.decode(unet.encode(x, 999, text), h)) < 1e-5
    assert relative(folded.decode(state, h), folded.decode(state)) > 1e-2


def test_folding_leaves_the_model_alone(tiny):
    torch.manual_seed(0)
    unet = HSpaceUNet(tiny.unet())
    x, text = inputs(2)
    before = unet.decode(unet.encode(x, 999, text))
    state = {name: value.clone() for name, value in unet.unet.state_dict().items()}
    folded = FoldedUNet(unet, [999])
    folded.decode(folded.encode(x, 0, folded.text_kv(text)))
    assert torch.equal(unet.decode(unet.encode(x, 999, text)), before)
    assert all(torch.equal(value, state[name]) for name, value in unet.unet.state_dict().items())


def test_it_shares_what_it_can_and_owns_only_what_is_packed_or_folded(tiny):
    unet = HSpaceUNet(tiny.unet())
    folded = FoldedUNet(unet, [999])
    whole = sum(p.numel() * p.element_size() for p in unet.unet.parameters())
    assert folded.unet.conv_in.weight.data_ptr() == unet.unet.conv_in.weight.data_ptr()
    assert (
        folded.unet.mid_block.resnets[0].conv1.weight.data_ptr()
        == unet.unet.mid_block.resnets[0].conv1.weight.data_ptr()
    )
    assert 0 < folded.ties.owned_bytes < whole / 4
    kinds = {(row.was, row.now) for row in folded.replaced}
    assert kinds == {
        ("ResnetBlock2D", "Resnet"), ("Transformer2DModel", "Transformer"), ("Upsample2D", "Upsample"),
        ("GroupNorm", "NormAct"),
    }  # fmt: skip


def test_a_lora_that_changes_is_copied_into_the_same_memory(tiny, rng):
    seed = int(rng.integers(2**30))
    torch.manual_seed(seed)
    unet = HSpaceUNet(tiny.unet())
    random_lora(unet, seed)
    folded = FoldedUNet(unet, [999])
    x, text = inputs(seed)
    places = [own.data_ptr() for own, _ in folded.ties.owned]

    def run() -> torch.Tensor:
        return folded.decode(folded.encode(x, 0, folded.text_kv(text)))

    first = run()
    assert relative(first, unet.decode(unet.encode(x, 999, text))) < 1e-5
    random_lora(unet, seed + 1)
    assert folded.refresh()
    assert [own.data_ptr() for own, _ in folded.ties.owned] == places
    expected = unet.decode(unet.encode(x, 999, text))
    assert relative(run(), expected) < 1e-5 and relative(first, expected) > 1e-3
    # Without the LoRA it is the base model again.
    lora.remove_lora(unet.unet)
    assert folded.refresh()
    assert relative(run(), unet.decode(unet.encode(x, 999, text))) < 1e-5


def test_a_lora_loaded_without_peft_is_folded_in_every_layer(tiny, tmp_path):
    torch.manual_seed(0)
    unet = HSpaceUNet(tiny.unet())
    x, text = inputs(4)
    plain = unet.decode(unet.encode(x, 999, text))
    random_lora(unet, 1)
    lora.save_lora(unet.unet, tmp_path)
    lora.load_lora(unet.unet, tmp_path)
    folded = FoldedUNet(unet, [999])
    got = folded.decode(folded.encode(x, 0, folded.text_kv(text)))
    assert relative(got, unet.decode(unet.encode(x, 999, text))) < 1e-5 and relative(got, plain) > 1e-3


def test_a_lora_on_layers_that_were_shared_asks_for_a_new_fold(tiny):
    torch.manual_seed(0)
    unet = HSpaceUNet(tiny.unet())
    folded = FoldedUNet(unet, [999])
    random_lora(unet, 1)
    assert not folded.refresh()
    x, text = inputs(3)
    again = FoldedUNet(unet, [999])
    assert (
        relative(again.decode(again.encode(x, 0, again.text_kv(text))), unet.decode(unet.encode(x, 999, text))) < 1e-5
    )


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_scheduler_is_three_constants_a_step(tiny, steps, prediction_type, rng):
    schedule = make_schedule(tiny.scheduler(prediction_type=prediction_type), steps, distilled=True)
    noise = torch.randn(2, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    x, mine = noise * schedule.init_sigma, noise
    for i, c in enumerate(StepConstants.of(schedule)):
        out = torch.randn(2, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(i))
        assert relative(mine * c.p, schedule.scale_input(x, i)) < 1e-12
        x, mine = schedule.step(x, out, i), mine * c.a + out * c.b
        assert relative(mine, x) < 1e-12


def test_what_cannot_be_folded_is_refused_by_name(tiny):
    with pytest.raises(ModelError, match="addition_embed_type='text_time'"):
        FoldedUNet(HSpaceUNet(tiny.unet("sdxl")), [999])
    with pytest.raises(ModelError, match="resnets.0 cannot be folded.*scale_shift"):
        FoldedUNet(HSpaceUNet(tiny.unet(resnet_time_scale_shift="scale_shift")), [999])
    with pytest.raises(ModelError, match="resnets.0 cannot be folded: its activation is GELU"):
        FoldedUNet(HSpaceUNet(tiny.unet(act_fn="gelu")), [999])
    folded = FoldedUNet(HSpaceUNet(tiny.unet()), [999])
    x, text = inputs(0)
    with pytest.raises(InvalidRequest, match="999 is not the index"):
        folded.encode(x, 999, folded.text_kv(text))
    with pytest.raises(InvalidRequest, match="takes no conditions"):
        folded.encode(x, 0, folded.text_kv(text), attention_mask=torch.ones(2, 16))
