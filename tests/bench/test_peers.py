"""A baseline does the same work on a copy of the weights, and an inconclusive comparison yields no speed-up."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.diffusers_peer import Diffusers, agreement, psnr
from ragturbo.bench.agreement import disagreement, latent_agreement, relative_error
from ragturbo.bench.models import make_bundle, make_database
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


def test_the_compiled_peer_records_graphs_without_autotuning_and_marks_each_image_as_a_step(bundle, monkeypatch):
    compiled, marked = [], []

    def compile(module, **options):
        compiled.append(options["mode"])
        return module

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marked.append(1))
    peer = Diffusers(bundle, compile=True)
    # UNet, VAE decoder, text encoder.
    assert compiled == ["reduce-overhead"] * 3 and "reduce-overhead" in peer.name and not marked
    assert any(not p.is_contiguous() for p in peer.pipe.unet.parameters())
    peer(["a boat"], [0]), peer(["a cat"], [1])
    assert len(marked) == 2


def test_another_result_or_one_that_a_control_gives_too_is_not_the_same_work(bundle):
    peer, words, others = Diffusers(bundle), ["a boat", "a cat"], ["two horses", "a stone bridge"]
    found = agreement(peer, peer, words, others)
    assert found["psnr"] > 100 > found["psnr_other_noise"] and disagreement(found, torch.float32) is None
    assert found["error_other_prompt"] > 1e-2
    wrong = {
        "error": 1e-2, "error_other_prompt": 1e-5, "error_other_noise": 1e-5, "psnr": 39.0, "psnr_other_noise": 45.0,
    }  # fmt: skip
    reasons = ("allowed: 1e-03", "another prompt pass", "another noise pass", "required: 40 dB", "other noise pass")
    for (name, value), reason in zip(wrong.items(), reasons, strict=True):
        assert reason in str(disagreement(found | {name: value}, torch.float32))
    broken = np.zeros((1, 2, 2, 3))
    broken[0, 0, 0, 0] = np.nan
    assert disagreement(found | {"psnr": psnr(broken, np.zeros_like(broken))}, torch.float32) is not None
    assert disagreement(found | {"error": float("nan")}, torch.float32) is not None


def test_images_of_random_weights_would_pass_whatever_the_prompt(bundle):
    peer = Diffusers(bundle)
    other = agreement(lambda words, seeds, output: peer(["a cat"], seeds, output), peer, ["a boat"], ["two horses"])
    assert other["psnr"] > 40 and "latents" in str(disagreement(other, torch.float32))


@pytest.mark.parametrize("mode", ["none", "slerp", "adapter"])
def test_every_mode_is_plain_torchs_and_heeds_its_neighbour(bundle, tmp_path, mode):
    database = make_database(bundle, tmp_path / "db", 8)
    with Generator(bundle, database=database, config=GeneratorConfig(batch_sizes=(1,))) as gen:
        found = latent_agreement(bundle, gen, mode, ["a boat", "a cat"])
        assert disagreement(found, torch.float32) is None
        if mode != "none":
            assert "another neighbour" in str(disagreement(found | {"changed_by_neighbour": 0.0}, torch.float32))

        def deaf(word, **options):
            return gen(word, **{**options, "mode": "none", "neighbors": None, "lam": None})

        deaf.database = database
        assert mode == "none" or disagreement(latent_agreement(bundle, deaf, mode, ["a boat", "a cat"]), torch.float32)
