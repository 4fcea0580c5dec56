"""A VAE's decoder with fewer kernel launches and less memory traffic: the same weights and result.

On a GPU a convolution adds its bias in a separate launch that reads and writes the whole feature map. Here the
following ResNet block adds it, without a launch of its own.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ragturbo.model.fused import NormAct, Resnet, attend, group_norm_of, is_plain_attention, not_fusible
from ragturbo.model.tied_layers import TiedConv2d, TiedLinear, pack_rest
from ragturbo.model.ties import Replaced, Ties, base_layer, sharing_copy
from ragturbo.model.tokens import from_tokens, to_tokens
from ragturbo.model.vae import VAE
from ragturbo.ops import bias_residual, interleave, softmax, upsample

# Torch's flash kernels support heads up to 256 wide; its other kernel takes three times as long as two products and a
# softmax.
_FLASH_WIDTH = 256
# Queries per image: below, torch's kernel is fast enough; above, the scores take more than 0.4 GB.
_PRODUCTS = range(1024, 8192 + 1)


class Upsample(nn.Module):
    """Upsample2D: nearest by two and a 3x3 convolution. biased: False if the following block adds the bias."""

    def __init__(self, ties: Ties, path: str, biased: bool = True) -> None:
        """path: of the convolution, or of the Upsample2D that has it."""
        super().__init__()
        path = _conv_path(ties, path)
        self.conv = TiedConv2d(ties, path)
        self.bias = ties.bias(path) if biased else None

    def forward(self, x: Tensor, output_size: Any = None) -> Tensor:
        """output_size: the size of a UNet's next skip, given if a side is odd."""
        if output_size is None or tuple(output_size) == (2 * x.shape[2], 2 * x.shape[3]):
            x = upsample(x)
        else:
            x = F.interpolate(x, size=output_size, mode="nearest")
        return self.conv(x, self.bias)


class PhaseUpsample(nn.Module):
    """`Upsample` with 4 instead of 9 products per pixel: one convolution of the small map per phase of the large one.

    After nearest upsampling a 3x3 kernel covers 2x2 different pixels; the taps on the same pixel are added up. The four
    2x2 kernels are one convolution with four times the channels, whose result `interleave` puts in order. On a GPU this
    is for the large maps of a VAE: on a UNet's small ones the weights dominate, and there are 16 instead of 9 of them.
    """

    def __init__(self, ties: Ties, path: str, biased: bool = True) -> None:
        """path: of the convolution, or of the Upsample2D that has it."""
        super().__init__()
        conv = _conv_path(ties, path)
        out, into = ties.current(conv, cast=False).shape[:2]
        self.conv = TiedConv2d(
            ties, conv, weight=lambda: phase_weights(ties.current(conv, cast=False), ties.dtype),
            shape=torch.Size((4 * out, into, 2, 2)),
        )  # fmt: skip
        bias = ties.bias(conv, cast=False) if biased else None
        self.bias = None if bias is None else ties.own(lambda: bias.to(ties.dtype or bias.dtype).repeat(4))
        self._other_sizes = Upsample(ties, path, biased)

    def forward(self, x: Tensor, output_size: Any = None) -> Tensor:
        if output_size is not None and tuple(output_size) != (2 * x.shape[2], 2 * x.shape[3]):
            return self._other_sizes(x, output_size)
        return interleave(self.conv(x, self.bias))


UPSAMPLINGS: dict[str, type[Upsample] | type[PhaseUpsample]] = {"nearest": Upsample, "phases": PhaseUpsample}


def _conv_path(ties: Ties, path: str) -> str:
    return path if isinstance(base_layer(ties.root.get_submodule(path)), nn.Conv2d) else f"{path}.conv"


