"""`impl="auto"` on a measured GPU: the fastest implementation of a suite, if it is faster by more than the noise."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import fastest
from ragturbo import ops
from ragturbo.errors import InvalidRequest
from ragturbo.kernels import tiles
from ragturbo.ops import dispatch

GPU = "NVIDIA Imaginary 9000"


def entry(op, microseconds, flags=(), **sizes):
    sizes = {**fastest.RACES[op], **sizes}
    return {"extra_info": {"op": op, "sizes": sizes, "seconds": {"p50": microseconds / 1e6}, "flags": list(flags)}}


def suite(gpu, *entries):
    machine = {"gpu": gpu and {"name": gpu, "driver": "1"}, "cpu": "a CPU", "commit": "abc", "sources": "0123",
               "packages": {"torch": "3", "triton": "4", "numpy": "5"}}  # fmt: skip
    return {"machine_info": {"ragturbo": machine}, "benchmarks": list(entries)}


RACED = [
    entry("cross_attention", 5.0, impl="triton"),
    entry("cross_attention", 4.0, impl="sdpa"),
    # Not of the library, another size, and held back: none of these races.
    entry("cross_attention", 1.0, impl="copy"),
    entry("cross_attention", 1.0, impl="xformers", neighbours=16),
    entry("cross_attention", 1.0, ["throttled: power"], impl="compile"),
    entry("topk", 300.0, impl="triton"),
    entry("topk", 299.0, impl="cuda"),
]


def test_auto_takes_the_fastest_measured_on_this_gpu(tmp_path, monkeypatch, capsys):
    path = tmp_path / "suite.json"
    path.write_text(json.dumps(suite(GPU, *RACED)))
    assert fastest.main([str(path), "--out", str(tmp_path / "configs")]) == 0
    assert "cross_attention: sdpa" in capsys.readouterr().out
    written = json.loads((tmp_path / "configs" / "nvidia_imaginary_9000.json").read_text())["fastest"]
    assert written["cross_attention"] == {"impl": "sdpa", "microseconds": {"triton": 5.0, "sdpa": 4.0}}
    # A gain within the noise is ignored, and an op that was not measured is left unchanged.
    assert written["topk"]["impl"] == "triton" and "gather_rows" not in written

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: GPU)
    monkeypatch.setattr(tiles, "_OVERRIDE", str(tmp_path / "configs"))
    monkeypatch.setattr(dispatch, "_measured", None)
    rows = {row.op: row for row in ops.explain("cuda")}
    assert rows["cross_attention"].impl == "sdpa" and "measured" in rows["cross_attention"].reason
    assert rows["topk"].impl == rows["slerp"].impl == "triton"
    assert dispatch.choose("cross_attention", "auto", "cuda", torch.float16) == "sdpa"


def test_the_winners_say_what_they_were_measured_on_and_leave_the_tuners_rows(tmp_path):
    path, configs = tmp_path / "suite.json", tmp_path / "nvidia_imaginary_9000.json"
    path.write_text(json.dumps(suite(GPU, *RACED)))
    tuned = {"slerp": {"N8": {"BLOCK": 1024}}}
    tiles.note(configs, "tiles", {"gpu": GPU, "commit": "earlier"}, tiles=tuned)
    assert fastest.main([str(path), "--out", str(tmp_path)]) == 0
    found = tiles.known(configs)
    assert found["tiles"] == tuned and found["made_on"]["tiles"] == {"gpu": GPU, "commit": "earlier"}
    assert found["made_on"]["fastest"] == {
        "gpu": GPU, "capability": None, "driver": "1", "power_limit_w": None, "commit": "abc", "dirty": None,
        "sources": "0123", "cuda": None, "torch": "3", "triton": "4",
    }  # fmt: skip


def test_a_suite_of_a_cpu_settles_nothing(tmp_path):
    path = tmp_path / "suite.json"
    for text in (suite(None, *RACED), suite(GPU)):
        path.write_text(json.dumps(text))
        with pytest.raises(InvalidRequest, match="nothing on a GPU"):
            fastest.main([str(path), "--out", str(tmp_path)])
