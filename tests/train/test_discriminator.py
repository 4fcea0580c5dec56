"""The discriminator: features of the backbone, heads, and the noise schedule."""

from __future__ import annotations

import pytest
import torch

from ragturbo.errors import InvalidRequest
from ragturbo.train.discriminator import Backbone, Discriminator, Head, NoiseSchedule


@pytest.fixture(scope="module")
def unet(tiny):
    torch.manual_seed(0)
    return tiny.unet("sd21")


def inputs(unet, batch=2):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(batch, 4, 16, 16, generator=generator)
    return z, torch.tensor([3, 900][:batch]), torch.randn(batch, 8, 32, generator=generator)


def test_the_features_are_the_outputs_of_the_blocks(unet):
    """Against hooks on diffusers' own forward."""
    hooked = {}

    def keep(name):
        def hook(_module, _inputs, out):
            hooked[name] = (out[0] if isinstance(out, tuple) else out).clone()

        return hook

    blocks = {**{f"down_{i}": block for i, block in enumerate(unet.down_blocks)}, "mid": unet.mid_block}
    hooks = [block.register_forward_hook(keep(name)) for name, block in blocks.items()]
    z, s, text = inputs(unet)
    with torch.no_grad():
        unet(z, s, text)
        for hook in hooks:
            hook.remove()
        backbone = Backbone(unet)
        features = backbone(z, s, text)
    assert backbone.stages == ["down_0", "down_1", "down_2", "down_3", "mid"]
    for name, channels, feature in zip(backbone.stages, backbone.channels, features, strict=True):
        torch.testing.assert_close(feature, hooked[name], atol=1e-5, rtol=1e-5)
        assert feature.shape[1] == channels


def test_a_backbone_knows_which_of_its_stages_have_read_the_prompt(unet, tiny):
    assert Backbone(unet).reads_text == [True] * 5
    late = tiny.unet("sd21", down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D", "DownBlock2D"))
    assert Backbone(late).reads_text == [False, True, True, True, True]
    assert Backbone(late, ["mid", "down_0"]).reads_text == [True, False]


def test_the_teachers_decoder_is_not_kept_and_the_given_unet_stays_whole(unet):
    half = Backbone(unet).unet.unet
    assert not any(name.startswith(("up_blocks", "conv_out")) for name, _ in half.named_parameters())
    assert half.conv_in is unet.conv_in and len(unet.up_blocks) == 4
    assert not any(p.requires_grad for p in half.parameters())


def test_d_depends_on_the_text_and_on_s(unet):
    discriminator = Discriminator(Backbone(unet), width=8).eval()
    z, s, text = inputs(unet)
    with torch.no_grad():
        plain = discriminator(discriminator.backbone(z, s, text))
        other_text = discriminator(discriminator.backbone(z, s, text.flip(0)))
        other_s = discriminator(discriminator.backbone(z, s.flip(0), text))
    for k in range(len(plain)):
        assert not torch.allclose(plain[k], other_text[k]) and not torch.allclose(plain[k], other_s[k])


def test_no_checkpoint_of_d_holds_its_backbone(unet):
    discriminator = Discriminator(Backbone(unet), width=8)
    assert all(name.startswith("heads.") for name in discriminator.state_dict())
    assert sum(p.numel() for p in discriminator.parameters()) < sum(p.numel() for p in unet.parameters()) / 4


def test_spectral_norm_bounds_every_convolution_of_a_head_but_the_last():
    torch.manual_seed(0)
    head = Head(16, 8).train()
    with torch.no_grad():
        for p in head.parameters():
            p.mul_(7.0)
        for _ in range(50):
            head(torch.randn(2, 16, 8, 8))
    head.eval()
    for conv in (head.conv_in, head.conv_mid):
        largest = torch.linalg.matrix_norm(conv.weight.flatten(1), 2)
        assert largest.item() == pytest.approx(1.0, abs=1e-3)
    assert torch.linalg.matrix_norm(head.conv_out.weight.flatten(1), 2) > 2
    assert not hasattr(Head(16, 8, spectral=False).conv_in, "parametrizations")


def test_a_normalised_head_does_not_see_the_scale_of_its_features():
    torch.manual_seed(0)
    x = torch.randn(2, 16, 8, 8)
    head, raw = Head(16, 8).eval(), Head(16, 8, normalise=False).eval()
    with torch.no_grad():
        torch.testing.assert_close(head(100 * x), head(x), atol=1e-3, rtol=1e-3)
        assert not torch.allclose(raw(100 * x), raw(x), atol=1e-1)


@pytest.mark.parametrize("side", [1, 2, 3, 8])
def test_a_head_takes_any_grid_and_half_precision(side):
    logits = Head(16, 8)(torch.randn(2, 16, side, side).bfloat16())
    assert logits.shape == (2, ((side + 1) // 2) ** 2) and logits.dtype == torch.float32


def test_a_stage_that_is_not_there_is_refused(unet):
    with pytest.raises(InvalidRequest, match=r"\['up_0'\]: this teacher has down_0, down_1, down_2, down_3, mid"):
        Backbone(unet, ["mid", "up_0"])


def test_z_s_is_what_diffusers_would_add_noise_to(tiny):
    from diffusers import DDPMScheduler

    scheduler = tiny.scheduler()
    noise = NoiseSchedule(scheduler)
    z, eps, s = torch.randn(3, 4, 4, 4), torch.randn(3, 4, 4, 4), torch.tensor([0, 500, 999])
    theirs = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").add_noise(z, eps, s)
    torch.testing.assert_close(noise.noised(z, eps, s), theirs)
    assert len(noise) == 1000
    torch.testing.assert_close(noise.alpha**2 + noise.sigma**2, torch.ones(1000))


def test_heads_learn_to_tell_apart_what_differs_in_the_teachers_eyes(unet):
    """Within 60 steps every head leaves its starting loss of 2."""
    from ragturbo.train.losses import hinge_d

    torch.manual_seed(0)
    discriminator = Discriminator(Backbone(unet), width=16).train()
    optimizer = torch.optim.AdamW(discriminator.parameters(), lr=2e-3, betas=(0.0, 0.99))
    z, s, text = inputs(unet)
    z, s, text = z.repeat(4, 1, 1, 1), s.repeat(4), text.repeat(4, 1, 1)
    with torch.no_grad():
        smooth = torch.nn.functional.avg_pool2d(z, 3, 1, 1) * 2
        real, fake = discriminator.backbone(z, s, text), discriminator.backbone(smooth, s, text)
    for _ in range(60):
        losses = hinge_d(discriminator(real), discriminator(fake))
        optimizer.zero_grad()
        losses.sum().backward()
        optimizer.step()
    assert (losses < 1.5).all(), losses
