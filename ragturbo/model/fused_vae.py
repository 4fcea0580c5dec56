"""A VAE's decoder with fewer launches and fewer bytes: the same maths over the same weights.

A convolution on a GPU adds its bias in a launch of its own, which reads and writes the whole map: here the ResNet block
behind it adds it, for nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ragturbo.model.fused import NormAct, Resnet, attend
from ragturbo.model.ties import Replaced, Ties, sharing_copy
from ragturbo.model.unet import from_tokens, to_tokens
from ragturbo.model.vae import VAE
from ragturbo.ops import bias_residual, group_norm, interleave, softmax, upsample

# Torch's flash kernels end at heads of 256; its other kernel takes three times as long as two products and a softmax.
_FLASH_WIDTH = 256
# Queries of one image: with fewer torch's kernel is fast enough, with more the scores take more than 0.4 GB.
_PRODUCTS = range(1024, 8192 + 1)


class Conv(nn.Module):
    """A convolution whose bias the block behind it adds."""

    def __init__(self, ties: Ties, path: str, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.padding = ties.weight(path), conv.padding

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, padding=self.padding)


class Upsample(nn.Module):
    """Upsample2D: nearest by two and a 3x3 convolution. biased: False where the block behind it adds the bias."""

    def __init__(self, ties: Ties, path: str, biased: bool = True) -> None:
        super().__init__()
        self.weight = ties.weight(f"{path}.conv")
        self.bias = ties.bias(f"{path}.conv") if biased else None

    def forward(self, x: Tensor, output_size: Any = None) -> Tensor:
        if output_size is None or tuple(output_size) == (2 * x.shape[2], 2 * x.shape[3]):
            x = upsample(x)
        else:
            # A UNet's next skip, where a side is odd.
            x = F.interpolate(x, size=output_size, mode="nearest")
        return F.conv2d(x, self.weight, self.bias, padding=1)


class PhaseUpsample(nn.Module):
    """`Upsample` with 4 of its 9 products a pixel: a convolution of the small image for each phase of the large one.

    Behind nearest upsampling a 3x3 kernel sees two pixels a side: taps that meet the same pixel are added up. The four
    2x2 kernels are one convolution of four times the channels, whose result `interleave` puts in order. For a VAE's
    large maps; a UNet's are small, and their time is that of the weights, which are 16 for 9 here.
    """

    def __init__(self, ties: Ties, path: str, biased: bool = True) -> None:
        super().__init__()
        self.weight = ties.own(lambda: phase_weights(ties.now(f"{path}.conv")[0]))
        self.bias = None
        if biased and ties.bias(f"{path}.conv") is not None:
            self.bias = ties.own(lambda: _four_times(ties.bias(f"{path}.conv")))

    def forward(self, x: Tensor) -> Tensor:
        return interleave(F.conv2d(x, self.weight, self.bias, padding=1))


UPSAMPLINGS: dict[str, type[Upsample] | type[PhaseUpsample]] = {"nearest": Upsample, "phases": PhaseUpsample}


def phase_weights(weight: Tensor) -> Tensor:
    """(O, I, 3, 3) -> (4·O, I, 2, 2): even rows and columns, even rows and odd columns, and so on.

    Sums are taken in fp32 and rounded once.
    """
    phases = [columns for rows in _folded(weight.float(), 2) for columns in _folded(rows, 3)]
    return torch.cat(phases).to(weight.dtype).contiguous(memory_format=torch.channels_last)


def _folded(weight: Tensor, dim: int) -> list[Tensor]:
    """Three taps to two: an even pixel's neighbour and itself are different pixels of the small image on the left, the
    same on the right; an odd one's the other way round."""
    first, middle, last = weight.unbind(dim)
    return [torch.stack([first, middle + last], dim), torch.stack([first + middle, last], dim)]


def _four_times(bias: Tensor | None) -> Tensor:
    assert bias is not None
    return bias.repeat(4)


def can_upsample(module: Any) -> bool:
    """Whether `Upsample` computes what this Upsample2D does."""
    if type(module).__name__ != "Upsample2D" or not module.use_conv or module.use_conv_transpose:
        return False
    conv = getattr(module, "conv", None)
    return module.norm is None and module.interpolate and conv is not None and _is_plain_3x3(conv)


def _is_plain_3x3(conv: Any) -> bool:
    # A LoRA's layer has its base layer's settings below.
    conv = conv.get_base_layer() if hasattr(conv, "get_base_layer") else conv
    settings = conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode
    return settings == ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros")


