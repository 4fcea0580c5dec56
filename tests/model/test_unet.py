"""decode(encode(x)) equals the diffusers UNet bit for bit, with all of its options."""

from __future__ import annotations

import copy
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ragturbo.errors import InvalidRequest, ModelError
from ragturbo.model.tokens import from_tokens, to_tokens
from ragturbo.model.unet import HSpaceUNet

KINDS = ("sd21", "sd15", "sdxl")


def conditions(kind: str, batch: int) -> dict[str, Any]:
    if kind != "sdxl":
        return {}
    return {"added_cond_kwargs": {"text_embeds": torch.randn(batch, 32), "time_ids": torch.randint(0, 99, (batch, 6))}}


def both(unet: Any, sample: Tensor, timestep: Any, text: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
    """(the model's own forward, ours)"""
    view = HSpaceUNet(unet)
    with torch.no_grad():
        ours = view.decode(view.encode(sample, timestep, text, **given))
        return unet(sample, timestep, text, **given).sample, ours


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(16, 16), (15, 13), (8, 19)], ids=["even", "odd", "mixed"])
def test_decode_of_encode_is_the_models_own_forward(unets: dict[str, Any], kind: str, size: tuple[int, int]) -> None:
    expected, ours = both(unets[kind], torch.randn(2, 4, *size), 999, torch.randn(2, 7, 32), **conditions(kind, 2))
    assert torch.equal(ours, expected)


@pytest.mark.parametrize(
    "timestep",
    [999, 12.5, torch.tensor(999), torch.tensor([999]), torch.tensor([1.0, 700.0]), torch.tensor([3, 999])],
    ids=["int", "float", "scalar", "one", "floats", "each"],
)
def test_every_form_of_a_timestep_gives_the_same_bits(unets: dict[str, Any], timestep: Any) -> None:
    expected, ours = both(unets["sd21"], torch.randn(2, 4, 16, 16), timestep, torch.randn(2, 7, 32))
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_attention_masks_reach_encoder_and_decoder(unets: dict[str, Any], kind: str) -> None:
    sample, text, given = torch.randn(2, 4, 16, 16), torch.randn(2, 7, 32), conditions(kind, 2)
    mask = torch.tensor([[1] * 7, [1] * 3 + [0] * 4])
    expected, ours = both(unets[kind], sample, 999, text, encoder_attention_mask=mask, **given)
    assert torch.equal(ours, expected)
    without, _ = both(unets[kind], sample, 999, text, **given)
    assert torch.equal(without[0], ours[0]) and not torch.allclose(without[1], ours[1], atol=1e-6)
    # Masked words have no effect.
    other = text.clone()
    other[1, 3:] = torch.randn(4, 32)
    _, again = both(unets[kind], sample, 999, other, encoder_attention_mask=mask, **given)
    assert torch.equal(again, ours)


def test_a_lora_in_the_decoder_is_in_force(unets: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")
    unet = copy.deepcopy(unets["sd21"])
    unet.add_adapter(peft.LoraConfig(r=2, target_modules=r"up_blocks\..*\.(to_q|to_v)", init_lora_weights=False))
    sample, text = torch.randn(1, 4, 15, 16), torch.randn(1, 7, 32)
    expected, ours = both(unet, sample, 999, text)
    assert torch.equal(ours, expected)
    plain, _ = both(unets["sd21"], sample, 999, text)
    assert not torch.allclose(plain, ours, atol=1e-6)


def test_a_view_over_a_peft_model_is_a_view_over_what_it_wraps(unets: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=r"up_blocks\..*\.to_q", init_lora_weights=False)
    wrapped = peft.get_peft_model(copy.deepcopy(unets["sd21"]), config)
    sample, text = torch.randn(1, 4, 16, 16), torch.randn(1, 7, 32)
    view = HSpaceUNet(wrapped)
    with torch.no_grad():
        assert torch.equal(view.decode(view.encode(sample, 999, text)), wrapped(sample, 999, text).sample)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_changes_no_gradient(unets: dict[str, Any], kind: str) -> None:
    sample, text, given = torch.randn(1, 4, 16, 16), torch.randn(1, 7, 32), conditions(kind, 1)

    def gradients(checkpointing: bool, split: bool) -> list[Tensor | None]:
        unet = copy.deepcopy(unets[kind]).train()
        if checkpointing:
            unet.enable_gradient_checkpointing()
        view = HSpaceUNet(unet)
        out = view.decode(view.encode(sample, 999, text, **given)) if split else unet(sample, 999, text, **given).sample
        out.square().mean().backward()
        return [parameter.grad for parameter in unet.parameters()]

    reference = gradients(checkpointing=False, split=False)
    for split in (False, True):
        for a, b in zip(reference, gradients(checkpointing=True, split=split), strict=True):
            assert (a is None) == (b is None)
            if a is not None and b is not None:
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_freeu_works_as_in_the_model(unets: dict[str, Any]) -> None:
    unet = copy.deepcopy(unets["sd21"])
    sample, text = torch.randn(1, 4, 16, 16), torch.randn(1, 7, 32)
    plain, _ = both(unet, sample, 999, text)
    unet.enable_freeu(s1=0.9, s2=0.2, b1=1.4, b2=1.6)
    expected, ours = both(unet, sample, 999, text)
    assert torch.equal(ours, expected) and not torch.allclose(ours, plain, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"center_input_sample": True},
        {"time_embedding_act_fn": "silu", "time_embedding_type": "fourier", "time_embedding_dim": 32},
        {"num_class_embeds": 5},
        {"class_embed_type": "timestep", "class_embeddings_concat": True},
        {"encoder_hid_dim": 24, "encoder_hid_dim_type": "text_proj"},
        {"addition_embed_type": "text", "addition_embed_type_num_heads": 4},
        {"time_cond_proj_dim": 16},
        {"conv_in_kernel": 1, "conv_out_kernel": 1},
        {"mid_block_type": "UNetMidBlock2D"},
        {"resnet_time_scale_shift": "scale_shift"},
        {"downsample_padding": 0},
    ],
    ids=lambda options: next(iter(options)),
)
def test_the_odder_configurations_are_the_models_own_too(tiny: ModuleType, options: dict[str, Any]) -> None:
    unet = tiny.unet("sd21", **options)
    given: dict[str, Any] = {}
    if "num_class_embeds" in options or "class_embed_type" in options:
        given["class_labels"] = torch.tensor([1, 4])
    if "time_cond_proj_dim" in options:
        given["timestep_cond"] = torch.randn(2, 16)
    text = torch.randn(2, 7, options.get("encoder_hid_dim", 32))
    expected, ours = both(unet, torch.randn(2, 4, 16, 16), 500, text, **given)
    assert torch.equal(ours, expected)
    view = HSpaceUNet(unet)
    assert view.text_width == text.shape[-1]
    with torch.no_grad():
        odd = view.encode(torch.randn(2, 4, 31, 29), 500, text, **given).h
    assert view.grid(31, 29) == tuple(odd.shape[2:])


