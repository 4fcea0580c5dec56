"""The text encoder of the fast engine against the model's own."""

from __future__ import annotations

import pytest
import torch

from ragturbo.errors import ModelError
from ragturbo.model.clip_key import ClipKey
from ragturbo.model.fused_text import FusedText
from ragturbo.model.text import TextEncoder

PROMPTS = ["a red circle left of a blue square", "a photo of a cat", "", "the dog " * 40]


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("act", ["gelu", "quick_gelu"])
@pytest.mark.parametrize("key", ["pooled", "clip"])
@torch.inference_mode()
def test_it_is_the_models_own_encoder(tiny, act, key):
    tokenizer = tiny.clip_tokenizer()
    encoder = tiny.text_encoder(tokenizer, act=act)
    clip = None
    if key == "clip":
        clip = ClipKey(32, 4, 24, 128, act).eval()
        torch.nn.init.normal_(clip.text_projection)
    text = TextEncoder(tokenizer, encoder, clip)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    fused, ids = FusedText(text), text.tokenize(PROMPTS).input_ids
    got, expected = fused.encode(ids), text.encode(ids)
    assert error(got.hidden_states, expected.hidden_states) < 1e-5 and error(got.key, expected.key) < 1e-5
    # The control: another prompt gives another result.
    assert error(got.hidden_states[0], expected.hidden_states[1]) > 1e-3
    assert error(got.key[0], expected.key[1]) > 1e-4
    assert all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())
    assert len(fused.replaced) == 3


def test_an_encoder_of_another_make_is_refused(tiny):
    tokenizer = tiny.clip_tokenizer()
    encoder = tiny.text_encoder(tokenizer)
    encoder.encoder.layers[1].self_attn.scale = 1.0
    with pytest.raises(ModelError, match="layers.1 cannot be fused: its attention has a non-standard scale"):
        FusedText(TextEncoder(tokenizer, encoder))
    del encoder.final_layer_norm
    with pytest.raises(ModelError, match="final_layer_norm"):
        FusedText(TextEncoder(tokenizer, encoder))
