"""The H-space adapter g of Eqs. 4-5: cross-attention from the target's tokens to the retrieved ones.

Kind "transformer" is the paper's 36M block: diffusers' Transformer2DModel of one layer with linear projections, under
its parameter names, without its outer residual, and with a proj_out that starts at zero. Kind "attention" is Eq. 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn
from torch.nn import functional as F

from ragturbo.errors import InvalidRequest, ModelError
from ragturbo.model.weights import open_safetensors, write_safetensors
from ragturbo.ops import adapter as ops
from ragturbo.ops import cross_attention, dispatch, scaled_residual

FILE = "adapter.safetensors"
VERSION = "1"
KINDS = ("transformer", "attention")
_HEAD_WIDTH = 64
_NORM_GROUPS = 32


@dataclass(frozen=True)
class RetrievedKV:
    """The retrieval branch's part of the adapter: K and V (B, k, S, C). It depends on h_retr alone."""

    k: Tensor
    v: Tensor


class HSpaceAdapter(nn.Module):
    """h_tgt + λ·g(h_tgt, h_retr) on tokens; the identity until it is trained."""

    def __init__(self, channels: int = 1280, heads: int | None = None, kind: str = "transformer") -> None:
        super().__init__()
        if kind not in KINDS:
            raise ModelError(f"adapter kind {kind!r}; known: {', '.join(KINDS)}")
        heads = default_heads(channels) if heads is None else heads
        if channels < 1 or heads < 1 or channels % heads:
            raise ModelError(f"an adapter of {channels} channels does not divide into {heads} heads")
        self.channels, self.heads, self.kind = channels, heads, kind
        if kind == "transformer":
            self.norm = nn.GroupNorm(norm_groups(channels), channels, eps=1e-6)
            self.proj_in = nn.Linear(channels, channels)
            self.transformer_blocks = nn.ModuleList(
                [BasicTransformerBlock(channels, heads, channels // heads, cross_attention_dim=channels)]
            )
            self.proj_out = nn.Linear(channels, channels)
        else:
            self.to_q = nn.Linear(channels, channels, bias=False)
            self.to_k = nn.Linear(channels, channels, bias=False)
            self.to_v = nn.Linear(channels, channels, bias=False)
            self.proj_out = nn.Linear(channels, channels)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)

    def forward(
        self, h_tgt: Tensor, h_retr: Tensor | RetrievedKV, lam: Tensor, valid: Tensor | None = None, impl: str = "auto"
    ) -> Tensor:
        """Eq. 5. h_tgt: (B, T, C); h_retr: (B, k, S, C) or its K and V; lam: (B,); valid: (B, k) bool -> (B, T, C).

        λ is 0 where no neighbour is valid, and there the result is h_tgt bit for bit. impl: "triton" and "reference"
        are the fused ops and their fp32 oracle; the others name the attention in torch's own layers, which train.
        """
        self._check(h_tgt, h_retr, lam, valid)
        kv = h_retr if isinstance(h_retr, RetrievedKV) else self.retrieved_kv(h_retr, impl)
        if valid is not None:
            lam = torch.where(valid.any(-1), lam, torch.zeros_like(lam))
        fused = self._fused(h_tgt, impl)
        if fused is None:
            residual = impl if impl in ("auto", "reference") else "auto"
            return scaled_residual(h_tgt, self.delta(h_tgt, kv, valid, impl), lam, impl=residual)
        weights = dict(self.named_parameters())
        if self.kind == "attention":
            return ops.attention_adapter(h_tgt, kv.k, kv.v, lam, valid, weights, heads=self.heads, impl=fused)
        return ops.transformer_adapter(
            h_tgt, kv.k, kv.v, lam, valid, weights, heads=self.heads, groups=self.norm.num_groups, impl=fused
        )

    def retrieved_kv(self, h_retr: Tensor, impl: str = "auto") -> RetrievedKV:
        """h_retr: (B, k, S, C) -> K and V of Eq. 4. Needs no target: it can run beside the UNet's encoder."""
        attention = self._block.attn2 if self.kind == "transformer" else self
        h_retr = h_retr.to(attention.to_k.weight.dtype)
        fused = self._fused(h_retr, impl)
        if fused is None:
            return RetrievedKV(attention.to_k(h_retr), attention.to_v(h_retr))
        return RetrievedKV(*ops.retrieved_kv(h_retr, attention.to_k.weight, attention.to_v.weight, impl=fused))

    def delta(self, h_tgt: Tensor, kv: RetrievedKV, valid: Tensor | None = None, impl: str = "auto") -> Tensor:
        """g(h_tgt, h_retr), without λ and without the residual: (B, T, C). Finite also where nothing is valid."""
        if self.kind == "attention":
            attended = cross_attention(self.to_q(h_tgt), kv.k, kv.v, valid, heads=self.heads, impl=impl)
            return self.proj_out(attended)
        block = self._block
        # GroupNorm wants channels second; the tokens are the memory of a channels_last image.
        x = self.proj_in(self.norm(h_tgt.transpose(1, 2)).transpose(1, 2))
        normed = block.norm1(x)
        own = block.attn1
        q, k, v = (split_heads(project(normed), self.heads) for project in (own.to_q, own.to_k, own.to_v))
        x = x + own.to_out[0](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        q = block.attn2.to_q(block.norm2(x))
        x = x + block.attn2.to_out[0](cross_attention(q, kv.k, kv.v, valid, heads=self.heads, impl=impl))
        x = x + block.ff(block.norm3(x))
        return self.proj_out(x)

    def _fused(self, x: Tensor, impl: str) -> str | None:
        """Which of the fused ops' implementations runs; None for torch's own layers."""
        if impl == "reference":
            return impl
        learning = torch.is_grad_enabled() and (x.requires_grad or self.proj_out.weight.requires_grad)
        if impl == "triton":
            if learning:
                raise InvalidRequest("the adapter's kernels have no backward pass: train with impl='auto'")
            return impl
        if impl != "auto" or learning:
            return None
        return "triton" if dispatch.choose("linear", "auto", x.device.type, x.dtype) == "triton" else None

    @property
    def _block(self) -> Any:
        return self.transformer_blocks[0]

    def _check(self, h_tgt: Tensor, h_retr: Tensor | RetrievedKV, lam: Tensor, valid: Tensor | None) -> None:
        rows = h_retr.k if isinstance(h_retr, RetrievedKV) else h_retr
        if h_tgt.ndim != 3 or rows.ndim != 4 or rows.shape[0] != h_tgt.shape[0]:
            raise InvalidRequest(
                "the adapter takes h_tgt (B, T, C) and h_retr (B, k, S, C): "
                f"got {tuple(h_tgt.shape)}, {tuple(rows.shape)}"
            )
        if h_tgt.shape[-1] != self.channels or rows.shape[-1] != self.channels:
            raise ModelError(
                f"an adapter of width {self.channels} got features of width {h_tgt.shape[-1]} (target) "
                f"and {rows.shape[-1]} (retrieved)"
            )
        if lam.shape != h_tgt.shape[:1]:
            raise InvalidRequest(f"lam has shape {tuple(lam.shape)}, one λ a sample is ({h_tgt.shape[0]},)")
        if valid is not None and valid.shape != rows.shape[:2]:
            raise InvalidRequest(f"valid is {tuple(valid.shape)}, one flag a neighbour is {tuple(rows.shape[:2])}")

    def save(self, folder: str | Path) -> None:
        """Writes adapter.safetensors into `folder`."""
        metadata = {"version": VERSION, "kind": self.kind, "channels": str(self.channels), "heads": str(self.heads)}
        write_safetensors(Path(folder) / FILE, self.state_dict(), metadata)

    @classmethod
    def load(cls, path: str | Path, channels: int | None = None) -> HSpaceAdapter:
        """From adapter.safetensors or its folder. `channels`: the width of h it must have, where that is known."""
        path = Path(path) / FILE if Path(path).is_dir() else Path(path)
        with open_safetensors(path) as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}
        if metadata.get("version") != VERSION:
            raise ModelError(
                f"{path} is not an adapter this ragturbo reads: "
                f"its version is {metadata.get('version')!r}, not {VERSION!r}"
            )
        try:
            width, heads, kind = int(metadata["channels"]), int(metadata["heads"]), metadata["kind"]
        except (KeyError, ValueError) as error:
            raise ModelError(f"{path} does not say what adapter it is: {error}") from error
        if channels is not None and width != channels:
            raise ModelError(f"{path} is an adapter of width {width}; the model's H-space has {channels} channels")
        # The meta device makes no weights that the next line would throw away.
        with torch.device("meta"):
            adapter = cls(width, heads, kind)
        try:
            adapter.load_state_dict(state, assign=True)
        except RuntimeError as error:
            raise ModelError(f"{path} does not hold the weights of a {adapter.kind!r} adapter: {error}") from error
        return adapter


def default_heads(channels: int) -> int:
    """Heads of 64 channels, as in SD 2 (20 at 1280), or the widest number of heads below that divides."""
    most = max(1, channels // _HEAD_WIDTH)
    return next(heads for heads in range(most, 0, -1) if channels % heads == 0)


def norm_groups(channels: int) -> int:
    """32, as everywhere in the UNet, or the largest number below that divides into groups of at least two channels."""
    # A group of one channel would subtract that channel's mean: of a single token, everything.
    most = min(_NORM_GROUPS, max(1, channels // 2))
    return next(groups for groups in range(most, 0, -1) if channels % groups == 0)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, L, C) -> (B, heads, L, d)"""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)
