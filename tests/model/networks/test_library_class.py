"""Networks become diffusers' and transformers' classes, in place, where these are needed."""

from __future__ import annotations

import copy
import json
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import diffusers
import pytest
import torch
import transformers
from diffusers import StableDiffusionPipeline

from ragturbo.model import lora
from ragturbo.model.adapter import HSpaceAdapter
from ragturbo.model.bundle import Bundle
from ragturbo.model.lora import LoRALayer
from ragturbo.model.networks.euler import EulerDiscreteScheduler
from ragturbo.model.networks.library_class import Network, become_library_class


def run(bundle: Bundle) -> torch.Tensor:
    sample = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        text = bundle.text.encode(bundle.text.tokenize(["a red circle"]).input_ids).hidden_states
        state = bundle.unet.encode(sample, torch.tensor(999), text)
        return torch.cat([bundle.vae.decode(bundle.unet.decode(state)).flatten(), text.flatten()])


def networks(bundle: Bundle) -> list[Any]:
    return [bundle.text.text_encoder, bundle.unet.unet, bundle.vae.module]


def test_a_bundle_turns_into_the_libraries_classes_over_the_same_tensors(tiny_sd21: Path) -> None:
    bundle = Bundle.load(tiny_sd21, device="cpu")
    before, parts = run(bundle), networks(bundle)
    tensors = [parameter for part in parts for parameter in part.parameters()]
    assert all(isinstance(part, Network) for part in parts)
    assert bundle.to_diffusers() is bundle and networks(bundle) == parts
    kinds = transformers.CLIPTextModel, diffusers.UNet2DConditionModel, diffusers.AutoencoderKL
    assert [type(part) for part in parts] == list(kinds)
    assert type(bundle.scheduler) is diffusers.EulerDiscreteScheduler
    now = [parameter for part in parts for parameter in part.parameters()]
    assert all(one is other for one, other in zip(tensors, now, strict=True))
    for part in parts:
        assert not part.training and not any(module.training for module in part.modules())
        assert not any(tensor.is_meta or tensor.requires_grad for tensor in (*part.parameters(), *part.buffers()))
    assert torch.equal(run(bundle), before)
    # A second time, nothing changes.
    assert become_library_class(parts[1]) is parts[1]


def test_a_pipeline_can_be_made_of_a_bundle(tiny_sd21: Path) -> None:
    bundle = Bundle.load(tiny_sd21, device="cpu").to_diffusers()
    pipe = StableDiffusionPipeline(
        bundle.vae.module, bundle.text.text_encoder, bundle.text.tokenizer, bundle.unet.unet, bundle.scheduler,
        None, None, requires_safety_checker=False,
    )  # fmt: skip
    own = StableDiffusionPipeline.from_pretrained(tiny_sd21, safety_checker=None)
    images = [
        p("a dog", num_inference_steps=1, guidance_scale=0.0, generator=torch.Generator().manual_seed(1),
          output_type="np").images for p in (pipe, own)
    ]  # fmt: skip
    assert (images[0] == images[1]).all()


@pytest.mark.parametrize("method", ["enable_freeu", "enable_gradient_checkpointing", "attn_processors", "save_config"])
def test_a_method_of_the_library_makes_a_network_its_class(tiny_sd21: Path, method: str) -> None:
    unet = Bundle.load(tiny_sd21, device="cpu").unet.unet
    assert isinstance(unet, Network) and not hasattr(unet, "peft_config") and not hasattr(unet, "base_layer")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = unet.nothing
    assert isinstance(unet, Network)
    assert getattr(unet, method)
    assert type(unet) is diffusers.UNet2DConditionModel


def test_saving_leaves_a_bundle_as_it_is(tiny_sd21: Path, tmp_path: Path) -> None:
    bundle = Bundle.load(tiny_sd21, device="cpu")
    bundle.save(tmp_path / "saved")
    assert all(isinstance(part, Network) for part in networks(bundle))
    assert type(bundle.scheduler) is EulerDiscreteScheduler
    for file in ("unet/config.json", "vae/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json"):
        now, before = (json.loads((folder / file).read_text()) for folder in (tmp_path / "saved", tiny_sd21))
        for value in (now, before):
            value.pop("_name_or_path", None)
        assert now == before, file
    for name in ("vocab.json", "merges.txt", "tokenizer.json"):
        assert (tmp_path / "saved" / "tokenizer" / name).exists() == (tiny_sd21 / "tokenizer" / name).exists()


def test_other_conditions_run_in_the_library(tiny_sd21: Path) -> None:
    bundle = Bundle.load(tiny_sd21, device="cpu")
    unet, sample, text = bundle.unet.unet, torch.randn(1, 4, 16, 16), torch.randn(1, 9, 32)
    plain = unet(sample, 9, text).sample
    assert torch.equal(unet(sample, 9, text, class_labels=None).sample, plain) and isinstance(unet, Network)
    residual = torch.ones(1, 64, 2, 2)
    changed = unet(sample, 9, text, mid_block_additional_residual=residual, down_block_additional_residuals=[0.0] * 8)
    assert type(unet) is diffusers.UNet2DConditionModel and not torch.equal(changed.sample, plain)
    other = Bundle.load(tiny_sd21, device="cpu").unet
    other.encode(sample, 9, text, cross_attention_kwargs={"unknown": 1})
    assert type(other.unet) is diffusers.UNet2DConditionModel
    encoder = bundle.text.text_encoder
    encoder(torch.zeros(1, 16, dtype=torch.int64), attention_mask=torch.ones(1, 16))
    assert type(encoder) is transformers.CLIPTextModel


