"""A peer does the same work on weights of its own, and a comparison that proves nothing gives no speed-up."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ragturbo.bench.models import make_bundle
from ragturbo.bench.peers import Diffusers, agreement, equal, psnr, relative_error
from ragturbo.config import GeneratorConfig
from ragturbo.generate import Generator


@pytest.fixture(scope="module")
def bundle():
    torch.set_num_threads(1)
    return make_bundle("rehearsal", "cpu", torch.float32)


def test_the_peers_weights_keep_diffusers_layout_whatever_the_engine_makes_of_the_bundles(bundle):
    # As the engine does on a GPU.
    for module in (bundle.unet.unet, bundle.vae.module):
        torch.nn.Module.to(module, memory_format=torch.channels_last)
    peer = Diffusers(bundle)
    theirs = [p for module in (peer.pipe.unet, peer.pipe.vae) for p in module.parameters()]
    ours = [p for module in (bundle.unet.unet, bundle.vae.module) for p in module.parameters()]
    assert all(p.is_contiguous() for p in theirs)
    assert not {p.data_ptr() for p in theirs} & {p.data_ptr() for p in ours}
    assert any(not p.is_contiguous() for p in ours)
    with Generator(bundle, config=GeneratorConfig(batch_sizes=(1,))) as gen:
        latents = gen("a boat", seed=3, output_type="latent").images
    assert relative_error(latents, peer(["a boat"], [3], "latent")) < 1e-4


def test_another_result_or_one_that_other_noise_gives_too_is_not_the_same_work(bundle):
    peer, words = Diffusers(bundle), ["a boat", "a cat"]
    found = agreement(peer, peer, words)
    assert found["psnr"] > 100 > found["psnr_other_noise"] and equal(found) is None
    assert "40 are needed" in str(equal(found | {"psnr": 39.0}))
    assert "proves nothing" in str(equal(found | {"psnr_other_noise": found["psnr"]}))
    broken = np.zeros((1, 2, 2, 3))
    broken[0, 0, 0, 0] = np.nan
    assert equal(found | {"psnr": psnr(broken, np.zeros_like(broken))}) is not None
