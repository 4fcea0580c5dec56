"""What `impl="auto"` takes on a GPU that was measured: the winner of a suite's races, and never a loser by noise."""

from __future__ import annotations

import json

import pytest
import torch

from ragturbo import ops
from ragturbo.bench import fastest
from ragturbo.errors import InvalidRequest
from ragturbo.kernels import tiles
from ragturbo.ops import dispatch

GPU = "NVIDIA Imaginary 9000"


def entry(op, microseconds, flags=(), **sizes):
    sizes = {**fastest.RACES[op], **sizes}
    return {"extra_info": {"op": op, "sizes": sizes, "seconds": {"p50": microseconds / 1e6}, "flags": list(flags)}}


def suite(gpu, *entries):
    return {"machine_info": {"ragturbo": {"gpu": gpu and {"name": gpu}, "cpu": "a CPU"}}, "benchmarks": list(entries)}


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
    # A win within the noise is none, and an op nobody raced is left as it was.
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


def test_a_suite_of_a_cpu_settles_nothing(tmp_path):
    path = tmp_path / "suite.json"
    for text in (suite(None, *RACED), suite(GPU)):
        path.write_text(json.dumps(text))
        with pytest.raises(InvalidRequest, match="no race on a GPU"):
            fastest.main([str(path), "--out", str(tmp_path)])
