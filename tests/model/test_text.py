"""Prompts to states and keys: those of transformers and open_clip, and reports of cut and unknown words."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from ragturbo.errors import InvalidRequest, ModelError
from ragturbo.model.bundle import Bundle
from ragturbo.model.clip_key import ClipKey
from ragturbo.model.text import TextEncoder

PROMPTS = ["a red circle left of a blue square", "a dog", ""]


def open_clip_model(tokenizer: Any, layers: int = 4, width: int = 32, quick_gelu: bool = False) -> Any:
    """A small CLIP by open_clip, with the structure of ViT-H-14's text tower."""
    import open_clip

    text = open_clip.CLIPTextCfg(
        context_length=tokenizer.model_max_length, vocab_size=len(tokenizer), width=width, heads=4, layers=layers
    )
    vision = open_clip.CLIPVisionCfg(layers=1, width=32, head_width=16, patch_size=16, image_size=32)
    model = open_clip.CLIP(24, vision, text, quick_gelu=quick_gelu).eval().requires_grad_(False)
    # Larger random weights, so that prompts have different embeddings.
    for name, parameter in model.transformer.named_parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
        assert name
    return model


def penultimate_text_encoder(tiny: ModuleType, tokenizer: Any, source: Any, **overrides: Any) -> Any:
    """As in SD 2: the first n - 1 blocks under transformers' names, followed by the last norm."""
    kept = len(source.transformer.resblocks) - 1
    encoder = tiny.text_encoder(tokenizer, layers=kept, **overrides)
    state = {
        "embeddings.token_embedding.weight": source.token_embedding.weight,
        "embeddings.position_embedding.weight": source.positional_embedding,
        "final_layer_norm.weight": source.ln_final.weight,
        "final_layer_norm.bias": source.ln_final.bias,
    }
    for i, block in enumerate(source.transformer.resblocks[:kept]):
        layer = f"encoder.layers.{i}."
        for part, name in zip(("weight", "bias"), (block.attn.in_proj_weight, block.attn.in_proj_bias), strict=True):
            for letter, piece in zip("qkv", name.chunk(3), strict=True):
                state[f"{layer}self_attn.{letter}_proj.{part}"] = piece
            state[f"{layer}self_attn.out_proj.{part}"] = getattr(block.attn.out_proj, part)
            state[f"{layer}layer_norm1.{part}"] = getattr(block.ln_1, part)
            state[f"{layer}layer_norm2.{part}"] = getattr(block.ln_2, part)
            state[f"{layer}mlp.fc1.{part}"] = getattr(block.mlp.c_fc, part)
            state[f"{layer}mlp.fc2.{part}"] = getattr(block.mlp.c_proj, part)
    inner = getattr(encoder, "text_model", encoder)
    inner.load_state_dict(state)
    return encoder.requires_grad_(False)


@torch.no_grad()
def test_states_and_pooled_key_are_transformers_own(bundle: Bundle) -> None:
    ids = bundle.text.tokenize(PROMPTS).input_ids
    states = bundle.text.encode(ids)
    own = bundle.text.text_encoder(input_ids=ids)
    assert torch.equal(states.hidden_states, own.last_hidden_state)
    assert bundle.text.key_kind == "pooled" and bundle.text.key_dim == 32
    torch.testing.assert_close(states.key, F.normalize(own.pooler_output, dim=-1))
    assert states.key.dtype == torch.float32
    torch.testing.assert_close(states.key.norm(dim=-1), torch.ones(3))


@torch.no_grad()
def test_keys_are_unit_fp32_whatever_the_model_computes_in(tiny: ModuleType) -> None:
    tokenizer = tiny.clip_tokenizer()
    text = TextEncoder(tokenizer, tiny.text_encoder(tokenizer).to(torch.bfloat16))
    states = text.encode(text.tokenize(PROMPTS).input_ids)
    assert states.hidden_states.dtype == torch.bfloat16 and states.key.dtype == torch.float32
    torch.testing.assert_close(states.key.norm(dim=-1), torch.ones(3))


