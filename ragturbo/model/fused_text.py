"""CLIP's text transformer with fewer kernel launches: the same weights and result, Q, K and V in one product.

transformers chooses masks and attention kernels by the caller's state, such as a graph capture. This module computes
the same with and without a capture.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ragturbo.errors import ModelError
from ragturbo.model.text import TextEncoder, TextStates
from ragturbo.model.tied_layers import Sum, TiedLinear
from ragturbo.model.ties import Replaced, Ties
from ragturbo.model.tokens import sdpa


class FusedText:
    """`TextEncoder.encode` on the encoder's own weights; the encoder is not changed."""

    def __init__(self, text: TextEncoder, *, packs: bool = False) -> None:
        """packs: keep large weights in oneDNN's layout, for CPUs."""
        self._text = text
        encoder = text.text_encoder
        # transformers 4 has the transformer in an attribute.
        model = getattr(encoder, "text_model", encoder)
        for name in ("embeddings", "encoder", "final_layer_norm"):
            if not hasattr(model, name):
                raise ModelError(f"{type(encoder).__name__} cannot be fused: it has no {name!r}")
        self._embeddings, self._norm = model.embeddings, model.final_layer_norm
        ties = Ties(model, packs=packs)
        self._layers = [_Layer(ties, f"encoder.layers.{i}", layer) for i, layer in enumerate(model.encoder.layers)]
        self.replaced = [
            Replaced(f"text_encoder.{layer.path}", "CLIPEncoderLayer", "fused layer") for layer in self._layers
        ]

    def encode(self, input_ids: Tensor) -> TextStates:
        """input_ids: (B, L) on the encoder's device. It does not synchronize."""
        embeddings = self._embeddings
        x = F.embedding(input_ids, embeddings.token_embedding.weight)
        stream = Sum(x + embeddings.position_embedding.weight[: input_ids.shape[1]])
        for layer in self._layers:
            stream = layer(stream)
        (hidden, x), end = stream.normed(self._norm), self._text.end_of_text(input_ids)
        if self._text.clip_key is not None:
            # The CLIP key's block takes the states before the final norm.
            key = self._text.clip_key(x, end)
        else:
            key = hidden[torch.arange(len(end), device=end.device), end]
        return TextStates(hidden, F.normalize(key.float(), dim=-1))


class _Layer:
    def __init__(self, ties: Ties, path: str, layer: Any) -> None:
        self.path = path
        attention, mlp = layer.self_attn, layer.mlp
        parts = [attention.q_proj, attention.k_proj, attention.v_proj]
        if any(not isinstance(part, nn.Linear) or part.bias is None for part in (*parts, attention.out_proj)):
            raise ModelError(f"{path} cannot be fused: its attention is not made of linear layers with biases")
        width = attention.q_proj.in_features
        if attention.scale != (width // attention.num_heads) ** -0.5:
            raise ModelError(f"{path} cannot be fused: its attention has a non-standard scale")
        self.norm1, self.norm2 = layer.layer_norm1, layer.layer_norm2
        self.heads = attention.num_heads
        self.qkv = TiedLinear(ties, *(f"{path}.self_attn.{x}_proj" for x in "qkv"))
        self.qkv_bias = torch.cat([part.bias.detach() for part in parts])
        names = "self_attn.out_proj", "mlp.fc1", "mlp.fc2"
        self.out, self.up, self.down = (TiedLinear(ties, f"{path}.{name}") for name in names)
        self.out_bias, self.up_bias, self.down_bias = attention.out_proj.bias, mlp.fc1.bias, mlp.fc2.bias
        self.activation = mlp.activation_fn

    def __call__(self, stream: Sum) -> Sum:
        """stream: (B, L, D)"""
        h, x = stream.normed(self.norm1)
        q, k, v = self.qkv(h, self.qkv_bias).chunk(3, dim=-1)
        h, x = self.out.onto(x, sdpa(q, k, v, self.heads, causal=True), self.out_bias).normed(self.norm2)
        return self.down.onto(x, self.activation(self.up(h, self.up_bias)), self.down_bias)