def phase_weights(weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """(O, I, 3, 3) -> (4·O, I, 2, 2): even rows and columns, even rows and odd columns, and so on.

    Sums are taken in fp32 and rounded once.
    """
    phases = [columns for rows in _two_taps(weight.float(), 2) for columns in _two_taps(rows, 3)]
    return torch.cat(phases).to(dtype or weight.dtype).contiguous(memory_format=torch.channels_last)


def _two_taps(weight: Tensor, dim: int) -> list[Tensor]:
    """Reduce three taps to two, for even and for odd positions of the large map.

    The last two taps of an even position are on the same pixel of the small map, and the first two of an odd one.
    """
    first, middle, last = weight.unbind(dim)
    return [torch.stack([first, middle + last], dim), torch.stack([first + middle, last], dim)]


def _upsampled_convs(decoder: nn.Module) -> list[tuple[str, str]]:
    """The paths of nearest upsamplings by two and of the 3x3 convolutions right after them, as in AutoencoderTiny."""
    found = []
    for path, module in decoder.named_modules():
        for first, then in pairwise(module.named_children() if isinstance(module, nn.Sequential) else ()):
            scale = first[1].scale_factor if isinstance(first[1], nn.Upsample) else None
            if scale in (2, 2.0) and first[1].mode == "nearest" and _is_plain_conv(then[1]):
                found.append((f"{path}.{first[0]}", f"{path}.{then[0]}"))
    return found


def can_upsample(module: Any) -> bool:
    """Whether `Upsample` computes what this module does."""
    if type(module).__name__ != "Upsample2D" or not module.use_conv or module.use_conv_transpose:
        return False
    conv = getattr(module, "conv", None)
    if module.norm is not None or not module.interpolate or conv is None:
        return False
    return _is_plain_conv(conv)


def _is_plain_conv(module: Any) -> bool:
    """Whether a module is a 3x3 convolution that keeps the size."""
    conv = base_layer(module)
    if not isinstance(conv, nn.Conv2d):
        return False
    settings = conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode
    return settings == ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros")


class Attention(nn.Module):
    """The middle block's self-attention on tokens, with its norm and residual."""

    def __init__(self, ties: Ties, path: str, module: Any) -> None:
        super().__init__()
        self.norm, self.heads = ties.norm(module.group_norm), module.heads
        names = [f"{path}.to_{x}" for x in "qkv"]
        self.qkv, self.out = TiedLinear(ties, *names), TiedLinear(ties, f"{path}.to_out.0")
        biases = [b for name in names if (b := ties.bias(name, cast=False)) is not None]
        self.qkv_bias = ties.own(lambda: torch.cat(biases).to(ties.dtype or biases[0].dtype))
        self.out_bias = ties.bias(f"{path}.to_out.0")

    def forward(self, x: Tensor, temb: Any = None) -> Tensor:
        q, k, v = self.qkv(to_tokens(group_norm_of(x, self.norm)), self.qkv_bias).chunk(3, dim=-1)
        grid = (x.shape[2], x.shape[3])
        if x.device.type == "cpu":
            h = attend(q, k, v, self.heads, "products" if q.dtype == torch.bfloat16 else "sdpa")
            return from_tokens(self.out(h, self.out_bias, to_tokens(x)), grid)
        h = attend_by_products(q, k, v) if self._by_products(q) else attend(q, k, v, self.heads, "sdpa")
        return bias_residual(from_tokens(self.out(h), grid), self.out_bias, x)

    def _by_products(self, q: Tensor) -> bool:
        wide = self.heads == 1 and q.shape[-1] > _FLASH_WIDTH and q.shape[1] in _PRODUCTS
        return wide and q.device.type == "cuda" and q.dtype in (torch.float16, torch.bfloat16)


def attend_by_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(QKᵀ/√d)V of one head on (B, L, d), with the scores in memory, in fp32."""
    scores = torch.bmm(q, k.mT, out_dtype=torch.float32)
    return torch.bmm(softmax(scores, q.shape[-1] ** -0.5, q.dtype), v)


def _can_attend(module: Any) -> bool:
    """Whether `Attention` computes what this module does."""
    if type(module).__name__ != "Attention" or module.group_norm is None or not module.residual_connection:
        return False
    return is_plain_attention(module) and all(x.bias is not None for x in (module.to_q, module.to_k, module.to_v))


def _can_fuse(block: Any) -> bool:
    return type(block).__name__ == "ResnetBlock2D" and block.time_emb_proj is None and not_fusible(block) is None


def fused_decoder(
    module: Any, dtype: torch.dtype, upsampling: str = "nearest", *, packs: bool = False
) -> tuple[Any, list[Replaced]]:
    """Make an autoencoder whose decoder consists of fused layers over the weights of `module`.

    Args:
        module: a diffusers autoencoder, which is not changed.
        dtype: if it is not the module's, and packs is not set, the result is a plain copy of the module without its
            encoder.
        upsampling: a name in UPSAMPLINGS.
        packs: keep weights in oneDNN's layout, in any dtype.

    Returns:
        The autoencoder and the modules that were replaced in it.
    """
    was = next(module.parameters()).dtype
    ties, replaced = Ties(module, None if dtype == was else dtype, packs), []
    if dtype != was and not packs:
        return VAE(module).decoder_in(dtype).module, [Replaced("vae.decoder", str(was), str(dtype))]
    view = sharing_copy(module, ("ResnetBlock2D", "Encoder"))

    def replace(path: str, now: nn.Module) -> None:
        was = type(module.decoder.get_submodule(path)).__name__
        view.set_submodule(f"decoder.{path}", now)
        replaced.append(Replaced(f"vae.decoder.{path}", was, type(now).__name__))

    moved = _moved_biases(module.decoder)
    unbiased = set(moved.values())
    for path, part in list(module.decoder.named_modules()):
        full_path = f"decoder.{path}"
        if _can_fuse(part):
            before = f"decoder.{moved[path]}" if path in moved else None
            replace(path, Resnet(ties, full_path, part, None, before))
        elif can_upsample(part):
            replace(path, UPSAMPLINGS[upsampling](ties, full_path, biased=f"{path}.conv" not in unbiased))
        elif _can_attend(part):
            replace(path, Attention(ties, full_path, part))
    if packs:
        for path, conv in _upsampled_convs(module.decoder):
            replace(path, PhaseUpsample(ties, f"decoder.{conv}"))
            replace(conv, nn.Identity())
        rest = pack_rest(
            ties, view, below=("decoder", "post_quant_conv"), unbiased={f"decoder.{path}" for path in unbiased}
        )
        replaced += [Replaced(f"vae.{row.path}", row.was, row.now) for row in rest]
    elif "conv_in" in unbiased:
        view.decoder.conv_in.bias = None
    if isinstance(getattr(view.decoder, "conv_act", None), nn.SiLU):
        view.decoder.conv_norm_out = NormAct(ties.norm(module.decoder.conv_norm_out))
        view.decoder.conv_act = nn.Identity()
        replaced.append(Replaced("vae.decoder.conv_norm_out", "GroupNorm + SiLU", "NormAct"))
    return view, replaced


def _moved_biases(decoder: Any) -> dict[str, str]:
    """The fused ResNet blocks of AutoencoderKL's decoder, by path, that add the bias of the convolution before them.

    Only convolutions whose result has no other use.
    """
    if type(decoder).__name__ != "Decoder":
        return {}
    found = {"mid_block.resnets.0": "conv_in"}
    for i, block in enumerate(decoder.up_blocks[:-1]):
        if block.upsamplers is not None and len(block.upsamplers) == 1 and can_upsample(block.upsamplers[0]):
            found[f"up_blocks.{i + 1}.resnets.0"] = f"up_blocks.{i}.upsamplers.0.conv"
    return {
        path: conv
        for path, conv in found.items()
        if _can_fuse(decoder.get_submodule(path)) and decoder.get_submodule(conv).bias is not None
    }