@pytest.mark.parametrize("act", ["gelu", "quick_gelu"])
@pytest.mark.parametrize("legacy", [False, True], ids=["eos", "legacy-eos"])
@torch.no_grad()
def test_the_clip_key_is_open_clips_own_text_embedding(
    tiny: ModuleType, tmp_path: Path, act: str, legacy: bool
) -> None:
    tokenizer = tiny.clip_tokenizer()
    source = open_clip_model(tokenizer, quick_gelu=act == "quick_gelu")
    # SD 2's configuration names token 2 as the end; for those, the end is the highest id.
    overrides = {"eos_token_id": 2} if legacy else {}
    encoder = penultimate_text_encoder(tiny, tokenizer, source, act=act, **overrides)
    save_file({n: v.contiguous() for n, v in source.state_dict().items()}, tmp_path / "open_clip.safetensors")
    key = ClipKey.from_open_clip(tmp_path / "open_clip.safetensors", encoder)
    text = TextEncoder(tokenizer, encoder, key)
    assert text.key_kind == "clip" and text.key_dim == 24

    ids = text.tokenize(PROMPTS).input_ids
    states = text.encode(ids)
    expected = source.encode_text(ids, normalize=True)
    torch.testing.assert_close(states.key, expected, rtol=1e-4, atol=1e-5)
    # The controls: the prompts differ by far more, and the state after the final norm gives another key.
    assert (expected[0] - expected[1]).abs().max() > 1e-2
    normed = key(states.hidden_states, text.end_of_text(ids))
    assert (F.normalize(normed, dim=-1) - expected).abs().max() > 1e-3
    # The hidden states are the same as without the key.
    assert torch.equal(states.hidden_states, TextEncoder(tokenizer, encoder).encode(ids).hidden_states)

    key.save(tmp_path)
    again = TextEncoder(tokenizer, encoder, ClipKey.load(tmp_path))
    assert torch.equal(again.encode(ids).key, states.key)


@torch.no_grad()
def test_padding_after_the_end_does_not_reach_the_clip_key(tiny: ModuleType, tmp_path: Path) -> None:
    tokenizer = tiny.clip_tokenizer()
    source = open_clip_model(tokenizer)
    encoder = penultimate_text_encoder(tiny, tokenizer, source)
    save_file({n: v.contiguous() for n, v in source.state_dict().items()}, tmp_path / "open_clip.safetensors")
    text = TextEncoder(tokenizer, encoder, ClipKey.from_open_clip(tmp_path / "open_clip.safetensors", encoder))
    ids = text.tokenize(["a dog"]).input_ids
    # open_clip pads with 0, SD 2's tokenizer with "!", SD 1's with the end-of-text token.
    padded = ids.clone()
    padded[0, 4:] = 0
    assert (ids[0, 3] == tokenizer.eos_token_id).all()
    torch.testing.assert_close(text.encode(padded).key, text.encode(ids).key, rtol=1e-5, atol=1e-6)


def test_a_checkpoint_that_does_not_continue_the_encoder_is_refused(tiny: ModuleType, tmp_path: Path) -> None:
    tokenizer = tiny.clip_tokenizer()
    source, other = open_clip_model(tokenizer), open_clip_model(tokenizer)
    encoder = penultimate_text_encoder(tiny, tokenizer, source)
    path = tmp_path / "open_clip.safetensors"

    def refused(state: dict[str, torch.Tensor], match: str) -> None:
        save_file({n: v.contiguous() for n, v in state.items()}, path)
        with pytest.raises(ModelError, match=match):
            ClipKey.from_open_clip(path, encoder)

    refused(other.state_dict(), "another CLIP")
    refused(open_clip_model(tokenizer, layers=5).state_dict(), "has 5 text blocks")
    refused({"weight": torch.zeros(1)}, "not an open_clip checkpoint")
    with pytest.raises(ModelError, match="ragturbo convert"):
        ClipKey.from_open_clip(tmp_path / "open_clip_pytorch_model.bin", encoder)
    narrow = tiny.text_encoder(tokenizer, width=16)
    save_file({n: v.contiguous() for n, v in source.state_dict().items()}, path)
    with pytest.raises(ModelError, match="width 32, not 16"):
        TextEncoder(tokenizer, narrow, ClipKey.from_open_clip(path, encoder))
    # open_clip's custom models have the tower under a prefix.
    prefixed = {n if n.startswith("visual.") else f"text.{n}": v for n, v in source.state_dict().items()}
    save_file({n: v.contiguous() for n, v in prefixed.items()}, path)
    assert ClipKey.from_open_clip(path, encoder).dim == 24


