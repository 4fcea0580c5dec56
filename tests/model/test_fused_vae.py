"""The fused decoder equals the model's: moved biases, upsampling by two, attention as two products."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from torch.nn import functional as F

from ragturbo.model import fused_vae, onednn
from ragturbo.model.fused_vae import PhaseUpsample, Upsample, attend_by_products, can_upsample, fused_decoder
from ragturbo.model.ties import Ties


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def scrambled(module: Any) -> Any:
    """Change biases and norms from their initial zeros and ones, so that omitting one is detected."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return module


@pytest.mark.parametrize("upsampling", ["nearest", "phases"])
@pytest.mark.parametrize("side", [(4, 4), (5, 3)])
@torch.inference_mode()
def test_a_fused_decoder_is_the_model(tiny: ModuleType, side: tuple[int, int], upsampling: str) -> None:
    module = scrambled(tiny.vae())
    view, table = fused_decoder(module, torch.float32, upsampling)
    z = torch.randn(2, 4, *side)
    assert relative(view.decode(z).sample, module.decode(z).sample) < 1e-5
    replaced = {(row.was, row.now) for row in table}
    assert replaced == {
        ("ResnetBlock2D", "Resnet"), ("Upsample2D", fused_vae.UPSAMPLINGS[upsampling].__name__),
        ("Attention", "Attention"), ("GroupNorm + SiLU", "NormAct"),
    }  # fmt: skip
    # The biases of conv_in and of the upsamplers moved to the following ResNet blocks.
    assert [up.upsamplers[0].bias for up in view.decoder.up_blocks[:-1]] == [None] * 3
    assert view.decoder.conv_in.bias is None and module.decoder.conv_in.bias is not None
    assert view.decoder.mid_block.resnets[0].bias0 is not None
    assert [up.resnets[0].bias0 is None for up in view.decoder.up_blocks] == [True, False, False, False]


@torch.inference_mode()
def test_every_moved_bias_counts(tiny: ModuleType) -> None:
    """The tolerance above is small enough to detect a bias that is lost or added twice."""
    module = scrambled(tiny.vae())
    z = torch.randn(1, 4, 4, 4)
    expected = module.decode(z).sample
    for conv in (module.decoder.conv_in, *(up.upsamplers[0].conv for up in module.decoder.up_blocks[:-1])):
        kept = conv.bias.clone()
        conv.bias.zero_()
        assert relative(module.decode(z).sample, expected) > 1e-4
        conv.bias.copy_(kept)


@torch.inference_mode()
def test_a_decoder_of_other_parts_keeps_its_biases() -> None:
    """Without a middle attention, and with one ResNet block per level."""
    module = AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, mid_block_add_attention=False, layers_per_block=1,
    ).eval()  # fmt: skip
    view, _ = fused_decoder(scrambled(module), torch.float32)
    z = torch.randn(1, 4, 3, 5)
    assert relative(view.decode(z).sample, module.decode(z).sample) < 1e-5
    # ResNet blocks with another activation are not fused.
    for block in module.decoder.mid_block.resnets:
        block.nonlinearity = torch.nn.GELU()
    view, _ = fused_decoder(module, torch.float32)
    assert relative(view.decode(z).sample, module.decode(z).sample) < 1e-5


@torch.inference_mode()
def test_an_upsampler_meets_any_size(tiny: ModuleType) -> None:
    unet = tiny.unet()
    path = "up_blocks.0.upsamplers.0"
    module = unet.get_submodule(path)
    assert can_upsample(module)
    up = Upsample(Ties(unet), path)
    x = torch.randn(2, module.channels, 3, 4)
    for size in (None, (6, 8), (5, 7), (6, 7)):
        assert relative(up(x, size), module(x, size)) < 1e-6
    module.conv.padding = (0, 0)
    assert not can_upsample(module)


