"""The VAE's upsamplers are what this GPU was measured to run fastest, and the model's own arithmetic elsewhere."""

from __future__ import annotations

import pytest
import torch

from ragturbo.engine import upsampling
from ragturbo.engine.fast_model import FastModel
from ragturbo.kernels import tiles
from ragturbo.model import fused_vae

GPU = torch.device("cuda")


@pytest.fixture
def card(monkeypatch, tmp_path):
    monkeypatch.setattr(tiles, "INSTALLED", tmp_path)
    monkeypatch.setattr(tiles, "_OVERRIDE", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA Imaginary 9000")
    return tmp_path


@pytest.mark.parametrize("times", [{"nearest": 2e-3, "phases": 1e-3}, {"nearest": 1e-3, "phases": 2e-3}])
def test_the_faster_is_taken_where_it_was_measured(card, times):
    assert upsampling.choose(GPU) == upsampling.choose(torch.device("cpu")) == "nearest"
    tiles.note(card / "nvidia_imaginary_9000.json", "upsampling", {}, upsampling=times)
    assert upsampling.choose(GPU) == min(times, key=times.__getitem__)
    assert upsampling.choose(torch.device("cpu")) == "nearest"


def test_the_fast_model_takes_what_is_chosen(bundle, reference, graph_engine, make_request, monkeypatch):
    batch = make_request("a red circle", output_type="pt")
    expected = reference.run(batch).image
    for name, module in fused_vae.UPSAMPLINGS.items():
        monkeypatch.setattr(upsampling, "choose", lambda device, name=name: name)
        replaced = FastModel(bundle, packs=False).replaced
        assert ("Upsample2D", module.__name__) in {(row.was, row.now) for row in replaced if "vae" in row.path}
        image = graph_engine().run(batch).image
        assert float((image - expected).abs().max()) < 1e-4
