"""CLIPTextModel: the text encoder of Stable Diffusion 1 and 2."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ragturbo.model.networks.config import Config, Options
from ragturbo.model.networks.library_class import Network, become_library_class


class GELUActivation(nn.Module):
    def forward(self, input: Tensor) -> Tensor:
        return F.gelu(input)


class QuickGELUActivation(nn.Module):
    def forward(self, input: Tensor) -> Tensor:
        return input * torch.sigmoid(1.702 * input)


_ACTIVATIONS = {"gelu": GELUActivation, "quick_gelu": QuickGELUActivation}
OPTIONS = Options(
    free={
        "vocab_size": 49408, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12,
        "num_attention_heads": 8, "max_position_embeddings": 77, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
        "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 1,
        # SD 2's configuration has one, but its weights have no projection.
        "projection_dim": 512,
        # Of training.
        "initializer_range": 0.02, "initializer_factor": 1.0,
    },
    fixed={"attention_dropout": 0.0, "model_type": "clip_text_model"},
    allowed={"hidden_act": _ACTIVATIONS},
    ignored=("architectures", "dtype", "torch_dtype", "transformers_version", "dropout"),
)  # fmt: skip


class BaseModelOutputWithPooling(NamedTuple):
    last_hidden_state: Tensor
    pooler_output: Tensor
    hidden_states: tuple[Tensor, ...] | None = None


class CLIPTextEmbeddings(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.token_embedding(input_ids) + self.position_embedding.weight[: input_ids.shape[-1]]


class CLIPAttention(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        width = self.embed_dim = config.hidden_size
        self.num_heads, self.head_dim = config.num_attention_heads, width // config.num_attention_heads
        self.scale = self.head_dim**-0.5
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states
        q, k, v = (
            part.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            for part in (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        )
        x = F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1, scale=self.scale)
        return self.out_proj(x.transpose(1, 2).flatten(2))


class CLIPMLP(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.activation_fn = _ACTIVATIONS[config.hidden_act]()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.fc2(self.activation_fn(self.fc1(hidden_states)))


class CLIPEncoderLayer(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.self_attn = CLIPAttention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = CLIPMLP(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states + self.self_attn(self.layer_norm1(hidden_states))
        return x + self.mlp(self.layer_norm2(x))


class CLIPEncoder(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.layers = nn.ModuleList([CLIPEncoderLayer(config) for _ in range(config.num_hidden_layers)])


class CLIPTextModel(Network):
    LIBRARY = "transformers"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.embeddings = CLIPTextEmbeddings(config)
        self.encoder = CLIPEncoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        if not isinstance(config.eos_token_id, int):
            raise TypeError(f"eos_token_id={config.eos_token_id!r}")
        self.eos_token_id = config.eos_token_id

    def forward(
        self, input_ids: Tensor, *, output_hidden_states: bool | None = None, return_dict: bool | None = None,
        **options: Any,
    ) -> Any:  # fmt: skip
        """options: the others of transformers' forward, which runs if one is given."""
        if return_dict is False or any(value is not None for value in options.values()):
            return become_library_class(self)(
                input_ids, output_hidden_states=output_hidden_states, return_dict=return_dict, **options
            )
        x = self.embeddings(input_ids)
        states = [x]
        for layer in self.encoder.layers:
            x = layer(x)
            states.append(x)
        last = self.final_layer_norm(x)
        if self.eos_token_id == 2:
            # Old configurations name the wrong token; end of text is the highest id.
            end = input_ids.to(torch.int).argmax(-1)
        else:
            end = (input_ids.to(torch.int) == self.eos_token_id).int().argmax(-1)
        pooled = last[torch.arange(len(last), device=last.device), end]
        return BaseModelOutputWithPooling(last, pooled, tuple(states) if output_hidden_states else None)