@pytest.mark.parametrize("biased", [True, False])
@torch.inference_mode()
def test_four_convolutions_of_the_small_image_are_one_of_the_large(tiny: ModuleType, biased: bool) -> None:
    vae = scrambled(tiny.vae()).double()
    path = "decoder.up_blocks.1.upsamplers.0"
    ties = Ties(vae)
    whole, phases = Upsample(ties, path, biased), PhaseUpsample(ties, path, biased)
    for size in ((1, 1), (1, 5), (4, 3)):
        x = torch.randn(2, 16, *size, dtype=torch.float64)
        # The weights are summed in fp32.
        assert relative(phases(x), whole(x)) < 1e-6
    # In fp16 the weights are rounded once more: at most twice the error of the convolution itself.
    exact = vae.get_submodule(path)(x) if biased else whole(x)
    half = Ties(vae.half())
    whole, phases = Upsample(half, path, biased), PhaseUpsample(half, path, biased)
    error = [relative(up(x.half()).double(), exact) for up in (phases, whole)]
    assert error[0] < 2 * error[1] < 4e-3


def test_new_weights_go_into_the_same_memory(tiny: ModuleType) -> None:
    vae = tiny.vae()
    path = "decoder.up_blocks.0.upsamplers.0"
    ties = Ties(vae)
    up = PhaseUpsample(ties, path)
    place, before = up.conv.weight.data_ptr(), up.conv.weight.clone()
    with torch.no_grad():
        vae.get_submodule(path).conv.weight.add_(1)
    assert ties.refresh() and up.conv.weight.data_ptr() == place and not torch.equal(up.conv.weight, before)
    x = torch.randn(1, 16, 3, 3)
    with torch.no_grad():
        assert relative(up(x), vae.get_submodule(path)(x)) < 1e-5


def test_two_products_and_a_softmax_are_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU has no product of fp16 matrices with an fp32 result, so it is emulated in fp32."""
    monkeypatch.setattr(torch, "bmm", lambda a, b, out_dtype=None: (a.float() @ b.float()).to(out_dtype or a.dtype))
    q, k, v = (torch.randn(2, 160, 96).half() for _ in range(3))
    q = 4 * q
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    found = attend_by_products(q, k, v)
    assert found.dtype == torch.float16
    assert relative(found.double(), exact) < 1e-3
    assert relative(F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0].double(), exact) < 1e-3


@pytest.mark.parametrize(
    "tokens, dtype, products",
    [
        (4096, torch.float16, True),
        (64, torch.float16, False),
        (4096, torch.float32, False),
        (9216, torch.float16, False),
    ],
)
def test_products_are_for_wide_heads_of_16_bits(tokens: int, dtype: torch.dtype, products: bool) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), torch.inference_mode():
        module = AutoencoderKL(block_out_channels=(512,), norm_num_groups=32).decoder
        attention = fused_vae.Attention(Ties(module), "mid_block.attentions.0", module.mid_block.attentions[0])
        assert attention._by_products(torch.empty(1, tokens, 512, dtype=dtype, device="cuda")) is products
        assert not attention._by_products(torch.empty(1, tokens, 512, dtype=dtype))


@pytest.mark.skipif(onednn.why_not() is not None, reason=str(onednn.why_not()))
@pytest.mark.parametrize("kind", ["vae", "tiny_vae"])
@torch.inference_mode()
def test_a_decoder_packed_for_a_cpu_is_the_model_and_leaves_it_as_it_was(tiny: ModuleType, kind: str) -> None:
    module = scrambled(getattr(tiny, kind)())
    before = {name: value.clone() for name, value in module.state_dict().items()}
    for side in ((4, 4), (5, 3)):
        z = torch.randn(2, 4, *side)
        expected = module.decode(z).sample
        exact, table = fused_decoder(module, torch.float32, "phases", packs=True)
        assert relative(exact.decode(z).sample, expected) < 1e-5
        assert {"PhaseUpsample", "ConvLayer"} <= {row.now for row in table}
        rounded, _ = fused_decoder(module, torch.bfloat16, "phases", packs=True)
        image = rounded.decode(z.bfloat16()).sample
        assert image.dtype == torch.bfloat16 and relative(image.float(), expected) < 0.03
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert torch.equal(module.decode(z).sample, expected)
