"""A decoder LoRA written by peft and loaded without it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ragturbo.errors import ModelError
from ragturbo.model import lora
from ragturbo.model.lora import NAME, LoRALayer, has_lora, load_lora, remove_lora, save_lora
from ragturbo.model.weights import read_safetensors, write_safetensors

TARGETS = r"up_blocks\..*\.(to_q|to_out\.0|ff\.net\.0\.proj|proj_in|conv1|conv_shortcut)"


@pytest.fixture
def unet(tiny: Any) -> Any:
    torch.manual_seed(0)
    return tiny.unet("sd21").requires_grad_(False).eval()


def write(unet: Any, folder: Path, seed: int, **options: Any) -> Any:
    """Add a random LoRA by peft, save it, and return the UNet with peft's layers."""
    import peft

    torch.manual_seed(seed)
    remove_lora(unet)
    config = peft.LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": TARGETS, **options})
    peft.inject_adapter_in_model(config, unet, adapter_name=NAME)
    unet.peft_config = {NAME: config}
    for name, parameter in unet.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    save_lora(unet, folder)
    return unet


@torch.no_grad()
def run(unet: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    x, text = (torch.randn(*shape, generator=generator) for shape in ((2, 4, 16, 16), (2, 7, 32)))
    return unet(x, torch.tensor(999), text).sample


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"rank_pattern": {"to_q": 5}}], ids=str)
def test_what_peft_wrote_draws_as_peft_would_and_is_written_back_as_it_was(unet, tmp_path, options):
    plain = run(unet)
    expected = run(write(unet, tmp_path / "peft", 1, **options))
    remove_lora(unet)
    assert torch.equal(run(unet), plain) and not has_lora(unet)
    load_lora(unet, tmp_path / "peft")
    torch.testing.assert_close(run(unet), expected, rtol=1e-4, atol=1e-4)
    assert (expected - plain).abs().max() > 1e-2 and has_lora(unet)
    save_lora(unet, tmp_path / "ours")
    before, after = (read_safetensors(tmp_path / name / lora.WEIGHTS) for name in ("peft", "ours"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    configs = [json.loads((tmp_path / name / lora.CONFIG).read_text()) for name in ("peft", "ours")]
    assert configs[0] == configs[1]
    # peft itself uses the same names.
    assert {n for n in unet.state_dict() if "lora_" in n} == {
        n for n in write(unet, tmp_path / "again", 1, **options).state_dict() if "lora_" in n
    }


def test_one_after_another_leaves_nothing_of_the_one_before(unet, tmp_path):
    plain, expected = run(unet), {}
    for seed, targets in ((1, TARGETS), (2, TARGETS), (3, r"up_blocks\.1\..*\.to_v")):
        expected[seed] = run(write(unet, tmp_path / str(seed), seed, target_modules=targets))
    remove_lora(unet)
    places = set()
    for seed in (1, 2, 3, 2, 1):
        load_lora(unet, tmp_path / str(seed))
        torch.testing.assert_close(run(unet), expected[seed], rtol=1e-4, atol=1e-4)
    for seed in (1, 2):
        load_lora(unet, tmp_path / str(seed))
        places.add(tuple(m.weight.data_ptr() for m in unet.modules() if isinstance(m, LoRALayer)))
    # For the same layers the memory stays the same, as captured graphs need.
    assert len(places) == 1
    remove_lora(unet)
    assert torch.equal(run(unet), plain) and not any(isinstance(m, LoRALayer) for m in unet.modules())


def test_in_half_precision_and_channels_last_the_merge_is_rounded_once(unet, tmp_path):
    write(unet, tmp_path, 1)
    remove_lora(unet)
    unet.to(memory_format=torch.channels_last).half()
    load_lora(unet, tmp_path)
    state = read_safetensors(tmp_path / lora.WEIGHTS)
    path = "up_blocks.1.resnets.0.conv1"
    a, b = (state[f"base_model.model.{path}.lora_{x}.weight"].double() for x in "AB")
    layer = unet.get_submodule(path)
    exact = layer.base_layer.weight.double() + 5 / 3 * torch.einsum("orhw,rikl->oikl", b, a)
    # The base is fp16: at most half a unit in the last place of the largest weight.
    assert (layer.weight - exact).abs().max() <= 2**-11 * exact.abs().max()
    assert layer.weight.is_contiguous(memory_format=torch.channels_last)
    assert all(m.weight.dtype == torch.float16 for m in unet.modules() if isinstance(m, LoRALayer))


def test_what_does_not_fit_is_refused_by_name_and_changes_nothing(unet, tmp_path):
    expected = run(write(unet, tmp_path / "good", 1))
    load_lora(unet, tmp_path / "good")
    state = read_safetensors(tmp_path / "good" / lora.WEIGHTS)
    name = next(name for name in state if name.endswith("to_q.lora_A.weight"))
    config = json.loads((tmp_path / "good" / lora.CONFIG).read_text())
    cases = {
        "has no up_blocks": ({k.replace("to_q", "to_x"): v for k, v in state.items()}, config),
        "only one of": ({k: v for k, v in state.items() if k != name}, config),
        "has a weight of": ({**state, name: state[name][:, :-1]}, config),
        "holds up_blocks": ({**state, name.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(1)}, config),
        "changes more than the decoder": ({**state, "down_blocks.0.x.lora_A.weight": torch.ones(1)}, config),
        "use_dora=True": (state, {**config, "use_dora": True}),
        "init_lora_weights='pissa'": (state, {**config, "init_lora_weights": "pissa"}),
        "not a LoRA configuration": (state, {}),
    }
    for i, (message, (weights, settings)) in enumerate(cases.items()):
        write_safetensors(tmp_path / str(i) / lora.WEIGHTS, weights)
        (tmp_path / str(i) / lora.CONFIG).write_text(json.dumps(settings))
        with pytest.raises(ModelError, match=message):
            load_lora(unet, tmp_path / str(i))
        torch.testing.assert_close(run(unet), expected, rtol=1e-4, atol=1e-4)


def test_a_model_with_a_decoder_lora_draws_where_peft_is_not_installed(tiny_sd21: Path, tmp_path: Path) -> None:
    """Inference does not need peft."""
    from ragturbo.model.bundle import Bundle

    bundle = Bundle.load(tiny_sd21, device="cpu")
    write(bundle.unet.unet, tmp_path / "any", 1)
    bundle.save(tmp_path / "model")
    program = (
        "import sys; sys.modules['peft'] = None\n"
        "import ragturbo\n"
        f"with ragturbo.Generator.from_pretrained({str(tmp_path / 'model')!r}, device='cpu') as generator:\n"
        "    assert generator.info['decoder_lora'], generator.info\n"
        "    print(generator('a red circle', seed=1).images[0].size)\n"
    )
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.stdout == "(128, 128)\n", done.stderr
