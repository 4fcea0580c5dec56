"""The H-space adapter g of Eqs. 4-5: cross-attention from the target's tokens to the retrieved ones.

Kind "transformer" is the paper's 36M block: diffusers' Transformer2DModel of one layer with linear projections, under
its parameter names, without its outer residual, and with a proj_out that starts at zero. Kind "attention" is Eq. 4.

With phrase embeddings, which the paper does not have, row i of a table is added to the features of the neighbours of a
prompt's i-th phrase, so that the adapter can tell which neighbour belongs to which thing. The neighbours of a whole
prompt, or of its only phrase, get none.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ragturbo.errors import InvalidRequest, ModelError
from ragturbo.model.find import ADAPTER as FILE
from ragturbo.model.info import ADAPTER_KINDS
from ragturbo.model.networks.skeleton import Skeleton
from ragturbo.model.networks.transformer import BasicTransformerBlock
from ragturbo.model.tokens import sdpa
from ragturbo.model.weights import read_safetensors, write_safetensors
from ragturbo.ops import adapter as ops
from ragturbo.ops import cross_attention, dispatch, scaled_residual

_VERSION = "1"
_HEAD_WIDTH = 64
_NORM_GROUPS = 32


@dataclass(frozen=True)
class RetrievedKV:
    """The adapter's keys and values of the retrieved features: K and V (B, k, S, C). They depend on h_retr alone."""

    k: Tensor
    v: Tensor

    def weighted(self, lam: Tensor) -> tuple[RetrievedKV, Tensor]:
        """λ of each neighbour (B, k) as V scaled by λ_i / max λ, and max λ (B,) for Eq. 5. Equal λs keep V's bits."""
        if lam.shape[1] == 1:
            return self, lam[:, 0]
        most = lam.amax(-1)
        share = torch.where(lam == most[:, None], 1.0, lam / most[:, None])
        # Copied as well, because the kernels take K and V of equal strides.
        return RetrievedKV(self.k.contiguous(), self.v * share.to(self.v.dtype)[..., None, None]), most


