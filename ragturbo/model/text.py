"""Prompts to hidden states and retrieval keys: one pass of the text encoder gives both."""

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


@dataclass(frozen=True)
class Tokens:
    """Tokenised prompts, on the CPU."""

    input_ids: Tensor
    """(B, L) int64"""
    dropped: tuple[int, ...]
    """How many tokens of each prompt did not fit into the encoder's context."""
    unknown: tuple[tuple[str, ...], ...]
    """The words of each prompt that a closed vocabulary does not have."""


@dataclass(frozen=True)
class TextStates:
    hidden_states: Tensor
    """(B, L, D): the UNet's cross-attention context."""
    key: Tensor
    """(B, K) fp32, L2-normalised: what the database is searched by."""


class TextEncoder:
    """A tokenizer and a CLIPTextModel. Key "pooled" is the end-of-text state; "clip" is CLIP's joint space."""

    def __init__(self, tokenizer: Any, text_encoder: Any, clip_key: ClipKey | None = None) -> None:
        config = text_encoder.config
        if getattr(config, "use_attention_mask", False):
            raise ModelError("this text encoder wants an attention mask (use_attention_mask), which CLIP's do not")
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise ModelError(
                f"{type(tokenizer).__name__} is no fast tokenizer (it has no tokenizer.json to be made from)"
            )
        self.tokenizer = tokenizer
        self.text_encoder = text_encoder
        self.clip_key = clip_key
        self.width: int = config.hidden_size
        self.max_length = min(tokenizer.model_max_length, config.max_position_embeddings)
        self._backend = _fixed_length(tokenizer, self.max_length)
        unknown = tokenizer.unk_token_id
        self._unknown_id = None if unknown == tokenizer.eos_token_id else unknown
        if clip_key is not None and clip_key.width != self.width:
            raise ModelError(f"the clip key was made for a text encoder of width {clip_key.width}, not {self.width}")

    @property
    def key_kind(self) -> str:
        return "pooled" if self.clip_key is None else "clip"

    @property
    def key_dim(self) -> int:
        return self.width if self.clip_key is None else self.clip_key.dim

    @property
    def device(self) -> torch.device:
        return self.text_encoder.device

    def tokenize(self, prompts: Sequence[str]) -> Tokens:
        """Prompts padded or cut to the encoder's context, with what was cut and what was not understood."""
        if isinstance(prompts, str):
            raise InvalidRequest("tokenize takes a list of prompts")
        # A single one here: a batch is handed to the tokenizer's own threads, and waited for.
        encode, one = self._backend.encode, len(prompts) == 1
        encodings = [encode(prompts[0])] if one else self._backend.encode_batch(list(prompts))
        input_ids = np.array([encoding.ids for encoding in encodings], np.int64)
        return Tokens(
            torch.from_numpy(input_ids.reshape(len(encodings), self.max_length)),
            tuple(sum(_own(part) for part in encoding.overflowing) for encoding in encodings),
            tuple(self._unknown(prompt, encoding) for prompt, encoding in zip(prompts, encodings, strict=True)),
        )

    def _unknown(self, prompt: str, encoding: Any) -> tuple[str, ...]:
        """The words that a closed vocabulary lacks: those that became its unknown token, or fell into pieces.

        CLIP's own unknown token is its end of text as well: its vocabulary is open, every word has pieces.
        """
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
        """input_ids: (B, L) on the encoder's device. Waits for nothing: it can be captured in a CUDA graph."""
        if self.clip_key is None:
            out = self.text_encoder(input_ids=input_ids)
            key = out.pooler_output
        else:
            out = self.text_encoder(input_ids=input_ids, output_hidden_states=True)
            # The CLIP key continues the transformer: it needs the states before the final norm.
            key = self.clip_key(out.hidden_states[-1], self.end_of_text(input_ids))
        return TextStates(out.last_hidden_state, F.normalize(key.float(), dim=-1))

    def end_of_text(self, input_ids: Tensor) -> Tensor:
        """(B,) position of each prompt's end-of-text token, by the rules of CLIPTextModel."""
        end = self.text_encoder.config.eos_token_id
        if end == 2:
            # Configurations of before transformers' fix name the wrong token; the end was the highest id.
            return input_ids.argmax(-1)
        return (input_ids == end).to(torch.int64).argmax(-1)


def _fixed_length(tokenizer: Any, length: int) -> Any:
    """The tokenizer's Rust half, set to pad and cut to one length, for ourselves alone.

    A call of the tokenizer sets the shared half up anew each time, which two threads cannot do at once.
    """
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.enable_truncation(length, direction=tokenizer.truncation_side)
    backend.enable_padding(
        direction=tokenizer.padding_side, pad_id=tokenizer.pad_token_id, pad_token=tokenizer.pad_token, length=length
    )
    return backend


def _own(encoding: Any) -> int:
    """How many of its tokens are the prompt's own."""
    return encoding.special_tokens_mask.count(0)