def test_every_public_method_of_diffusers_is_reached(tiny: ModuleType, tiny_sd21: Path, tmp_path: Path) -> None:
    tiny.tiny_vae().save_pretrained(tmp_path)
    bundle = Bundle.load(tiny_sd21, device="cpu", vae=str(tmp_path))
    full = Bundle.load(tiny_sd21, device="cpu").vae.module
    # Of the class alone: names of files, and constructors.
    other = {"config_name", "has_compatibles", "ignore_for_config", "text_encoder_name", "unet_name", "dtype", "device"}
    for network in (bundle.unet.unet, bundle.vae.module, full):
        kind = getattr(diffusers, type(network).__name__)
        names = {name for name in dir(kind) if not name.startswith("_")} - set(dir(network)) - other
        for name in sorted(names):
            asked = copy.deepcopy(network)
            assert hasattr(asked, name) and not isinstance(asked, Network), name


def test_a_lora_and_hooks_stay(tiny_sd21: Path, tmp_path: Path) -> None:
    import peft

    trained = Bundle.load(tiny_sd21, device="cpu")
    config = peft.LoraConfig(r=2, target_modules=r"up_blocks\..*\.(to_q|to_v)", init_lora_weights=False)
    trained.unet.unet.add_adapter(config, adapter_name=lora.NAME)
    trained.adapter = HSpaceAdapter(trained.unet.channels)
    saved = trained.save(tmp_path / "model")

    bundle = Bundle.load(saved, device="cpu")
    unet, calls = bundle.unet.unet, []
    assert isinstance(unet, Network) and bundle.has_lora
    handle = unet.up_blocks[1].register_forward_hook(lambda *_: calls.append(1))
    layers = [module for module in unet.modules() if isinstance(module, LoRALayer)]
    before = run(bundle)
    bundle.to_diffusers()
    assert [module for module in unet.modules() if isinstance(module, LoRALayer)] == layers and layers
    assert bundle.has_lora and torch.equal(run(bundle), before) and len(calls) == 2
    handle.remove()
    run(bundle)
    assert len(calls) == 2
    bundle.load_adapter(saved)
    assert torch.equal(run(bundle), before)


def test_a_network_changes_while_it_runs(tiny_sd21: Path) -> None:
    bundle = Bundle.load(tiny_sd21, device="cpu")
    expected, stop, wrong = run(bundle), threading.Event(), []

    def work() -> None:
        while not stop.is_set():
            if not torch.equal(run(bundle), expected):
                wrong.append(1)

    thread = threading.Thread(target=work)
    thread.start()
    bundle.to_diffusers()
    stop.set()
    thread.join()
    assert not wrong


@torch.no_grad()
def test_a_derived_model_follows_a_network_that_changed_its_class(tiny_sd21: Path, tmp_path: Path) -> None:
    """The graph engine's folded UNet refers to the original by paths, to find a new LoRA."""
    from ragturbo.model.fold import FoldedUNet

    import peft  # isort: skip

    trained = Bundle.load(tiny_sd21, device="cpu")
    config = peft.LoraConfig(r=2, target_modules=r"up_blocks\..*\.(to_q|to_v)", init_lora_weights=False)
    trained.unet.unet.add_adapter(config, adapter_name=lora.NAME)
    saved = trained.save(tmp_path / "model")

    bundle = Bundle.load(tiny_sd21, device="cpu")
    folded = FoldedUNet(bundle.unet, [999])
    bundle.to_diffusers()
    bundle.load_adapter(saved)
    folded = folded if folded.refresh() else FoldedUNet(bundle.unet, [999])
    sample, text = torch.randn(1, 4, 16, 16), torch.randn(1, 9, 32)
    state = bundle.unet.encode(sample, 999, text)
    ours = folded.decode(folded.encode(sample, 0, folded.text_kv(text)))
    torch.testing.assert_close(ours, bundle.unet.decode(state), rtol=1e-4, atol=1e-4)


def test_training_starts_from_the_same_random_adapter() -> None:
    """The order of initialization is that of diffusers' block."""
    from diffusers.models.attention import BasicTransformerBlock

    from ragturbo.model.networks.transformer import BasicTransformerBlock as Own

    torch.manual_seed(3)
    theirs = BasicTransformerBlock(64, 4, 16, cross_attention_dim=64).state_dict()
    torch.manual_seed(3)
    own = Own(64, 4, 16, 64).state_dict()
    assert list(own) == list(theirs) and all(torch.equal(own[name], theirs[name]) for name in own)


def test_a_scheduler_becomes_diffusers(tiny_sd21: Path) -> None:
    scheduler = Bundle.load(tiny_sd21, device="cpu").scheduler
    assert type(scheduler) is EulerDiscreteScheduler
    copied = copy.deepcopy(scheduler)
    copied.set_timesteps(2)
    assert type(copied) is EulerDiscreteScheduler
    assert copied.step_index is None and type(copied) is diffusers.EulerDiscreteScheduler
    made = type(scheduler).from_config(scheduler.config)
    assert type(made) is diffusers.EulerDiscreteScheduler and made.config.timestep_spacing == "trailing"
    other = diffusers.DPMSolverMultistepScheduler.from_config(scheduler.config)
    expected = diffusers.EulerDiscreteScheduler.from_pretrained(tiny_sd21, subfolder="scheduler")
    assert dict(other.config) == dict(diffusers.DPMSolverMultistepScheduler.from_config(expected.config).config)
