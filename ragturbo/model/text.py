"""Prompts to hidden states and retrieval keys, in one pass of the text encoder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tokenizers
import torch
from torch import Tensor
from torch.nn import functional as F

from ragturbo.errors import InvalidRequest, ModelError
from ragturbo.model.clip_key import ClipKey
from ragturbo.model.networks.clip_tokenizer import CLIPTokenizer


@dataclass(frozen=True)
class Tokens:
    """Tokenized prompts, on the CPU."""

    input_ids: Tensor
    """(B, L) int64"""
    dropped: tuple[int, ...]
    """Number of tokens of each prompt beyond the encoder's maximum length."""
    unknown: tuple[tuple[str, ...], ...]
    """The words of each prompt that are not in a closed vocabulary."""


@dataclass(frozen=True)
class TextStates:
    hidden_states: Tensor
    """(B, L, D): the input of the UNet's cross-attentions."""
    key: Tensor
    """(B, K) fp32, L2-normalized: the query of the database search."""


class TextEncoder:
    """A tokenizer and a CLIPTextModel. Key "pooled" is the end-of-text state; "clip" is CLIP's joint space."""

    def __init__(self, tokenizer: Any, text_encoder: Any, clip_key: ClipKey | None = None) -> None:
        config = text_encoder.config
        if getattr(config, "use_attention_mask", False):
            raise ModelError("text encoders with use_attention_mask are not supported: CLIP's have none")
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise ModelError(
                f"{type(tokenizer).__name__} is not a fast tokenizer (no tokenizer.json, and none can be made)"
            )
        self._tokenizer = tokenizer
        self.text_encoder = text_encoder
        self.clip_key = clip_key
        self.width: int = config.hidden_size
        self.max_length = min(tokenizer.model_max_length, config.max_position_embeddings)
        self._backend = _fixed_length(tokenizer, self.max_length)
        # CLIP's byte-level vocabulary has no unknown words: its unknown token is its end-of-text token.
        unknown = tokenizer.unk_token_id
        self._unknown_id = None if unknown == tokenizer.eos_token_id else unknown
        if clip_key is not None and clip_key.width != self.width:
            raise ModelError(f"the CLIP key is for a text encoder of width {clip_key.width}, not {self.width}")

    @property
    def tokenizer(self) -> Any:
        """transformers' tokenizer, which is imported for it if it was not."""
        own = self._tokenizer
        return own.of_transformers if isinstance(own, CLIPTokenizer) else own

    @property
    def key_kind(self) -> str:
        return "pooled" if self.clip_key is None else "clip"

    @property
    def key_dim(self) -> int:
        return self.width if self.clip_key is None else self.clip_key.dim

    def tokenize(self, prompts: Sequence[str]) -> Tokens:
        """Pad or truncate prompts to the encoder's maximum length; report what was cut off and unknown words."""
        if isinstance(prompts, str):
            raise InvalidRequest("tokenize takes a list of prompts")
        # encode_batch wakes the tokenizer's threads and waits for them, which takes longer than a few prompts.
        few = len(prompts) <= 4
        encodings = list(map(self._backend.encode, prompts)) if few else self._backend.encode_batch(list(prompts))
        input_ids = np.array([encoding.ids for encoding in encodings], np.int64)
        return Tokens(
            torch.from_numpy(input_ids.reshape(len(encodings), self.max_length)),
            # Special tokens are not part of the prompt.
            tuple(sum(part.special_tokens_mask.count(0) for part in e.overflowing) for e in encodings),
            tuple(self._unknown(prompt, encoding) for prompt, encoding in zip(prompts, encodings, strict=True)),
        )

    def _unknown(self, prompt: str, encoding: Any) -> tuple[str, ...]:
        """The words that became the unknown token of a closed vocabulary, or were split into pieces."""
        unknown = self._unknown_id
        if unknown is None:
            return ()
        pieces = Counter(word for word in encoding.word_ids if word is not None)
        words: dict[str, None] = {}
        for token, word in zip(encoding.ids, encoding.word_ids, strict=True):
            if word is not None and (token == unknown or pieces[word] > 1):
                start, stop = encoding.word_to_chars(word)
                words[prompt[start:stop].strip()] = None
        return tuple(word for word in words if any(map(str.isalnum, word)))

    def encode(self, input_ids: Tensor) -> TextStates:
        """input_ids: (B, L) on the encoder's device. It does not synchronize: a CUDA graph can capture it."""
        if self.clip_key is None:
            out = self.text_encoder(input_ids=input_ids)
            key = out.pooler_output
        else:
            out = self.text_encoder(input_ids=input_ids, output_hidden_states=True)
            # The CLIP key's block takes the states before the final norm.
            key = self.clip_key(out.hidden_states[-1], self.end_of_text(input_ids))
        return TextStates(out.last_hidden_state, F.normalize(key.float(), dim=-1))

    def end_of_text(self, input_ids: Tensor) -> Tensor:
        """(B,) position of each prompt's end-of-text token, by the rules of CLIPTextModel."""
        end = self.text_encoder.config.eos_token_id
        if end == 2:
            # Old configurations name the wrong token; end of text is the highest id.
            return input_ids.argmax(-1)
        return (input_ids == end).to(torch.int64).argmax(-1)


def _fixed_length(tokenizer: Any, length: int) -> Any:
    """The tokenizer's Rust part, or a copy of it, that pads and truncates to `length`.

    Calling the tokenizer itself sets up the shared Rust part on each call, which is not thread-safe.
    """
    backend = tokenizer.backend_tokenizer
    # Copying CLIP's vocabulary takes 0.12 s.
    if isinstance(tokenizer, CLIPTokenizer) and backend.padding is None:
        return _pad_and_truncate(backend, tokenizer, length)
    return _pad_and_truncate(tokenizers.Tokenizer.from_str(backend.to_str()), tokenizer, length)


def _pad_and_truncate(backend: Any, tokenizer: Any, length: int) -> Any:
    backend.enable_truncation(length, direction=tokenizer.truncation_side)
    backend.enable_padding(
        direction=tokenizer.padding_side, pad_id=tokenizer.pad_token_id, pad_token=tokenizer.pad_token, length=length
    )
    return backend