class Attention(nn.Module):
    """The middle block's self-attention, with its norm and residual, on tokens."""

    def __init__(self, ties: Ties, path: str, module: Any) -> None:
        super().__init__()
        self.norm, self.heads = module.group_norm, module.heads
        names = [f"{path}.to_{x}" for x in "qkv"]
        self.qkv = ties.packed(*names)
        self.qkv_bias = ties.own(lambda: torch.cat([b for name in names if (b := ties.bias(name)) is not None]))
        self.out, self.out_bias = ties.weight(f"{path}.to_out.0"), ties.bias(f"{path}.to_out.0")

    def forward(self, x: Tensor, temb: Any = None) -> Tensor:
        norm = self.norm
        normed = to_tokens(group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps))
        q, k, v = F.linear(normed, self.qkv, self.qkv_bias).chunk(3, dim=-1)
        h = attend_by_products(q, k, v) if self._by_products(q) else attend(q, k, v, self.heads, "sdpa")
        return bias_residual(from_tokens(F.linear(h, self.out), (x.shape[2], x.shape[3])), self.out_bias, x)

    def _by_products(self, q: Tensor) -> bool:
        wide = self.heads == 1 and q.shape[-1] > _FLASH_WIDTH and q.shape[1] in _PRODUCTS
        return wide and q.device.type == "cuda" and q.dtype in (torch.float16, torch.bfloat16)


def attend_by_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(QKᵀ/√d)V of one head on (B, L, d), with fp32 scores in memory."""
    scores = torch.bmm(q, k.mT, out_dtype=torch.float32)
    return torch.bmm(softmax(scores, q.shape[-1] ** -0.5, q.dtype), v)


def can_attend(module: Any) -> bool:
    """Whether `Attention` computes what this diffusers Attention does."""
    if type(module).__name__ != "Attention" or module.group_norm is None or not module.residual_connection:
        return False
    others = module.spatial_norm, module.norm_q, module.norm_k, module.norm_cross
    same = module.rescale_output_factor == 1 and module.scale == (module.inner_dim // module.heads) ** -0.5
    biases = [module.to_q.bias, module.to_k.bias, module.to_v.bias]
    return same and not any(others) and all(bias is not None for bias in biases)


def fused_decoder(module: Any, dtype: torch.dtype, upsampling: str = "nearest") -> tuple[Any, list[Replaced]]:
    """A view of the autoencoder whose decoder is made of fused layers; a copy where its type differs.

    upsampling: a name in UPSAMPLINGS.
    """
    ties, table = Ties(module), []
    was = next(module.parameters()).dtype
    if dtype != was:
        return VAE(module).decoder_in(dtype).module, [Replaced("vae.decoder", str(was), str(dtype))]
    view = sharing_copy(module, ("ResnetBlock2D", "Encoder"))

    def replace(path: str, now: nn.Module) -> None:
        was = type(module.decoder.get_submodule(path)).__name__
        view.set_submodule(f"decoder.{path}", now)
        table.append(Replaced(f"vae.decoder.{path}", was, type(now).__name__))

    behind = _resnets_behind(module.decoder)
    for path, part in list(module.decoder.named_modules()):
        whole = f"decoder.{path}"
        if type(part).__name__ == "ResnetBlock2D" and part.time_emb_proj is None:
            before = next((f"decoder.{conv}" for conv, block in behind.items() if block == path), None)
            replace(path, Resnet(ties, whole, part, None, before))
        elif can_upsample(part):
            replace(path, UPSAMPLINGS[upsampling](ties, whole, biased=f"{path}.conv" not in behind))
        elif can_attend(part):
            replace(path, Attention(ties, whole, part))
    if "conv_in" in behind:
        replace("conv_in", Conv(ties, "decoder.conv_in", module.decoder.conv_in))
    if isinstance(getattr(view.decoder, "conv_act", None), nn.SiLU):
        view.decoder.conv_norm_out = NormAct(module.decoder.conv_norm_out)
        view.decoder.conv_act = nn.Identity()
        table.append(Replaced("vae.decoder.conv_norm_out", "GroupNorm + SiLU", "NormAct"))
    return view, table


def _resnets_behind(decoder: Any) -> dict[str, str]:
    """The convolutions of AutoencoderKL's decoder whose result goes to one ResNet block alone -> that block."""
    if type(decoder).__name__ != "Decoder":
        return {}
    found = {"conv_in": "mid_block.resnets.0"}
    for i, block in enumerate(decoder.up_blocks[:-1]):
        if block.upsamplers is not None and len(block.upsamplers) == 1 and can_upsample(block.upsamplers[0]):
            found[f"up_blocks.{i}.upsamplers.0.conv"] = f"up_blocks.{i + 1}.resnets.0"
    return {
        conv: path
        for conv, path in found.items()
        if type(block := decoder.get_submodule(path)).__name__ == "ResnetBlock2D"
        and block.time_emb_proj is None
        and decoder.get_submodule(conv).bias is not None
    }
