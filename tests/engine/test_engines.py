"""Which engine runs, what it reports about itself, and what a failed capture reports about the model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch._dynamo.utils import counters

from ragturbo.config import GeneratorConfig
from ragturbo.engine import attention
from ragturbo.engine.build import make_engine
from ragturbo.engine.cuda_graphs import culprit
from ragturbo.engine.graph_engine import GraphEngine
from ragturbo.engine.recorder import Uncaptured
from ragturbo.engine.reference import ReferenceEngine
from ragturbo.errors import ModelError
from ragturbo.kernels import tiles
from ragturbo.model.bundle import Bundle
from ragturbo.ops import dispatch

PROMPTS = ("a red circle", "a blue cat")


def test_a_decoder_that_overflows_in_plain_torch_moves_to_fp32_and_says_so(model_folder, make_request, caplog):
    bundle = Bundle.load(model_folder, device="cpu", dtype=torch.float16)
    engine, batch = ReferenceEngine(bundle), make_request(*PROMPTS, output_type="pt")
    assert bool(engine.run(batch).ok.all()) and engine.describe()["vae dtype"] == "float16"
    # NaN latents are an error of the request, not of the engine.
    broken = replace(batch, latents=torch.full_like(batch.latents, float("nan")))
    assert not engine.run(broken).ok.any() and engine.describe()["vae dtype"] == "float16"
    with torch.no_grad():
        bundle.vae.module.decoder.conv_in.weight.mul_(3e4)
    result = engine.run(batch)
    assert bool(result.ok.all()) and engine.describe()["vae dtype"] == "float32"
    assert "float32 from now on" in caplog.text and bundle.vae.dtype == torch.float16
    assert torch.equal(engine.run(batch).image, result.image)


def test_a_cpu_runs_the_fused_steps_and_says_why_if_not(bundle, monkeypatch):
    fused = make_engine(bundle, GeneratorConfig())
    assert isinstance(fused, GraphEngine) and isinstance(fused.recorder, Uncaptured)
    assert "oneDNN" in fused.describe()["weights"] and fused.describe()["capture"].startswith("none")
    monkeypatch.setattr("ragturbo.model.onednn.why_not", lambda: "this build of torch has no oneDNN")
    plain = make_engine(bundle, GeneratorConfig())
    assert isinstance(plain, ReferenceEngine) and "no oneDNN" in plain.describe()["plain torch"]
    compiled = make_engine(bundle, GeneratorConfig(compile=True))
    assert isinstance(compiled, GraphEngine) and isinstance(compiled.recorder, Uncaptured)
    assert compiled.describe()["replaced"]["DownBlock2D -> torch.compile"] == 1


def test_attention_is_what_was_asked_for_or_the_fastest_that_was_measured(monkeypatch, tmp_path):
    gpu = torch.device("cuda")
    monkeypatch.setattr("ragturbo.kernels.tiles.INSTALLED", tmp_path)
    monkeypatch.setattr(dispatch, "HAS_XFORMERS", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H200")
    assert attention.choose("auto", gpu, torch.float16)[0] == "sdpa"
    times = {"sdpa": 2e-3, "triton": 1e-3, "xformers": 1e-4}
    tiles.note(tmp_path / "nvidia_h200.json", "attention", {"gpu": "NVIDIA H200"}, attention=times)
    name, why = attention.choose("auto", gpu, torch.float16)
    # An implementation that is not installed is not chosen.
    assert name == "triton" and "triton 1000 us, sdpa 2000 us" in why
    assert attention.choose("sdpa", gpu, torch.float16) == ("sdpa", "requested")
    assert attention.choose("auto", torch.device("cpu"), torch.float32)[0] == "sdpa"


def test_a_model_that_cannot_be_folded_runs_plain_or_is_refused_by_name(bundle, monkeypatch):
    def refuse(*_: object, **options: object) -> None:
        raise ModelError("this UNet cannot be folded: class_embed_type")

    monkeypatch.setattr("ragturbo.engine.fast_model.FoldedUNet", refuse)
    with pytest.raises(ModelError, match="class_embed_type"):
        make_engine(bundle, GeneratorConfig(compile=True))
    # As on a GPU, where fused modules are the first choice.
    monkeypatch.setattr("ragturbo.engine.graph_engine.CudaGraphs", lambda device: Uncaptured())
    monkeypatch.setattr(Bundle, "device", torch.device("cuda"))
    with pytest.raises(ModelError, match="class_embed_type"):
        make_engine(bundle, GeneratorConfig(engine="graph"))
    engine = make_engine(bundle, GeneratorConfig())
    assert isinstance(engine, ReferenceEngine) and "class_embed_type" in engine.describe()["plain torch"]


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
def test_the_compiled_engine_is_the_oracle_and_compiles_every_block_whole_and_once(
    bundle, reference, make_request, fresh_compiler
):
    """Through Inductor, where there is a C++ compiler: a minute and more."""
    engine = make_engine(bundle, GeneratorConfig(compile=True))
    batch = make_request(*PROMPTS, output_type="pt")
    got, expected = engine.run(batch), reference.run(batch)
    assert float((got.image - expected.image).abs().max()) < 1e-4
    blocks = engine.describe()["replaced"]
    count = sum(number for name, number in blocks.items() if name.endswith("torch.compile"))
    assert counters["stats"]["unique_graphs"] == count and not counters["graph_break"]
    # Other numbers compile nothing, and change the image.
    other = engine.run(make_request("a dog", "a cat", seed=5, output_type="pt"))
    assert counters["stats"]["unique_graphs"] == count
    assert float((other.image - got.image).abs().max()) > 1e-2


def test_a_broken_capture_names_the_call_that_broke_it(bundle, monkeypatch):
    """Exiting the capture raises again, from torch's own frames: the first error is the context of that one."""

    class Capture:
        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    def syncing(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.nn.functional, "normalize", syncing)
    with pytest.raises(RuntimeError) as caught:
        with Capture():
            bundle.text.encode(torch.zeros(1, bundle.text.max_length, dtype=torch.int64))
    where, first = culprit(caught.value)
    assert "ragturbo.model.text" in where and "not permitted" in str(first)
    assert culprit(RuntimeError("elsewhere"))[0] == "an operation"
