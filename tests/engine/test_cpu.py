"""The graph engine on a CPU: packed weights, native layers, and products in bf16."""

from __future__ import annotations

import logging

import pytest
import torch

from ragturbo.config import GeneratorConfig
from ragturbo.engine import dtype as dtypes
from ragturbo.engine.build import make_engine
from ragturbo.engine.graph_engine import GraphEngine
from ragturbo.errors import ModelError
from ragturbo.model import onednn
from ragturbo.model.bundle import Bundle
from ragturbo.model.fold import FoldedUNet

pytestmark = pytest.mark.skipif(onednn.why_not() is not None, reason=str(onednn.why_not()))


@pytest.fixture
def able(monkeypatch):
    """A CPU with bf16 products, and a model that is large enough for them."""
    monkeypatch.setattr(onednn, "bf16_reason", lambda: (True, "this CPU has AMX"))
    monkeypatch.setattr(dtypes, "SMALL", 0)


def relative(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return float((ours.float() - exact).norm() / exact.norm())


def test_rows_of_a_bucket_have_the_bits_of_that_bucket_at_any_place(bundle, make_request):
    engine = make_engine(bundle, GeneratorConfig())
    names = ["a red circle", "a blue cat", "a dog", "a tree"]
    first = engine.run(make_request(*names, seed=5)).latents
    for shift in (1, 2, 3):
        order = names[shift:] + names[:shift]
        batch = make_request(*order, seed=5)
        batch.latents.copy_(make_request(*names, seed=5).latents.roll(-shift, 0))
        assert torch.equal(engine.run(batch).latents, first.roll(-shift, 0))


@pytest.mark.parametrize("size", [(16, 16), (24, 16), (17, 20), (9, 33)])
def test_any_size_is_the_oracle_also_where_upsampling_by_two_does_not_give_it(bundle, reference, make_request, size):
    latents = torch.randn(2, 4, *size, generator=torch.Generator().manual_seed(3))
    batch = make_request("a red circle", "a dog", latents=latents, output_type="pt")
    image = make_engine(bundle, GeneratorConfig()).run(batch).image
    assert float((image - reference.run(batch).image).abs().max()) < 1e-5


def test_products_in_bf16_agree_and_keep_keys_neighbours_and_lambda(bundle, able, source, reference, make_request):
    engine = make_engine(bundle, GeneratorConfig())
    assert isinstance(engine, GraphEngine) and engine.model.dtype == torch.bfloat16
    assert "AMX, and its latents agree with those of float32 to" in engine.describe()["products"]
    for mode, k in (("none", 0), ("adapter", 2), ("slerp", 1)):
        batch = make_request("a red circle", "a dog", mode=mode, k=k, database=source if k else None)
        ours, exact = engine.run(batch), reference.run(batch)
        other = reference.run(make_request("a tree", "a cat", mode=mode, k=k, database=source if k else None))
        assert relative(ours.latents, exact.latents) < 0.02
        assert torch.equal(ours.ids, exact.ids) and torch.allclose(ours.lam, exact.lam, atol=1e-6)
        assert ours.latents.dtype == torch.float32
        assert relative(other.latents, exact.latents) > 1e-4
    image = make_request("a red circle", output_type="pt")
    assert float((engine.run(image).image - reference.run(image).image).abs().max()) < 0.05
    # The bundle is the oracle, and stays in fp32.
    assert {p.dtype for p in bundle.unet.unet.parameters()} == {torch.float32}


def test_bf16_is_taken_only_where_it_is_faster_larger_and_agrees(bundle, monkeypatch, caplog):
    def products(**options):
        engine = make_engine(bundle, GeneratorConfig(**options))
        return engine.model.dtype, engine.describe()["products"]

    assert products()[0] == torch.float32
    monkeypatch.setattr(onednn, "bf16_reason", lambda: (True, "this CPU has AMX"))
    assert products() == (torch.float32, "float32: a small model gains little from bfloat16")
    monkeypatch.setattr(dtypes, "SMALL", 0)
    assert products()[0] == torch.bfloat16
    assert products(dtype="float32") == (torch.float32, "float32: requested")
    monkeypatch.setattr(dtypes, "AGREEMENT", 1000.0)
    with caplog.at_level(logging.WARNING, "ragturbo"):
        kind, why = products()
    assert kind == torch.float32 and "1000 needed" in why and "dtype='bfloat16' asks for it" in caplog.text
    monkeypatch.setattr(dtypes, "agreement", lambda *_: float("nan"))
    assert products()[0] == torch.float32
    monkeypatch.setattr(onednn, "bf16_reason", lambda: (False, "this CPU has neither"))
    assert products() == (torch.float32, "float32: this CPU has neither")


def test_a_bundle_in_bf16_is_computed_in_bf16(model_folder, make_request, reference):
    own = Bundle.load(model_folder, device="cpu", dtype=torch.bfloat16)
    engine = make_engine(own, GeneratorConfig(dtype="bfloat16"))
    assert engine.model.dtype == torch.bfloat16 and engine.describe()["products"] == "bfloat16: requested"
    batch = make_request("a red circle")
    assert relative(engine.run(batch).latents, reference.run(batch).latents) < 0.03


def test_another_dtype_needs_packed_weights(bundle):
    with pytest.raises(ModelError, match="only packed weights"):
        FoldedUNet(bundle.unet, [999], dtype=torch.bfloat16)


def test_psnr_is_over_the_range_and_nan_for_nan():
    exact = torch.linspace(-4, 4, 1000)
    assert dtypes.psnr_over_range(exact, exact) == float("inf")
    assert abs(dtypes.psnr_over_range(exact + 0.08, exact) - 40) < 1e-3
    assert not dtypes.psnr_over_range(exact * float("nan"), exact) > 0


def test_making_a_generator_leaves_the_users_random_numbers_alone(bundle):
    onednn.why_not.cache_clear()
    torch.manual_seed(3)
    expected = torch.randn(4)
    torch.manual_seed(3)
    make_engine(bundle, GeneratorConfig())
    assert torch.equal(torch.randn(4), expected)


def test_a_lora_of_peft_on_an_outer_convolution_is_merged(model_folder, make_request):
    from peft import LoraConfig

    own = Bundle.load(model_folder, device="cpu")
    own.unet.unet.add_adapter(LoraConfig(r=2, target_modules=["conv", "conv_in"], init_lora_weights=False))
    engine = make_engine(own, GeneratorConfig())
    batch = make_request("a red circle")
    assert isinstance(engine, GraphEngine)
    assert relative(engine.run(batch).latents, engine.reference.run(batch).latents) < 1e-5


def test_packed_weights_are_counted_and_sizes_are_bounded(bundle, make_request, monkeypatch):
    engine = make_engine(bundle, GeneratorConfig())
    assert engine.describe()["packed weights of the UNet, bytes"] == 0
    first = engine.run(make_request("a red circle")).latents
    held = engine.describe()["packed weights of the UNet, bytes"]
    assert held > 0
    monkeypatch.setattr(onednn, "_SIZES", 2)
    for side in (10, 12, 14, 18):
        engine.run(make_request("a red circle", latents=torch.zeros(1, 4, side, side)))
    assert all(len(weight._by_size) <= 2 for weight in engine.model.unet.ties.packed)
    assert torch.equal(engine.run(make_request("a red circle")).latents, first)
