"""Tokens without transformers are transformers' tokens, for each form in which models have their tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ragturbo.model.find import resolve
from ragturbo.model.networks.clip_tokenizer import CLIPTokenizer
from ragturbo.model.text import TextEncoder

PROMPTS = [
    "a red circle left of a blue square", "", " ", "A  Dog!! it's 42 !cats ! !", "ünï ☃ 漢字 \U0001f600", "dog " * 40,
    "<|endoftext|> a <|startoftext|> b", "<|ENDOFTEXT|> <pad><PAD> <|unk|>", "\t\n x\u00a0y\u200bz", "İstanbul ǅ ﬁ ß",
    "we'll they'd o'clock 'sup", "e\u0301 \u0301", "\x00\x01", "!" * 99, "a, b; c... (d) [e] #f @g $h 50%",
]  # fmt: skip


def token(content: str, typed: bool = False, **flags: bool) -> dict[str, Any]:
    own = {"content": content, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False, **flags}
    return {"__type": "AddedToken", **own} if typed else own


START, END = "<|startoftext|>", "<|endoftext|>"
MAP = {"bos_token": token(START), "eos_token": token(END), "pad_token": END, "unk_token": token(END)}
# tokenizer_config.json of Stable Diffusion 1.5.
SD15: dict[str, Any] = {
    "add_prefix_space": False, "bos_token": token(START, True), "do_lower_case": True, "eos_token": token(END, True),
    "errors": "replace", "model_max_length": 16, "name_or_path": "openai/clip-vit-large-patch14", "pad_token": END,
    "special_tokens_map_file": "./special_tokens_map.json", "tokenizer_class": "CLIPTokenizer",
    "unk_token": token(END, True),
}  # fmt: skip


def forms(vocabulary: dict[str, int]) -> dict[str, tuple[dict[str, Any], dict[str, Any] | None]]:
    """tokenizer_config.json and special_tokens_map.json of models on the hub, and of some that might be."""
    decoder = {str(vocabulary[c]): token(c, normalized=c != "!", special=True) for c in ("!", START, END)}
    turbo = {
        "add_prefix_space": False, "added_tokens_decoder": decoder, "bos_token": START, "eos_token": END,
        "clean_up_tokenization_spaces": True, "do_lower_case": True, "errors": "replace", "model_max_length": 16,
        "pad_token": "!", "tokenizer_class": "CLIPTokenizer", "unk_token": END,
    }  # fmt: skip
    return {
        "sd15": (SD15, MAP),
        "sd21": ({**SD15, "pad_token": "!"}, {**MAP, "pad_token": "!"}),
        "turbo": (turbo, {**MAP, "pad_token": "!"}),
        "bare": ({"tokenizer_class": "CLIPTokenizer"}, None),
        "new-token": ({"tokenizer_class": "CLIPTokenizer", "pad_token": "<pad>", "model_max_length": 16}, None),
    }


@pytest.fixture(scope="module")
def tokenizers(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    tiny.clip_tokenizer().save_pretrained(root / "saved")
    model = json.loads((root / "saved" / "tokenizer.json").read_text())["model"]
    found = {"saved": root / "saved", "shapes": resolve("shapes") / "tokenizer"}
    for name, (config, special) in forms(model["vocab"]).items():
        folder = found[name] = root / name
        folder.mkdir()
        (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
        (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, model["merges"])) + "\n")
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        if special is not None:
            (folder / "special_tokens_map.json").write_text(json.dumps(special))
    return found


FORMS = ["saved", "shapes", "sd15", "sd21", "turbo", "bare", "new-token"]


@pytest.mark.parametrize("name", FORMS)
def test_a_tokenizer_is_transformers_own(tokenizers: dict[str, Path], name: str) -> None:
    from transformers import AutoTokenizer

    ours, theirs = CLIPTokenizer.load(tokenizers[name]), AutoTokenizer.from_pretrained(tokenizers[name])
    assert ours is not None
    assert json.loads(ours.backend_tokenizer.to_str()) == json.loads(theirs.backend_tokenizer.to_str())
    for attribute in (
        "pad_token", "pad_token_id", "eos_token_id", "unk_token_id", "model_max_length", "padding_side",
        "truncation_side",
    ):  # fmt: skip
        assert getattr(ours, attribute) == getattr(theirs, attribute), attribute
    for prompt in PROMPTS:
        assert ours.backend_tokenizer.encode(prompt).ids == theirs(prompt).input_ids
    assert type(ours.of_transformers) is type(theirs) and ours.of_transformers is ours.of_transformers


@pytest.mark.parametrize("name", ["shapes", "sd21"])
def test_any_prompts_get_the_same_tokens(tokenizers: dict[str, Path], tiny: ModuleType, name: str) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(tokenizers[name])
    ours = CLIPTokenizer.load(tokenizers[name])
    encoder = tiny.text_encoder(theirs)
    texts = [TextEncoder(tokenizer, encoder) for tokenizer in (ours, theirs)]
    assert texts[0].tokenizer is ours.of_transformers  # type: ignore[union-attr]

    @settings(deadline=None, max_examples=60)
    @given(st.lists(st.text(max_size=80), max_size=6))
    def same(prompts: list[str]) -> None:
        one, other = (text.tokenize([*prompts, *PROMPTS]) for text in texts)
        assert one.input_ids.tolist() == other.input_ids.tolist()
        assert one.dropped == other.dropped and one.unknown == other.unknown

    same()


@pytest.mark.parametrize(
    "entry",
    [
        {"tokenizer_class": "T5Tokenizer"}, {"padding_side": "left"}, {"truncation_side": "left"}, {"new_option": 1},
        {"split_special_tokens": True}, {"additional_special_tokens": ["<x>"]}, {"mask_token": "<mask>"},
        {"pad_token": "<pad>"}, {"unk_token": "!"},
    ],
)  # fmt: skip
def test_another_tokenizer_is_left_to_transformers(
    tokenizers: dict[str, Path], tmp_path: Path, entry: dict[str, Any]
) -> None:
    for file in tokenizers["saved"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert CLIPTokenizer.load(tmp_path) is not None
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, **entry}))
    assert CLIPTokenizer.load(tmp_path) is None


def test_damaged_files_are_left_to_transformers(tokenizers: dict[str, Path], tmp_path: Path) -> None:
    assert CLIPTokenizer.load(tmp_path) is None
    for name in ("tokenizer_config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((tokenizers["saved"] / name).read_bytes()[:-1])
        assert CLIPTokenizer.load(tmp_path) is None