def test_the_view_copies_nothing(unets: dict[str, Any]) -> None:
    view = HSpaceUNet(unets["sd21"])
    assert view.unet is unets["sd21"]
    assert view.channels == 64 and view.text_width == 32
    assert view.device == torch.device("cpu") and view.dtype == torch.float32


@settings(deadline=None, max_examples=20)
@given(height=st.integers(9, 40), width=st.integers(9, 40), kind=st.sampled_from(KINDS))
def test_grid_tells_the_features_size(unets: dict[str, Any], height: int, width: int, kind: str) -> None:
    view = HSpaceUNet(unets[kind])
    with torch.no_grad():
        state = view.encode(torch.randn(1, 4, height, width), 0, torch.randn(1, 3, 32), **conditions(kind, 1))
    assert view.grid(height, width) == tuple(state.h.shape[2:])
    assert state.h.shape[1] == view.channels


def test_h_is_what_decode_turns_into_the_image(unets: dict[str, Any]) -> None:
    view = HSpaceUNet(unets["sd21"])
    sample = torch.randn(1, 4, 16, 16)
    with torch.no_grad():
        state = view.encode(sample, 999, torch.randn(1, 7, 32))
        own = view.decode(state)
        assert torch.equal(view.decode(state, state.h.clone()), own)
        assert not torch.allclose(view.decode(state, state.h + 1), own, atol=1e-4)
        # decode does not change the state, which can be decoded again with another h.
        assert torch.equal(view.decode(state), own)
        assert torch.equal(state.skips[0], view.unet.conv_in(sample))
    assert len(state.skips) == sum(len(block.resnets) for block in view.unet.up_blocks)


def test_retrieval_features_are_clean_latents_at_t_zero_as_tokens(unets: dict[str, Any]) -> None:
    view = HSpaceUNet(unets["sd21"])
    latents, caption = torch.randn(2, 4, 16, 24), torch.randn(2, 7, 32)
    with torch.no_grad():
        tokens = view.retrieval_features(latents, caption)
        h = view.encode(latents, torch.tensor(0), caption).h
    assert tokens.shape == (2, 2 * 3, 64)
    assert torch.equal(tokens, h.flatten(2).transpose(1, 2))


def test_tokens_of_a_channels_last_feature_are_its_own_memory() -> None:
    h = torch.randn(2, 8, 3, 5).to(memory_format=torch.channels_last)
    tokens = to_tokens(h)
    assert tokens.data_ptr() == h.data_ptr() and tokens.is_contiguous() and tokens.shape == (2, 15, 8)
    back = from_tokens(tokens, (3, 5))
    assert back.data_ptr() == h.data_ptr() and torch.equal(back, h)
    assert back.is_contiguous(memory_format=torch.channels_last)
    plain = h.contiguous()
    assert to_tokens(plain).data_ptr() == plain.data_ptr() and torch.equal(from_tokens(to_tokens(plain), (3, 5)), h)


def test_what_a_split_forward_cannot_do_is_refused_by_name(unets: dict[str, Any], tiny: ModuleType) -> None:
    view = HSpaceUNet(unets["sd21"])
    sample, text = torch.randn(1, 4, 16, 16), torch.randn(1, 7, 32)
    for name in ("down_block_additional_residuals", "mid_block_additional_residual"):
        with pytest.raises(ModelError, match=name):
            view.encode(sample, 0, text, **{name: (torch.zeros(1),)})
    with pytest.raises(ModelError, match="scale"):
        view.encode(sample, 0, text, cross_attention_kwargs={"scale": 0.5})
    with pytest.raises(TypeError, match="guidance"):
        view.encode(sample, 0, text, guidance=1)
    with pytest.raises(ModelError, match="no middle block"):
        HSpaceUNet(tiny.unet("sd21", mid_block_type=None))
    with pytest.raises(ModelError, match="GLIGEN"):
        HSpaceUNet(tiny.unet("sd21", attention_type="gated"))
    with pytest.raises(ModelError, match="Linear"):
        HSpaceUNet(torch.nn.Linear(1, 1))  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="text_time"):
        HSpaceUNet(unets["sdxl"]).encode(sample, 0, text)
    with pytest.raises(InvalidRequest, match="1, 64, 2, 2"):
        view.decode(view.encode(sample, 0, text), torch.zeros(1, 64, 2, 3))