def test_tokens_are_the_pipelines_own(bundle: Bundle) -> None:
    tokens = bundle.text.tokenize(PROMPTS)
    own = bundle.text.tokenizer(
        PROMPTS, padding="max_length", max_length=16, truncation=True, return_tensors="pt"
    ).input_ids
    assert torch.equal(tokens.input_ids, own) and tokens.input_ids.dtype == torch.int64
    assert tokens.dropped == (0, 0, 0) and tokens.unknown == ((), (), ())


def test_what_was_cut_off_is_counted(bundle: Bundle) -> None:
    # 16 positions, two of them start and end.
    prompts = ["dog " * 13, "dog " * 14, "dog " * 15, "dog " * 10_000]
    assert bundle.text.tokenize(prompts).dropped == (0, 0, 1, 9_986)


def test_many_threads_tokenize_at_once(bundle: Bundle) -> None:
    # A short and a truncated prompt, so that a race in the set-up of the tokenizer would show.
    prompts = ["a red circle", "dog " * 40]
    expected = [bundle.text.tokenize([prompt]) for prompt in prompts]
    with ThreadPoolExecutor(8) as pool:
        results = pool.map(lambda i: (i % 2, bundle.text.tokenize([prompts[i % 2]])), range(400))
        # The tokenizer itself is not changed.
        for _ in range(50):
            assert len(bundle.text.tokenizer("dog " * 40, truncation=False).input_ids) == 42
        for which, tokens in results:
            assert (
                torch.equal(tokens.input_ids, expected[which].input_ids)
                and tokens.dropped == (0, 26)[which : which + 1]
            )


def test_a_tokenizer_without_its_rust_half_is_refused(tiny: ModuleType) -> None:
    with pytest.raises(ModelError, match="fast tokenizer"):
        TextEncoder(object(), tiny.text_encoder(tiny.clip_tokenizer()))


def test_unknown_words_of_a_closed_vocabulary_are_named(tiny: ModuleType) -> None:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<start>", "<end>", "<unk>", "a", "red", "circle"]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    raw.normalizer = normalizers.Lowercase()
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 0), ("<end>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", pad_token="<end>", eos_token="<end>", model_max_length=8
    )
    text = TextEncoder(tokenizer, tiny.text_encoder(tokenizer, vocab_size=len(words), eos_token_id=1, pad_token_id=1))
    tokens = text.tokenize(["A red zebra", "a CIRCLE", "blue Ünicorn blue"])
    assert tokens.unknown == (("zebra",), (), ("blue", "Ünicorn"))
    assert tokens.input_ids[0].tolist() == [0, 3, 4, 2, 1, 1, 1, 1]


def test_clips_own_byte_vocabulary_knows_every_word(bundle: Bundle) -> None:
    # CLIP's unknown token is also its end of text and its padding.
    assert bundle.text.tokenize(["ünï ☃ 漢字 \U0001f600", "", "a"]).unknown == ((), (), ())


def test_a_single_string_is_not_a_list_of_letters(bundle: Bundle) -> None:
    with pytest.raises(InvalidRequest):
        bundle.text.tokenize("a dog")


def test_an_encoder_that_wants_a_mask_is_refused(tiny: ModuleType) -> None:
    tokenizer = tiny.clip_tokenizer()
    with pytest.raises(ModelError, match="use_attention_mask"):
        TextEncoder(tokenizer, tiny.text_encoder(tokenizer, use_attention_mask=True))
