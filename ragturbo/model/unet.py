"""A diffusers UNet split at its middle block: encode gives the H-space feature h, decode takes it (or another) back.

diffusers only adds to the middle block's output together with ControlNet residuals, and Δh of Eq. 5 depends on h: so
the forward is split here, over the model's own modules and in its own order, rather than hooked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from ragturbo.errors import InvalidRequest, ModelError

# Conditions of UNet2DConditionModel.forward that do not exist on a split forward, and what to do instead.
_REFUSED = {
    "down_block_additional_residuals": "ControlNet residuals are not supported; run diffusers' pipeline instead",
    "mid_block_additional_residual": "change h between encode and decode instead",
    "down_intrablock_additional_residuals": "T2I-Adapter residuals are not supported; run diffusers' pipeline instead",
}


@dataclass(frozen=True)
class UNetState:
    """What decode needs: h (B, C, h, w), the skips in the order they were made (conv_in first), and the conditions."""

    h: Tensor
    skips: tuple[Tensor, ...]
    emb: Tensor
    """(B, E): the time embedding with every added condition."""
    text: Any
    """(B, L, D) hidden states as the blocks take them: after the model's own projection, if it has one."""
    attention_mask: Tensor | None = None
    encoder_attention_mask: Tensor | None = None
    cross_attention_kwargs: Mapping[str, Any] | None = None
    forward_upsample_size: bool = False


