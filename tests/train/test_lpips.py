"""Latent LPIPS: the network, its files, its augmentations."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from ragturbo.errors import ModelError
from ragturbo.train.augment import Augmentation
from ragturbo.train.lpips import LatentLPIPS, LatentVGG, load_lpips, save_vgg


def small(augmentation=None, seed=0):
    torch.manual_seed(seed)
    return LatentLPIPS(LatentVGG(width=4), augmentation=augmentation)


def test_the_network_is_vgg16_bn_with_three_pools_less():
    vgg = LatentVGG(4, 64)
    # vgg16_bn.features has 14,723,136 weights on RGB; a 4-channel first convolution has 64·9 more.
    assert sum(p.numel() for p in vgg.parameters()) == 14_723_136 + 64 * 9
    assert vgg.taps == [6, 13, 23, 33, 43]
    sizes = [tuple(f.shape[1:]) for f in LatentVGG(4, 4)(torch.zeros(1, 4, 16, 16))]
    assert sizes == [(4, 16, 16), (8, 16, 16), (16, 16, 16), (32, 8, 8), (32, 4, 4)]


def test_equal_latents_are_at_distance_zero_and_others_are_not():
    lpips, z = small(), torch.randn(3, 4, 16, 16)
    assert lpips(z, z).tolist() == [0.0, 0.0, 0.0]
    assert (lpips(z + 0.5 * torch.randn_like(z), z) > 0.01).all()


def test_both_inputs_are_augmented_alike(rng):
    lpips, z = small(Augmentation()), torch.randn(4, 4, 16, 16)
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    assert lpips(z, z, generator).tolist() == [0.0] * 4


def test_the_gradient_reaches_the_estimate_and_neither_network_nor_target():
    lpips = small(Augmentation())
    lpips.train()
    z0_hat, z0 = torch.randn(2, 4, 16, 16, requires_grad=True), torch.randn(2, 4, 16, 16, requires_grad=True)
    before = lpips.vgg.features[1].running_mean.clone()
    lpips(z0_hat, z0, torch.Generator().manual_seed(0)).sum().backward()
    assert z0_hat.grad.isfinite().all() and z0_hat.grad.abs().sum() > 0
    assert z0.grad is None and all(p.grad is None for p in lpips.parameters())
    assert torch.equal(before, lpips.vgg.features[1].running_mean)


def test_a_constant_latent_has_a_finite_gradient():
    z = torch.zeros(1, 4, 16, 16, requires_grad=True)
    small()(z, torch.ones(1, 4, 16, 16)).sum().backward()
    assert z.grad.isfinite().all()


def test_our_own_file_comes_back_whole(tmp_path):
    lpips = small()
    save_vgg(lpips.vgg, tmp_path / "vgg.safetensors")
    again, z = LatentLPIPS.load(tmp_path / "vgg.safetensors"), torch.randn(2, 2, 4, 16, 16)
    assert torch.equal(lpips(*z), again(*z))


def as_tuned(lpips, lin):
    """The layout of E-LatentLPIPS's tuned checkpoint: slices by block, calibrated weights twice."""
    edges = [7, 14, 24, 34, 44]
    state = {}
    for name, value in lpips.vgg.features.state_dict().items():
        number = int(name.split(".")[0])
        state[f"net.slice{1 + next(i for i, edge in enumerate(edges) if number < edge)}.{name}"] = value
    for k, weight in enumerate(lin):
        state[f"lin{k}.model.1.weight"] = weight.view(1, -1, 1, 1)
        state[f"lins.{k}.model.1.weight"] = weight.view(1, -1, 1, 1).clone()
    return state


def test_a_tuned_elatentlpips_file_is_read_with_its_calibration(tmp_path):
    lpips = small()
    ones = [torch.ones(c) for c in lpips.vgg.widths]
    half = [ones[0] * 0, *ones[1:]]
    save_file(as_tuned(lpips, ones), tmp_path / "ones.safetensors")
    save_file(as_tuned(lpips, half), tmp_path / "half.safetensors")
    z = torch.randn(2, 2, 4, 16, 16)
    plain = LatentLPIPS.load(tmp_path / "ones.safetensors")
    assert torch.equal(plain(*z), lpips(*z))
    assert (LatentLPIPS.load(tmp_path / "half.safetensors")(*z) < lpips(*z)).all()


def test_a_backbone_file_of_elatentlpips_is_read_under_its_prefixes(tmp_path):
    lpips = small()
    state = {f"module.model.features.{k}": v for k, v in lpips.vgg.features.state_dict().items()}
    save_file({**state, "module.model.classifier.0.weight": torch.zeros(2, 2)}, tmp_path / "base.safetensors")
    z = torch.randn(2, 2, 4, 16, 16)
    assert torch.equal(LatentLPIPS.load(tmp_path / "base.safetensors")(*z), lpips(*z))


def test_wrong_files_are_refused_by_name(tmp_path):
    lpips = small()
    save_vgg(lpips.vgg, tmp_path / "vgg.safetensors")
    with pytest.raises(ModelError, match="4 channels; these have 16"):
        LatentLPIPS.load(tmp_path / "vgg.safetensors", in_channels=16)
    save_file({"conv.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match="other.safetensors holds no VGG16-BN"):
        LatentLPIPS.load(tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match="ragturbo convert"):
        LatentLPIPS.load(tmp_path / "sd21_latest_vgg16_tuned.pth")
    short = as_tuned(lpips, [torch.ones(c) for c in lpips.vgg.widths])
    del short["lin4.model.1.weight"], short["lins.4.model.1.weight"]
    save_file(short, tmp_path / "short.safetensors")
    with pytest.raises(ModelError, match=r"blocks \[0, 1, 2, 3\]"):
        LatentLPIPS.load(tmp_path / "short.safetensors")


def test_random_features_are_taken_only_by_that_name():
    assert load_lpips("random", 4, None).vgg.width == 64


def test_no_augmentation_is_the_identity_and_a_flip_is_a_flip():
    z = torch.randn(2, 4, 8, 8)
    still = Augmentation(p=0.0).draw(2, torch.Generator().manual_seed(0))
    torch.testing.assert_close(still(z), z)
    only_flip = Augmentation(quarter_turns=False, max_angle=0, scale_std=0, max_shift=0, cutout=0)
    seen = set()
    for seed in range(20):
        out = only_flip.draw(2, torch.Generator().manual_seed(seed))(z)
        for i in range(2):
            same, mirrored = torch.allclose(out[i], z[i], atol=1e-5), torch.allclose(out[i], z[i].flip(-1), atol=1e-5)
            assert same or mirrored
            seen.add(mirrored)
    assert seen == {True, False}


def test_cutout_zeroes_a_square_and_nothing_else():
    only_cutout = Augmentation(flip=False, quarter_turns=False, max_angle=0, scale_std=0, max_shift=0, cutout=0.5)
    z = torch.rand(64, 1, 16, 16) + 1
    out = only_cutout.draw(64, torch.Generator().manual_seed(0))(z)
    cut = out == 0
    torch.testing.assert_close(out[~cut], z[~cut])
    share = cut.float().mean((1, 2, 3))
    # The square's centre lies anywhere in the latent: a quarter of it at most, a sixteenth at least.
    assert share.max() <= 0.25 + 1e-6 and share.min() >= 1 / 16 - 0.02 and share.std() > 0.01
