"""CLIP's tokenizer by the library `tokenizers` alone, as transformers 5 builds it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from ragturbo.model.find import read_json

_END = "<|endoftext|>"
_SPECIAL = {"bos_token": "<|startoftext|>", "eos_token": _END, "unk_token": _END, "pad_token": _END}
_WORDS = r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""
# Entries of tokenizer_config.json that do not change tokens, and those that must have one of these values.
_IGNORED = (
    "clean_up_tokenization_spaces", "do_lower_case", "errors", "is_local", "local_files_only", "name_or_path",
    "special_tokens_map_file", "tokenizer_file", "use_fast", "model_max_length", "added_tokens_decoder", *_SPECIAL,
)  # fmt: skip
_VALUES: dict[str, tuple[Any, ...]] = {
    "tokenizer_class": ("CLIPTokenizer", "CLIPTokenizerFast"), "backend": ("tokenizers",), "add_prefix_space": (False,),
    "padding_side": ("right",), "truncation_side": ("right",), "split_special_tokens": (False,),
    "extra_special_tokens": ([], {}), "additional_special_tokens": ([],),
}  # fmt: skip
_BPE: dict[str, Any] = {
    "dropout": None, "continuing_subword_prefix": "", "end_of_word_suffix": "</w>", "fuse_unk": False,
    "byte_fallback": False, "ignore_merges": False,
}  # fmt: skip
# transformers' value for no limit.
_UNLIMITED = int(1e30)


class CLIPTokenizer:
    """What `TextEncoder` uses of transformers' CLIPTokenizer."""

    padding_side = truncation_side = "right"

    def __init__(self, folder: Path, backend: Any, special: Mapping[str, str], model_max_length: int) -> None:
        self.folder, self.backend_tokenizer, self.model_max_length = folder, backend, model_max_length
        self.pad_token = special["pad_token"]
        self.pad_token_id: int = backend.token_to_id(special["pad_token"])
        self.eos_token_id: int = backend.token_to_id(special["eos_token"])
        self.unk_token_id: int = backend.token_to_id(special["unk_token"])

    @cached_property
    def of_transformers(self) -> Any:
        """The same tokenizer in transformers' class, which is imported for it."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.folder, local_files_only=True)

    @classmethod
    def load(cls, folder: Path) -> CLIPTokenizer | None:
        """Load the tokenizer of a folder; None if it has something that only transformers can read."""
        try:
            config = read_json(folder / "tokenizer_config.json")
            known = all(name in _IGNORED or value in _VALUES.get(name, ()) for name, value in config.items())
            if "tokenizer_class" not in config or not known or (folder / "added_tokens.json").exists():
                return None
            special = _special_tokens(folder, config)
            names = {name: str(getattr(token, "content", token)) for name, token in special.items()}
            file = folder / "tokenizer.json"
            backend = _from_json(file, config, names) if file.is_file() else _from_words(folder, config, special, names)
            if backend is None:
                return None
            _set_up(backend, names)
            return cls(folder, backend, names, int(config.get("model_max_length", _UNLIMITED)))
        # The library raises plain Exceptions. transformers reports what is wrong with the files.
        except Exception:
            return None


def _special_tokens(folder: Path, config: Mapping[str, Any]) -> dict[str, AddedToken | str]:
    """The special tokens by name. A string has the library's default flags."""
    found: dict[str, Any] = {**_SPECIAL, **{name: config[name] for name in _SPECIAL if name in config}}
    old = folder / "special_tokens_map.json"
    if "added_tokens_decoder" not in config and old.is_file():
        for name, value in read_json(old).items():
            if name not in _SPECIAL:
                raise ValueError(f"{old} has an unknown token {name!r}")
            found[name] = {**value, "special": True} if isinstance(value, dict) else value
    return {
        name: AddedToken(**{key: part for key, part in value.items() if key != "__type"})
        if isinstance(value, dict) else value
        for name, value in found.items()
    }  # fmt: skip


def _from_json(file: Path, config: Mapping[str, Any], names: Mapping[str, str]) -> Any:
    """From tokenizer.json, which has the added tokens with their flags."""
    backend = Tokenizer.from_file(str(file))
    added = backend.get_added_tokens_decoder()
    special = {token.content for token in added.values() if token.special}
    beyond = {int(i) for i in config.get("added_tokens_decoder", ())} - added.keys()
    plain = isinstance(backend.model, models.BPE) and backend.padding is None and backend.truncation is None
    if beyond or not plain or not special >= set(names.values()):
        return None
    if any(getattr(backend.model, name) != value for name, value in (_BPE | {"unk_token": names["unk_token"]}).items()):
        return None
    return backend


def _from_words(
    folder: Path, config: Mapping[str, Any], special: Mapping[str, AddedToken | str], names: Mapping[str, str]
) -> Any:
    """From vocab.json and merges.txt, in transformers' order of added tokens."""
    files = str(folder / "vocab.json"), str(folder / "merges.txt")
    backend = Tokenizer(models.BPE.from_file(*files, unk_token=names["unk_token"], **_BPE))
    decoder = {int(i): AddedToken(**token) for i, token in config.get("added_tokens_decoder", {}).items()}
    tokens: list[Any] = [decoder[i] for i in sorted(decoder)]
    there = {token.content for token in tokens}
    for name, token in special.items():
        if names[name] not in there and token not in tokens:
            tokens.append(token)
    tokens = [AddedToken(token, special=True) if isinstance(token, str) else token for token in tokens]
    for token in tokens:
        token.special = token.special or token.content in names.values()
    backend.add_tokens(tokens)
    return backend


def _set_up(backend: Any, names: Mapping[str, str]) -> None:
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.decoder = decoders.ByteLevel()
    end, start = ((names[name], backend.token_to_id(names[name])) for name in ("eos_token", "bos_token"))
    backend.post_processor = processors.RobertaProcessing(end, start, False, False)