class HSpaceUNet:
    """A view over a diffusers UNet2DConditionModel: no copies, no hooks. LoRA, FreeU and checkpointing still work."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        # peft's wrapper hides the model it has changed in place.
        model: Any = unet.get_base_model() if hasattr(unet, "get_base_model") else unet
        # As a bool: narrowed to diffusers' class, its configured attributes would be unknown to a type checker.
        known = isinstance(model, UNet2DConditionModel)
        if not known:
            raise ModelError(f"HSpaceUNet is a view over diffusers' UNet2DConditionModel, not {type(model).__name__}")
        self.unet: Any = model
        if self.unet.mid_block is None:
            raise ModelError("this UNet has no middle block (mid_block_type is None), so it has no H-space")
        if getattr(self.unet, "position_net", None) is not None:
            raise ModelError(f"GLIGEN UNets (attention_type={self.unet.config.attention_type!r}) are not supported")

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.conv_in.weight.dtype

    @property
    def channels(self) -> int:
        """C of h."""
        return self.unet.config.block_out_channels[-1]

    @property
    def text_width(self) -> int:
        """D of the text states the UNet takes."""
        config = self.unet.config
        return config.encoder_hid_dim or _single(config.cross_attention_dim, "cross_attention_dim")

    @property
    def downsampling(self) -> int:
        """Latent cells a cell of h, along each side."""
        return 2 ** sum(len(block.downsamplers or ()) for block in self.unet.down_blocks)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """(h, w) of the H-space feature of latents of (height, width)."""
        for block in self.unet.down_blocks:
            for _ in block.downsamplers or ():
                # A stride-2 convolution padded on both sides rounds up; padded on one side, it rounds down.
                up = self.unet.config.downsample_padding
                height, width = (height + up) // 2, (width + up) // 2
        return height, width

    def encode(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        text: Tensor,
        *,
        class_labels: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
        encoder_attention_mask: Tensor | None = None,
        **refused: Any,
    ) -> UNetState:
        """f_enc: the down blocks and the middle block. sample: (B, c, H, W), scaled for the timestep; text: (B, L, D).

        Everything is in the words of UNet2DConditionModel.forward. A timestep that is a tensor is used as it is: (B,),
        (1,) or (), best on the device; a Python number becomes one there without a synchronisation.
        """
        self._check_conditions(refused, cross_attention_kwargs, added_cond_kwargs)
        unet = self.unet
        upsampling = 2**unet.num_upsamplers
        forward_upsample_size = any(side % upsampling for side in sample.shape[-2:])
        attention_mask = _bias(attention_mask, sample.dtype)
        encoder_attention_mask = _bias(encoder_attention_mask, sample.dtype)
        if unet.config.center_input_sample:
            sample = 2 * sample - 1.0

        emb, hint = self._embed(sample, timestep, text, timestep_cond, class_labels, added_cond_kwargs)
        if hint is not None:
            sample = torch.cat([sample, hint], dim=1)
        text = unet.process_encoder_hidden_states(encoder_hidden_states=text, added_cond_kwargs=added_cond_kwargs)
        attention = {
            "encoder_hidden_states": text,
            "attention_mask": attention_mask,
            "cross_attention_kwargs": cross_attention_kwargs,
            "encoder_attention_mask": encoder_attention_mask,
        }

        sample = unet.conv_in(sample)
        skips: tuple[Tensor, ...] = (sample,)
        for block in unet.down_blocks:
            sample, residuals = block(hidden_states=sample, temb=emb, **(attention if _attends(block) else {}))
            skips += residuals
        h = unet.mid_block(sample, emb, **(attention if _attends(unet.mid_block) else {}))
        return UNetState(
            h, skips, emb, text, attention_mask, encoder_attention_mask, cross_attention_kwargs, forward_upsample_size
        )

    def decode(self, state: UNetState, h: Tensor | None = None) -> Tensor:
        """f_dec: the up blocks. `h` (B, C, h, w) takes the place of state.h; decode(encode(x)) is the model's own."""
        unet = self.unet
        sample = state.h if h is None else h
        if sample.shape != state.h.shape:
            raise InvalidRequest(f"decode takes an h of {tuple(state.h.shape)}, got {tuple(sample.shape)}")
        attention = {
            "encoder_hidden_states": state.text,
            "attention_mask": state.attention_mask,
            "cross_attention_kwargs": state.cross_attention_kwargs,
            "encoder_attention_mask": state.encoder_attention_mask,
        }
        skips = state.skips
        upsample_size = None
        for i, block in enumerate(unet.up_blocks):
            skips, residuals = skips[: -len(block.resnets)], skips[-len(block.resnets) :]
            # Odd grids: the upsampling must meet the next skip's size, which doubling would miss.
            if state.forward_upsample_size and i < len(unet.up_blocks) - 1:
                upsample_size = skips[-1].shape[2:]
            sample = block(
                hidden_states=sample,
                temb=state.emb,
                res_hidden_states_tuple=residuals,
                upsample_size=upsample_size,
                **(attention if _attends(block) else {}),
            )
        if unet.conv_norm_out is not None:
            sample = unet.conv_act(unet.conv_norm_out(sample))
        return unet.conv_out(sample)

    def retrieval_features(self, latents: Tensor, text: Tensor, **conditions: Any) -> Tensor:
        """h_retr of Sec. 3.2: clean latents at t = 0, encoded with their own caption -> tokens (B, T, C)."""
        timestep = torch.zeros(1, dtype=torch.int64, device=latents.device)
        return to_tokens(self.encode(latents, timestep, text, **conditions).h)

    def _check_conditions(
        self,
        refused: Mapping[str, Any],
        cross_attention_kwargs: Mapping[str, Any] | None,
        added_cond_kwargs: Mapping[str, Any] | None,
    ) -> None:
        for name, value in refused.items():
            if name not in _REFUSED:
                raise TypeError(f"HSpaceUNet.encode has no argument {name!r}")
            if value is not None:
                raise ModelError(f"{name}: {_REFUSED[name]}")
        if cross_attention_kwargs and "scale" in cross_attention_kwargs:
            raise ModelError("a LoRA scale per call is not supported: set it on the loaded LoRA's weights")
        if cross_attention_kwargs and "gligen" in cross_attention_kwargs:
            raise ModelError("GLIGEN is not supported; run diffusers' pipeline instead")
        kind = self.unet.config.addition_embed_type
        if kind not in (None, "text") and added_cond_kwargs is None:
            raise InvalidRequest(f"this UNet (addition_embed_type={kind!r}) needs added_cond_kwargs")

    def _embed(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        text: Tensor,
        timestep_cond: Tensor | None,
        class_labels: Tensor | None,
        added_cond_kwargs: Mapping[str, Any] | None,
    ) -> tuple[Tensor, Tensor | None]:
        """The time embedding with all added conditions, and the hint image of models that take one."""
        unet = self.unet
        if not torch.is_tensor(timestep):
            # A fill, not a copy from the host. The types are the ones diffusers takes, for the same bits.
            dtype = torch.float64 if isinstance(timestep, float) else torch.int64
            timestep = torch.full((1,), timestep, dtype=dtype, device=sample.device)
        emb = unet.time_embedding(unet.get_time_embed(sample=sample, timestep=timestep), timestep_cond)
        class_emb = unet.get_class_embed(sample=sample, class_labels=class_labels)
        if class_emb is not None:
            emb = torch.cat([emb, class_emb], dim=-1) if unet.config.class_embeddings_concat else emb + class_emb
        aug_emb = unet.get_aug_embed(emb=emb, encoder_hidden_states=text, added_cond_kwargs=added_cond_kwargs)
        hint = None
        if unet.config.addition_embed_type == "image_hint":
            aug_emb, hint = aug_emb
        if aug_emb is not None:
            emb = emb + aug_emb
        if unet.time_embed_act is not None:
            emb = unet.time_embed_act(emb)
        return emb, hint


def to_tokens(h: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h·w, C): a view, contiguous where h is channels_last."""
    return h.permute(0, 2, 3, 1).flatten(1, 2)


def from_tokens(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, h·w, C) -> (B, C, h, w): a view, channels_last where the tokens are contiguous."""
    return tokens.unflatten(1, grid).permute(0, 3, 1, 2)


def _attends(block: torch.nn.Module) -> bool:
    return bool(getattr(block, "has_cross_attention", False))


def _bias(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """(B, L) with 1 = keep -> (B, 1, L) to be added to attention scores, in diffusers' own words and bits."""
    return None if mask is None else ((1 - mask.to(dtype)) * -10000.0).unsqueeze(1)


def _single(value: int | tuple[int, ...], name: str) -> int:
    widths = {value} if isinstance(value, int) else set(value)
    if len(widths) != 1:
        raise ModelError(f"the UNet's {name} differs between its blocks: {value}")
    return widths.pop()
