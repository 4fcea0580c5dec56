"""Comparing attention and upsampling: only correct results are timed, and the times are stored for the engine."""

from __future__ import annotations

import pytest
import torch

from benchmarks import model_races
from ragturbo.engine import attention, upsampling
from ragturbo.kernels import tiles
from ragturbo.model import fused_vae
from ragturbo.ops import dispatch

CARD = {"gpu": {"name": "NVIDIA Imaginary 9000", "driver": "1"}, "packages": {"torch": "3"}, "commit": "abc"}


def width(call):
    """Returned instead of a measured time."""
    return float(call().shape[1])


def test_the_attentions_of_an_image_are_summed_and_one_that_gives_something_else_is_not_timed(monkeypatch):
    monkeypatch.setattr("ragturbo.model.fused.attend", lambda q, k, v, heads, name: q + (name == "triton"))
    monkeypatch.setattr(model_races, "ATTENTION_SIZES", ((64, 77, 2, 1), (16, 16, 2, 5)))
    monkeypatch.setattr(dispatch, "refusal", lambda *asked: None)
    assert model_races.attention("cpu", width) == {"sdpa": 64.0 + 5 * 16, "xformers": 64.0 + 5 * 16}
    monkeypatch.setattr(dispatch, "refusal", lambda op, name, *asked: None if name == "sdpa" else "not installed")
    assert set(model_races.attention("cpu", width)) == {"sdpa"}


def test_an_upsampling_that_gives_something_else_is_not_timed(monkeypatch):
    monkeypatch.setattr(model_races, "UPSAMPLING_SIZES", ((8, 4), (16, 3)))
    with torch.inference_mode():
        assert model_races.upsampling("cpu", width) == {"nearest": 24.0, "phases": 24.0}
        monkeypatch.setattr(fused_vae, "interleave", lambda phases: phases.new_zeros(1, phases.shape[1] // 4, 2, 2))
        monkeypatch.setattr(model_races, "UPSAMPLING_SIZES", ((8, 1), (16, 1)))
        assert model_races.upsampling("cpu", width) == {"nearest": 24.0}


@pytest.mark.parametrize("name, times", [("attention", {"sdpa": 2e-3, "triton": 1e-3}),
                                         ("upsampling", {"nearest": 2e-3, "phases": 1e-3})])  # fmt: skip
def test_a_race_is_written_where_the_engine_looks(monkeypatch, tmp_path, name, times):
    monkeypatch.setattr("ragturbo.machine.describe", lambda: CARD)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA Imaginary 9000")
    monkeypatch.setattr(dispatch, "refusal", lambda *asked: None)
    monkeypatch.setattr(tiles, "INSTALLED", tmp_path)
    monkeypatch.setattr(tiles, "_OVERRIDE", None)
    monkeypatch.setitem(model_races.RACES, name, lambda device, time: times)
    assert model_races.main([name, "--out", str(tmp_path)]) == 0
    fastest = {
        "attention": lambda: attention.choose("auto", torch.device("cuda"), torch.float16)[0],
        "upsampling": lambda: upsampling.choose(torch.device("cuda")),
    }
    assert fastest[name]() == min(times, key=times.__getitem__)
    made_on = tiles.known(tmp_path / "nvidia_imaginary_9000.json")["made_on"][name]
    assert (made_on["commit"], made_on["torch"], made_on["driver"]) == ("abc", "3", "1")
