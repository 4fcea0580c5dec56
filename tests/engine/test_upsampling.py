"""The VAE's upsamplers are what this GPU was measured to run fastest, and the model's own arithmetic elsewhere."""

from __future__ import annotations

import pytest
import torch

from ragturbo.engine import upsampling
from ragturbo.engine.fast_model import FastModel
from ragturbo.kernels import tiles
from ragturbo.model import fused_vae

CARD = {"gpu": {"name": "NVIDIA Imaginary 9000", "driver": "1"}, "packages": {"torch": "3"}, "commit": "abc"}
GPU = torch.device("cuda")


@pytest.fixture
def card(monkeypatch, tmp_path):
    monkeypatch.setattr(tiles, "INSTALLED", tmp_path)
    monkeypatch.setattr(tiles, "_OVERRIDE", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA Imaginary 9000")
    monkeypatch.setattr("ragturbo.machine.describe", lambda: CARD)
    return tmp_path


@pytest.mark.parametrize("times", [{"nearest": 2e-3, "phases": 1e-3}, {"nearest": 1e-3, "phases": 2e-3}])
def test_the_faster_is_taken_where_it_was_measured(card, monkeypatch, times):
    assert upsampling.choose(GPU) == upsampling.choose(torch.device("cpu")) == "nearest"
    monkeypatch.setattr(upsampling, "race", lambda device, time: times)
    assert upsampling.main(["--out", str(card)]) == 0
    assert upsampling.choose(GPU) == min(times, key=times.__getitem__)
    assert upsampling.choose(torch.device("cpu")) == "nearest"
    assert tiles.known(card / "nvidia_imaginary_9000.json")["made_on"]["upsampling"]["commit"] == "abc"


def test_what_gives_another_result_is_not_timed(monkeypatch):
    monkeypatch.setattr(upsampling, "SIZES", ((8, 4), (16, 3)))
    with torch.inference_mode():
        raced = upsampling.race("cpu", lambda call: float(call().shape[1]))
        assert raced == {"nearest": 24.0, "phases": 24.0}
        monkeypatch.setattr(fused_vae, "interleave", lambda phases: phases.new_zeros(1, phases.shape[1] // 4, 2, 2))
        monkeypatch.setattr(upsampling, "SIZES", ((8, 1), (16, 1)))
        assert upsampling.race("cpu", lambda call: float(call().shape[1])) == {"nearest": 24.0}


def test_the_fast_model_takes_what_is_chosen(bundle, eager, graph_engine, make_batch, monkeypatch):
    batch = make_batch("a red circle", want="float")
    expected = eager.run(batch).image
    for name, module in fused_vae.UPSAMPLINGS.items():
        monkeypatch.setattr(upsampling, "choose", lambda device, name=name: name)
        replaced = FastModel(bundle).replaced
        assert ("Upsample2D", module.__name__) in {(row.was, row.now) for row in replaced if "vae" in row.path}
        image = graph_engine().run(batch).image
        assert float((image - expected).abs().max()) < 1e-4
