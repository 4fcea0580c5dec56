"""A UNet split at its middle block: encode returns the H-space feature h, decode takes it or another one.

The forward of diffusers can add to the middle block's output only together with ControlNet residuals, and Δh of Eq. 5
depends on h. So the forward is written out here, over the model's modules and in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ragturbo.errors import InvalidRequest, ModelError
from ragturbo.model.networks.library_class import become_library_class, is_one_of
from ragturbo.model.tokens import to_tokens

# Arguments of UNet2DConditionModel.forward that are not supported, and what to do instead.
_REFUSED = {
    "down_block_additional_residuals": "ControlNet residuals are not supported; run diffusers' pipeline instead",
    "mid_block_additional_residual": "change h between encode and decode instead",
    "down_intrablock_additional_residuals": "T2I-Adapter residuals are not supported; run diffusers' pipeline instead",
}


@dataclass(frozen=True)
class UNetState:
    """The input of decode."""

    h: Tensor
    """(B, C, h, w): the output of the middle block."""
    skips: tuple[Tensor, ...]
    """In the order of their computation, conv_in's first."""
    emb: Tensor
    """(B, E): the time embedding with all added conditions."""
    attention: Mapping[str, Any]
    """The keyword arguments of blocks with cross-attention: text states (B, L, D), masks and processors' options."""
    forward_upsample_size: bool
    """Whether upsampling needs the size of the next skip, because doubling would give another size."""


class HSpaceUNet:
    """A view over a UNet2DConditionModel of diffusers, or of `networks`, without copies or hooks. LoRA, FreeU and
    checkpointing still work."""

    def __init__(self, unet: Any) -> None:
        # peft wraps the model, which it has changed in place.
        model: Any = unet.get_base_model() if hasattr(unet, "get_base_model") else unet
        if not is_one_of(model, "UNet2DConditionModel"):
            raise ModelError(f"HSpaceUNet takes a UNet2DConditionModel of diffusers, not {type(model).__name__}")
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
        """D of the text states."""
        config = self.unet.config
        widths = config.cross_attention_dim
        widths = {widths} if isinstance(widths, int) else set(widths)
        if config.encoder_hid_dim is None and len(widths) != 1:
            raise ModelError(f"the UNet's cross_attention_dim differs between its blocks: {config.cross_attention_dim}")
        return config.encoder_hid_dim or widths.pop()

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """(h, w) of the H-space feature of latents of size (height, width)."""
        for block in self.unet.down_blocks:
            for _ in block.downsamplers or ():
                # A stride-2 convolution rounds up if padded on both sides, and down if padded on one side.
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
        """f_enc: the down blocks and the middle block.

        Args:
            sample: (B, c, H, W), scaled for the timestep.
            timestep: a number, or a tensor (B,), (1,) or (), preferably on the device; no form needs a synchronization.
            text: (B, L, D).
            The others are those of UNet2DConditionModel.forward.

        Raises:
            ModelError: for arguments that are not supported, such as ControlNet residuals.
        """
        _check_refused(refused, cross_attention_kwargs or {})
        unet = self.unet
        conditions = class_labels, timestep_cond, cross_attention_kwargs, added_cond_kwargs
        if any(condition is not None for condition in conditions):
            # `networks` have no other condition than the text.
            become_library_class(unet)
        kind = unet.config.addition_embed_type
        if kind not in (None, "text") and added_cond_kwargs is None:
            raise InvalidRequest(f"this UNet (addition_embed_type={kind!r}) needs added_cond_kwargs")
        upsampling = 2**unet.num_upsamplers
        forward_upsample_size = any(side % upsampling for side in sample.shape[-2:])
        dtype = sample.dtype
        if unet.config.center_input_sample:
            sample = 2 * sample - 1.0

        emb, hint = self._embed(sample, timestep, text, timestep_cond, class_labels, added_cond_kwargs)
        if hint is not None:
            sample = torch.cat([sample, hint], dim=1)
        text = unet.process_encoder_hidden_states(encoder_hidden_states=text, added_cond_kwargs=added_cond_kwargs)
        attention = {
            "encoder_hidden_states": text,
            "attention_mask": _bias(attention_mask, dtype),
            "cross_attention_kwargs": cross_attention_kwargs,
            "encoder_attention_mask": _bias(encoder_attention_mask, dtype),
        }

        sample = unet.conv_in(sample)
        skips: tuple[Tensor, ...] = (sample,)
        for block in unet.down_blocks:
            sample, residuals = block(hidden_states=sample, temb=emb, **(attention if _attends(block) else {}))
            skips += residuals
        h = unet.mid_block(sample, emb, **(attention if _attends(unet.mid_block) else {}))
        return UNetState(h, skips, emb, attention, forward_upsample_size)

    def decode(self, state: UNetState, h: Tensor | None = None) -> Tensor:
        """f_dec: the up blocks. `h` (B, C, h, w) replaces state.h; decode(encode(x)) equals the model's own forward."""
        unet = self.unet
        sample = state.h if h is None else h
        if sample.shape != state.h.shape:
            raise InvalidRequest(f"decode needs an h of {tuple(state.h.shape)}, got {tuple(sample.shape)}")
        skips = state.skips
        upsample_size = None
        for i, block in enumerate(unet.up_blocks):
            skips, residuals = skips[: -len(block.resnets)], skips[-len(block.resnets) :]
            if state.forward_upsample_size and i < len(unet.up_blocks) - 1:
                upsample_size = skips[-1].shape[2:]
            sample = block(
                hidden_states=sample,
                temb=state.emb,
                res_hidden_states_tuple=residuals,
                upsample_size=upsample_size,
                **(state.attention if _attends(block) else {}),
            )
        if unet.conv_norm_out is not None:
            sample = unet.conv_act(unet.conv_norm_out(sample))
        return unet.conv_out(sample)

    def retrieval_features(self, latents: Tensor, text: Tensor, **conditions: Any) -> Tensor:
        """h_retr of Sec. 3.2: clean latents, encoded at t = 0 with their caption -> tokens (B, T, C)."""
        timestep = torch.zeros(1, dtype=torch.int64, device=latents.device)
        return to_tokens(self.encode(latents, timestep, text, **conditions).h)

    def _embed(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        text: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        class_labels: Tensor | None = None,
        added_cond_kwargs: Mapping[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The time embedding with all added conditions, and the hint image of models that have one."""
        unet = self.unet
        if not torch.is_tensor(timestep):
            # A fill does not synchronize, unlike a copy from the host. The dtypes are those of diffusers.
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


def _check_refused(arguments: Mapping[str, Any], cross_attention_kwargs: Mapping[str, Any]) -> None:
    for name, value in arguments.items():
        if name not in _REFUSED:
            raise TypeError(f"HSpaceUNet.encode has no argument {name!r}")
        if value is not None:
            raise ModelError(f"{name}: {_REFUSED[name]}")
    if "scale" in cross_attention_kwargs:
        raise ModelError("a LoRA scale per call is not supported: scale the loaded LoRA's weights instead")
    if "gligen" in cross_attention_kwargs:
        raise ModelError("GLIGEN is not supported; run diffusers' pipeline instead")


def _attends(block: torch.nn.Module) -> bool:
    return bool(getattr(block, "has_cross_attention", False))


def _bias(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """(B, L), 1 to keep -> (B, 1, L), to be added to the attention scores; bit for bit as in diffusers."""
    return None if mask is None else ((1 - mask.to(dtype)) * -10000.0).unsqueeze(1)