class HSpaceAdapter(nn.Module):
    """h_tgt + λ·g(h_tgt, h_retr) on tokens; the identity until it is trained."""

    def __init__(
        self, channels: int = 1280, heads: int | None = None, kind: str = "transformer", phrases: int = 0
    ) -> None:
        """phrases: rows of the table of phrase embeddings, 0 for none."""
        super().__init__()
        if kind not in ADAPTER_KINDS:
            raise ModelError(f"adapter kind {kind!r}; known: {', '.join(ADAPTER_KINDS)}")
        heads = default_heads(channels) if heads is None else heads
        if channels < 1 or heads < 1 or channels % heads:
            raise ModelError(f"an adapter of {channels} channels cannot be divided into {heads} heads")
        self.channels, self.heads, self.kind = channels, heads, kind
        if kind == "transformer":
            self.norm = nn.GroupNorm(norm_groups(channels), channels, eps=1e-6)
            self.proj_in = nn.Linear(channels, channels)
            self.transformer_blocks = nn.ModuleList(
                [BasicTransformerBlock(channels, heads, channels // heads, channels)]
            )
        else:
            self.to_q = nn.Linear(channels, channels, bias=False)
            self.to_k = nn.Linear(channels, channels, bias=False)
            self.to_v = nn.Linear(channels, channels, bias=False)
        self.phrase = nn.Parameter(torch.zeros(phrases, channels)) if phrases else None
        self.proj_out = nn.Linear(channels, channels)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)

    def forward(
        self,
        h_tgt: Tensor,
        h_retr: Tensor | RetrievedKV,
        lam: Tensor,
        valid: Tensor | None = None,
        impl: str = "auto",
        phrases: Tensor | None = None,
    ) -> Tensor:
        """Eq. 5.

        Args:
            h_tgt: (B, T, C).
            h_retr: (B, k, S, C), or its keys and values.
            lam: (B,), or of each neighbour, (B, k).
            valid: (B, k) bool, None for all. A sample without a valid neighbour keeps h_tgt bit for bit.
            impl: "triton" and "reference" are the fused ops and their fp32 reference; other names select the attention
                in torch's own layers, which can be trained.
            phrases: as `retrieved_kv`.
        """
        self._check(h_tgt, h_retr, lam, valid)
        kv = h_retr if isinstance(h_retr, RetrievedKV) else self.retrieved_kv(h_retr, impl, phrases)
        if lam.ndim == 2:
            kv, lam = kv.weighted(lam if valid is None else torch.where(valid, lam, 0.0))
        if valid is not None:
            lam = torch.where(valid.any(-1), lam, torch.zeros_like(lam))
        fused = self._fused(h_tgt, impl)
        if fused is None:
            residual = impl if impl in ("auto", "reference") else "auto"
            return scaled_residual(h_tgt, self.delta(h_tgt, kv, valid, impl), lam, impl=residual)
        arguments = h_tgt, kv.k, kv.v, lam, valid, dict(self.named_parameters())
        if self.kind == "attention":
            return ops.attention_adapter(*arguments, heads=self.heads, impl=fused)
        return ops.transformer_adapter(*arguments, heads=self.heads, groups=self.norm.num_groups, impl=fused)

    def retrieved_kv(self, h_retr: Tensor, impl: str = "auto", phrases: Tensor | None = None) -> RetrievedKV:
        """h_retr: (B, k, S, C) -> K and V of Eq. 4. Independent of the target: it can run beside the UNet's encoder.

        phrases: (B, P) bool, which of P phrases each prompt has. Each has k / P neighbours, those of the first one
            first. None: the neighbours are those of whole prompts.
        """
        attention = self._block.attn2 if self.kind == "transformer" else self
        h_retr = h_retr.to(attention.to_k.weight.dtype)
        if self.phrase is not None and phrases is not None:
            h_retr = h_retr + self._phrase_rows(phrases, h_retr.shape[1]).to(h_retr.dtype)[:, :, None]
        fused = self._fused(h_retr, impl)
        if fused is None:
            return RetrievedKV(attention.to_k(h_retr), attention.to_v(h_retr))
        return RetrievedKV(*ops.retrieved_kv(h_retr, attention.to_k.weight, attention.to_v.weight, impl=fused))

    def _phrase_rows(self, phrases: Tensor, k: int) -> Tensor:
        """phrases: (B, P) bool -> the embeddings of k neighbours, (B, k, C), 0 for prompts with one phrase."""
        assert self.phrase is not None
        # Phrases beyond the table's end get its last row.
        rows = [min(i * phrases.shape[1] // k, len(self.phrase) - 1) for i in range(k)]
        table = torch.cat([self.phrase[row : row + 1] for row in rows])
        return torch.where((phrases.sum(1) > 1)[:, None, None], table, 0.0)

    def delta(self, h_tgt: Tensor, kv: RetrievedKV, valid: Tensor | None = None, impl: str = "auto") -> Tensor:
        """g(h_tgt, h_retr), without λ and residual: (B, T, C). Finite even for samples without a valid neighbour."""
        if self.kind == "attention":
            attended = cross_attention(self.to_q(h_tgt), kv.k, kv.v, valid, heads=self.heads, impl=impl)
            return self.proj_out(attended)
        block = self._block
        # GroupNorm needs channels second; the transposed tokens have the memory of a channels_last image.
        x = self.proj_in(self.norm(h_tgt.transpose(1, 2)).transpose(1, 2))
        own, normed = block.attn1, block.norm1(x)
        x = x + own.to_out[0](sdpa(own.to_q(normed), own.to_k(normed), own.to_v(normed), self.heads))
        q = block.attn2.to_q(block.norm2(x))
        x = x + block.attn2.to_out[0](cross_attention(q, kv.k, kv.v, valid, heads=self.heads, impl=impl))
        x = x + block.ff(block.norm3(x))
        return self.proj_out(x)

    def _fused(self, x: Tensor, impl: str) -> str | None:
        """The implementation of the fused ops to use; None for torch's own layers."""
        if impl == "reference":
            return impl
        training = torch.is_grad_enabled() and (x.requires_grad or self.proj_out.weight.requires_grad)
        if impl == "triton":
            if training:
                raise InvalidRequest("the adapter's kernels have no backward pass: train with impl='auto'")
            return impl
        if impl != "auto" or training:
            return None
        return "triton" if dispatch.choose("linear", "auto", x.device.type, x.dtype) == "triton" else None

    @property
    def _block(self) -> Any:
        return self.transformer_blocks[0]

    def _check(self, h_tgt: Tensor, h_retr: Tensor | RetrievedKV, lam: Tensor, valid: Tensor | None) -> None:
        rows = h_retr.k if isinstance(h_retr, RetrievedKV) else h_retr
        if h_tgt.ndim != 3 or rows.ndim != 4 or rows.shape[0] != h_tgt.shape[0]:
            shapes = f"{tuple(h_tgt.shape)} and {tuple(rows.shape)}"
            raise InvalidRequest(f"the adapter needs h_tgt (B, T, C) and h_retr (B, k, S, C), got {shapes}")
        if h_tgt.shape[-1] != self.channels or rows.shape[-1] != self.channels:
            widths = f"{h_tgt.shape[-1]} (target) and {rows.shape[-1]} (retrieved)"
            raise ModelError(f"an adapter of width {self.channels} got features of width {widths}")
        if lam.shape not in (h_tgt.shape[:1], rows.shape[:2]):
            shapes = f"({h_tgt.shape[0]},) or {tuple(rows.shape[:2])}"
            raise InvalidRequest(f"lam must have shape {shapes}, got {tuple(lam.shape)}")
        if valid is not None and valid.shape != rows.shape[:2]:
            raise InvalidRequest(f"valid must have shape {tuple(rows.shape[:2])}, got {tuple(valid.shape)}")

    def save(self, folder: str | Path) -> None:
        """Write adapter.safetensors into `folder`."""
        metadata = {"version": _VERSION, "kind": self.kind, "channels": str(self.channels), "heads": str(self.heads)}
        if self.phrase is not None:
            metadata["phrases"] = str(len(self.phrase))
        write_safetensors(Path(folder) / FILE, self.state_dict(), metadata)

    @classmethod
    def load(cls, path: str | Path, channels: int | None = None) -> HSpaceAdapter:
        """Load adapter.safetensors, given as a file or by its folder. channels: the width to require, if any."""
        path = Path(path) / FILE if Path(path).is_dir() else Path(path)
        state, metadata = read_safetensors(path, with_metadata=True)
        if (version := metadata.get("version")) != _VERSION:
            raise ModelError(f"{path} is not an adapter, or not of version {_VERSION!r}: its version is {version!r}")
        try:
            width, heads, kind = int(metadata["channels"]), int(metadata["heads"]), metadata["kind"]
            phrases = int(metadata.get("phrases", 0))
        except (KeyError, ValueError) as error:
            raise ModelError(f"the metadata of {path} does not describe an adapter: {error}") from error
        if channels is not None and width != channels:
            raise ModelError(f"{path} is an adapter of width {width}; the model's H-space has {channels} channels")
        with Skeleton():
            adapter = cls(width, heads, kind, phrases)
        try:
            adapter.load_state_dict(state, assign=True)
        except RuntimeError as error:
            raise ModelError(f"{path} does not hold the weights of an adapter of kind {kind!r}: {error}") from error
        return adapter


def default_heads(channels: int) -> int:
    """The largest number of heads of at least 64 channels that divides `channels`: 20 for 1280, as in SD 2."""
    return _largest_divisor(channels, max(1, channels // _HEAD_WIDTH))


def norm_groups(channels: int) -> int:
    """32 as in the UNet, or the next lower number that divides into groups of at least two channels."""
    # With one channel per group and a single token, GroupNorm would subtract the value itself.
    return _largest_divisor(channels, min(_NORM_GROUPS, max(1, channels // 2)))


def _largest_divisor(channels: int, most: int) -> int:
    return next(n for n in range(most, 0, -1) if channels % n == 0)
