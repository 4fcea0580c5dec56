"""The "clip" key: the last block and the projection that Stable Diffusion 2 leaves out of its CLIP text encoder.

SD 2's text encoder is the first 23 of the 24 blocks of open_clip's ViT-H-14. Block 24, ln_final and the projection,
applied to its states, give a CLIP embedding for less than 1/23 more work: only the end-of-text token needs an output.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ragturbo.errors import ModelError
from ragturbo.model.networks.skeleton import Skeleton
from ragturbo.model.tokens import sdpa
from ragturbo.model.weights import read_safetensors, write_safetensors

FILE = "clip_key.safetensors"
_BLOCK = "transformer.resblocks."


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "quick_gelu": _quick_gelu}


class ClipKey(nn.Module):
    """Block, ln_final and projection under open_clip's parameter names (the block's under `resblock.`)."""

    def __init__(self, width: int, heads: int, dim: int, mlp: int, activation: str = "gelu") -> None:
        super().__init__()
        if activation not in _ACTIVATIONS:
            raise ModelError(f"activation {activation!r} of the CLIP key; known: {', '.join(_ACTIVATIONS)}")
        self.width, self.heads, self.dim, self.activation = width, heads, dim, activation
        self.resblock = nn.ModuleDict(
            {
                "ln_1": nn.LayerNorm(width),
                "attn": nn.MultiheadAttention(width, heads, batch_first=True),
                "ln_2": nn.LayerNorm(width),
                "mlp": nn.ModuleDict({"c_fc": nn.Linear(width, mlp), "c_proj": nn.Linear(mlp, width)}),
            }
        )
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, dim))

    def forward(self, hidden_states: Tensor, end: Tensor) -> Tensor:
        """hidden_states: (B, L, D) before the encoder's final norm; end: (B,) the end-of-text positions -> (B, K)."""
        block = self.resblock
        rows = torch.arange(hidden_states.shape[0], device=hidden_states.device)
        normed = block["ln_1"](hidden_states)
        attention: Any = block["attn"]
        w_q, w_kv = attention.in_proj_weight.split((self.width, 2 * self.width))
        b_q, b_kv = attention.in_proj_bias.split((self.width, 2 * self.width))
        q = F.linear(normed[rows, end], w_q, b_q)[:, None]
        k, v = F.linear(normed, w_kv, b_kv).chunk(2, dim=-1)
        # The row of the causal mask for the end-of-text token.
        mask = torch.arange(hidden_states.shape[1], device=end.device)[None] <= end[:, None]
        attended = sdpa(q, k, v, self.heads, mask[:, None, None])
        x = hidden_states[rows, end] + attention.out_proj(attended[:, 0])
        mlp: Any = block["mlp"]
        x = x + mlp["c_proj"](_ACTIVATIONS[self.activation](mlp["c_fc"](block["ln_2"](x))))
        return self.ln_final(x) @ self.text_projection

    @classmethod
    def from_open_clip(cls, checkpoint: str | Path, text_encoder: Any) -> ClipKey:
        """Take the block, norm and projection that an open_clip checkpoint has beyond a CLIPTextModel.

        Args:
            checkpoint: a safetensors file of the whole CLIP model.
            text_encoder: a CLIPTextModel made of all blocks but the last.

        Raises:
            ModelError: the checkpoint is not of open_clip, or not of this text encoder's CLIP.
        """
        state = read_safetensors(checkpoint)
        # Checkpoints of open_clip's CustomTextCLIP have the text tower under a prefix.
        text = {name.removeprefix("text."): value for name, value in state.items() if not name.startswith("visual.")}
        config = text_encoder.config
        kept = config.num_hidden_layers
        blocks = {int(name[len(_BLOCK) :].split(".")[0]) for name in text if name.startswith(_BLOCK)}
        if not blocks or "text_projection" not in text or "ln_final.weight" not in text:
            raise ModelError(f"{checkpoint} is not an open_clip checkpoint: it has no text transformer with projection")
        if max(blocks) != kept:
            raise ModelError(
                f"{checkpoint} has {max(blocks) + 1} text blocks; "
                f"for a text encoder of {kept} blocks the CLIP key needs one of {kept + 1}"
            )
        _check_same_model(text, text_encoder, checkpoint)
        prefix = f"{_BLOCK}{kept}."
        own = {"resblock." + n.removeprefix(prefix): v for n, v in text.items() if n.startswith(prefix)}
        own |= {n: v for n, v in text.items() if n.startswith("ln_final.") or n == "text_projection"}
        return cls._of(own, config.num_attention_heads, config.hidden_act)

    def save(self, folder: str | Path) -> None:
        metadata = {"version": "1", "heads": str(self.heads), "activation": self.activation}
        write_safetensors(Path(folder) / FILE, self.state_dict(), metadata)

    @classmethod
    def load(cls, folder: str | Path) -> ClipKey:
        path = Path(folder) / FILE
        state, metadata = read_safetensors(path, with_metadata=True)
        try:
            return cls._of(state, int(metadata["heads"]), metadata["activation"])
        except (KeyError, ValueError, RuntimeError) as error:
            raise ModelError(f"{path} is not a CLIP key: {error}") from error

    @classmethod
    def _of(cls, state: dict[str, Tensor], heads: int, activation: str) -> ClipKey:
        width, dim = state["text_projection"].shape
        with Skeleton():
            key = cls(width, heads, dim, state["resblock.mlp.c_fc.weight"].shape[0], activation)
        key.load_state_dict(state, assign=True)
        return key.requires_grad_(False).eval()


def _check_same_model(text: dict[str, Tensor], text_encoder: Any, checkpoint: str | Path) -> None:
    """Check that the encoder's last block is the checkpoint's: otherwise the next block would not fit its states."""
    last = text_encoder.config.num_hidden_layers - 1
    model = getattr(text_encoder, "text_model", text_encoder)
    ours = model.encoder.layers[last].layer_norm1.weight.detach().float().cpu()
    theirs = text[f"{_BLOCK}{last}.ln_1.weight"].float()
    # fp16 copies of one model differ by rounding only.
    if ours.shape != theirs.shape or not torch.allclose(ours, theirs, rtol=1e-2, atol=1e-3):
        raise ModelError(f"{checkpoint} is another CLIP than this text encoder: block {last + 1} differs")
