"""Loading and saving of folders, hub snapshots and the embedded model, and their fingerprints."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from ragturbo.errors import ModelError
from ragturbo.model.adapter import HSpaceAdapter
from ragturbo.model.bundle import Bundle
from ragturbo.model.clip_key import ClipKey
from ragturbo.model.lora import NAME

UNET_WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def run(bundle: Bundle) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        text = bundle.text.encode(bundle.text.tokenize(["a red circle"]).input_ids).hidden_states
        state = bundle.unet.encode(torch.randn(1, 4, 16, 16, generator=generator), torch.tensor(999), text)
        return bundle.unet.decode(state)


def add_lora(bundle: Bundle, targets: str = r"up_blocks\..*\.(to_q|to_v)", seed: int = 0) -> None:
    import peft

    torch.manual_seed(seed)
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    bundle.unet.unet.add_adapter(config, adapter_name=NAME)


def train_adapter(bundle: Bundle) -> None:
    bundle.adapter = HSpaceAdapter(bundle.unet.channels)
    torch.nn.init.normal_(bundle.adapter.proj_out.weight, std=0.1)


def test_a_plain_diffusers_folder_is_a_bundle(tiny_sd21: Path, bundle: Bundle) -> None:
    assert bundle.info.distilled and bundle.info.key_kind == "pooled" and bundle.adapter is None
    assert bundle.device == torch.device("cpu") and bundle.dtype == torch.float32
    assert bundle.default_size == 128 and bundle.database_path is None and not bundle.has_lora
    for module in (bundle.unet.unet, bundle.vae.module, bundle.text.text_encoder):
        assert not module.training and not any(p.requires_grad for p in module.parameters())


def test_an_undistilled_folder_is_known_by_its_scheduler(folders: dict[str, Path]) -> None:
    assert not Bundle.load(folders["sd15"], device="cpu").info.distilled


def test_what_is_saved_comes_back_with_adapter_and_lora(tiny_sd21: Path, tmp_path: Path) -> None:
    bundle = Bundle.load(tiny_sd21, device="cpu")
    plain = run(bundle)
    train_adapter(bundle)
    add_lora(bundle)
    tuned = run(bundle)
    assert not torch.allclose(plain, tuned, atol=1e-4)
    saved = bundle.save(tmp_path / "trained")
    assert {path.name for path in saved.iterdir()} == {
        "adapter.safetensors", "decoder_lora", "model_index.json", "ragturbo.json", "scheduler", "text_encoder",
        "tokenizer", "unet", "vae",
    }  # fmt: skip
    assert {path.name for path in (saved / "decoder_lora").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    again = Bundle.load(saved, device="cpu")
    assert again.has_lora and again.info.adapter_kind == "transformer" and again.info.distilled
    torch.testing.assert_close(run(again), tuned, rtol=0, atol=1e-6)
    assert again.adapter is not None and bundle.adapter is not None
    for name, value in bundle.adapter.state_dict().items():
        assert torch.equal(again.adapter.state_dict()[name], value)
    # The paper's baseline: neither adapter nor LoRA, and unchanged base weights.
    without = Bundle.load(saved, device="cpu", adapter=False)
    assert without.adapter is None and not without.has_lora
    assert torch.equal(run(without), plain)
    # diffusers reads the same folder.
    pipeline = StableDiffusionPipeline.from_pretrained(saved)
    for name, value in pipeline.unet.state_dict().items():
        assert torch.equal(value, without.unet.unet.state_dict()[name])


def test_an_adapter_can_be_swapped_and_a_wrong_one_changes_nothing(tiny_sd21: Path, tmp_path: Path) -> None:
    bundle = Bundle.load(tiny_sd21, device="cpu")
    plain = run(bundle)
    for seed in (1, 2):
        other = Bundle.load(tiny_sd21, device="cpu")
        add_lora(other, seed=seed)
        if seed == 1:
            train_adapter(other)
        other.save(tmp_path / str(seed))
        (tmp_path / f"out{seed}").mkdir()
        torch.save(run(other), tmp_path / f"out{seed}" / "t.pt")
    for seed in (1, 2, 1):
        bundle.load_adapter(tmp_path / str(seed))
        torch.testing.assert_close(run(bundle), torch.load(tmp_path / f"out{seed}" / "t.pt"), rtol=0, atol=1e-6)
        assert (bundle.adapter is not None) == (seed == 1)
    HSpaceAdapter(48).save(tmp_path / "wide")
    with pytest.raises(ModelError, match="width 48.*64"):
        bundle.load_adapter(tmp_path / "wide")
    torch.testing.assert_close(run(bundle), torch.load(tmp_path / "out1" / "t.pt"), rtol=0, atol=1e-6)
    with pytest.raises(ModelError, match="neither"):
        bundle.load_adapter(tmp_path / "out1")
    with pytest.raises(ModelError, match="ragturbo convert"):
        bundle.load_adapter(tmp_path / "adapter.pt")
    (tmp_path / "old").mkdir()
    torch.save({}, tmp_path / "old" / "adapter.bin")
    with pytest.raises(ModelError, match="ragturbo convert.*adapter.bin"):
        bundle.load_adapter(tmp_path / "old")
    assert torch.equal(run(Bundle.load(tmp_path / "1", device="cpu", adapter=False)), plain)
    # Loading an adapter without a LoRA removes the old LoRA, too.
    HSpaceAdapter(64).save(tmp_path / "bare")
    bundle.load_adapter(tmp_path / "bare")
    assert not bundle.has_lora and torch.equal(run(bundle), plain)


def test_a_lora_that_reaches_beyond_the_decoder_is_refused(tiny_sd21: Path, tmp_path: Path) -> None:
    bundle = Bundle.load(tiny_sd21, device="cpu")
    add_lora(bundle, targets=r"(up|down)_blocks\..*\.to_q")
    with pytest.raises(ModelError, match="down_blocks"):
        Bundle.load(bundle.save(tmp_path / "wide"), device="cpu")


def test_a_lora_of_another_model_is_refused(folders: dict[str, Path], tiny: ModuleType, tmp_path: Path) -> None:
    bundle = Bundle.load(folders["sd21"], device="cpu")
    add_lora(bundle)
    saved = bundle.save(tmp_path / "a")
    wide = tiny.make_bundle(tmp_path / "wide", block_out_channels=(32, 64, 64, 64))
    with pytest.raises(ModelError, match="does not fit"):
        Bundle.load(wide, device="cpu", adapter=saved)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_fingerprint_is_the_models_whatever_it_is_loaded_as(tiny_sd21: Path, bundle: Bundle, dtype: Any) -> None:
    assert Bundle.load(tiny_sd21, device="cpu", dtype=dtype).fingerprint() == bundle.fingerprint()
    assert set(bundle.fingerprint()) == {"text_encoder", "unet_encoder", "vae_encoder"}


def test_a_half_precision_copy_of_a_model_has_its_fingerprint(folder: Path, bundle: Bundle) -> None:
    for file in folder.glob("*/*.safetensors"):
        halve(file, file)
    assert Bundle.load(folder, device="cpu").fingerprint() == bundle.fingerprint()


def halve(file: Path, to: Path) -> None:
    save_file({n: v.half() for n, v in load_file(file).items()}, to, metadata={"format": "pt"})


def test_half_precision_variants_are_taken_only_where_there_is_nothing_else(folder: Path, bundle: Bundle) -> None:
    whole = {file: file.with_name(f"{file.stem}.fp16.safetensors") for file in folder.glob("*/*.safetensors")}
    assert len(whole) == 3
    for file, half in whole.items():
        halve(file, half)
    # A clone of a repository has both; fp32 needs the full ones.
    assert torch.equal(run(Bundle.load(folder, device="cpu")), run(bundle))
    for file in whole:
        file.unlink()
    only = Bundle.load(folder, device="cpu")
    assert only.dtype == torch.float32 and only.fingerprint() == bundle.fingerprint()
    assert not torch.equal(run(only), run(bundle))
    torch.testing.assert_close(run(only), run(bundle), rtol=0.05, atol=0.05)


def test_weights_in_pieces_are_one_model(folder: Path, bundle: Bundle) -> None:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    (folder / UNET_WEIGHTS).unlink()
    unet.save_pretrained(folder / "unet", max_shard_size="1MB")
    pieces = sorted((folder / "unet").glob("*.safetensors"))
    assert len(pieces) > 1
    again = Bundle.load(folder, device="cpu")
    # Weights are compared, not images: CPU kernels may sum in another order if memory is aligned differently.
    now, before = again.unet.unet.state_dict(), bundle.unet.unet.state_dict()
    assert now.keys() == before.keys() and all(torch.equal(now[name], before[name]) for name in now)
    assert again.fingerprint() == bundle.fingerprint()
    pieces[-1].write_bytes(pieces[-1].read_bytes()[:-1])
    with pytest.raises(ModelError, match=f"{pieces[-1].name} is not a complete"):
        Bundle.load(folder, device="cpu")


def test_lora_and_layout_leave_the_fingerprint_alone(tiny_sd21: Path, tmp_path: Path, bundle: Bundle) -> None:
    tuned = Bundle.load(tiny_sd21, device="cpu")
    tuned.unet.unet.to(memory_format=torch.channels_last)
    add_lora(tuned)
    train_adapter(tuned)
    from ragturbo.model.bundle import fingerprints

    live = fingerprints(tuned.text.text_encoder, tuned.unet.unet, tuned.vae.module)
    assert live == bundle.fingerprint()
    assert Bundle.load(tuned.save(tmp_path / "tuned"), device="cpu").fingerprint() == bundle.fingerprint()


@pytest.mark.parametrize(
    "part, weight, changed",
    [
        ("unet", "down_blocks.1.resnets.0.conv1.weight", "unet_encoder"),
        ("unet", "mid_block.attentions.0.proj_in.weight", "unet_encoder"),
        ("unet", "up_blocks.1.resnets.0.conv1.weight", None),
        ("vae", "encoder.conv_in.weight", "vae_encoder"),
        ("vae", "decoder.conv_in.weight", None),
        ("text_encoder", "final_layer_norm.weight", "text_encoder"),
    ],
)
def test_a_fingerprint_knows_what_features_depend_on(
    folder: Path, bundle: Bundle, part: str, weight: str, changed: str | None
) -> None:
    file = next((folder / part).glob("*.safetensors"))
    state = load_file(file)
    name = next(n for n in state if n.endswith(weight))
    state[name] = state[name] * 1.01
    save_file(state, file, metadata={"format": "pt"})
    now = Bundle.load(folder, device="cpu").fingerprint()
    assert {n for n, v in bundle.fingerprint().items() if now[n] != v} == ({changed} if changed else set())


def test_the_tiny_vae_takes_the_place_of_the_full_one(tiny: ModuleType, folder: Path, tmp_path: Path) -> None:
    tiny.tiny_vae().save_pretrained(tmp_path / "taesd")
    for choice, place in ((str(tmp_path / "taesd"), None), ("tiny", folder / "vae_tiny")):
        if place is not None:
            shutil.copytree(tmp_path / "taesd", place)
        bundle = Bundle.load(folder, device="cpu", vae=choice)
        assert type(bundle.vae.module).__name__ == "AutoencoderTiny"
        # Searching needs no VAE: a database that was built with the full one still matches.
        assert set(bundle.fingerprint()) == {"text_encoder", "unet_encoder", "substitute_vae_encoder"}
        with torch.no_grad():
            assert bundle.vae.decode(torch.zeros(1, 4, 4, 4)).shape == (1, 3, 32, 32)
    with pytest.raises(ModelError, match="not an AutoencoderTiny"):
        Bundle.load(folder, device="cpu", vae=str(folder / "vae"))


def test_a_bundle_with_a_clip_key_comes_back_with_it(tiny_sd21: Path, tmp_path: Path) -> None:
    bundle = Bundle.load(tiny_sd21, device="cpu")
    key = ClipKey(32, 4, 24, 128)
    torch.nn.init.normal_(key.text_projection)
    key.save(tiny := tmp_path / "key")
    shutil.copytree(tiny_sd21, folder := tmp_path / "model")
    shutil.copy(tiny / "clip_key.safetensors", folder)
    with_key = Bundle.load(folder, device="cpu", dtype=torch.bfloat16)
    assert with_key.text.key_kind == "clip" and with_key.info.key_kind == "clip" and with_key.text.key_dim == 24
    again = Bundle.load(with_key.save(tmp_path / "again"), device="cpu")
    assert again.text.key_kind == "clip" and again.info.key_kind == "clip"
    # Only the key's fingerprint is new.
    assert set(with_key.fingerprint()) - set(bundle.fingerprint()) == {"clip_key"}
    assert bundle.fingerprint().items() <= with_key.fingerprint().items()


def test_the_teacher_is_loaded_only_where_asked_for(folder: Path) -> None:
    with pytest.raises(ModelError, match="teacher_unet"):
        Bundle.load(folder, device="cpu", teacher=True)
    shutil.copytree(folder / "unet", folder / "teacher_unet")
    assert Bundle.load(folder, device="cpu").teacher is None
    teacher = Bundle.load(folder, device="cpu", teacher=True).teacher
    assert torch.equal(teacher.conv_in.weight, Bundle.load(folder, device="cpu").unet.unet.conv_in.weight)


def test_a_database_beside_the_model_is_found(folder: Path) -> None:
    (folder / "database").mkdir()
    assert Bundle.load(folder, device="cpu").database_path == folder / "database"
