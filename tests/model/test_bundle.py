"""Folders, hub snapshots and the embedded model: what loads, what is refused, and what it was built with."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from ragturbo.errors import ModelError
from ragturbo.model import Bundle, HSpaceAdapter
from ragturbo.model.clip_key import ClipKey
from ragturbo.model.info import BundleInfo
from ragturbo.model.lora import NAME

UNET_WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tiny_sd21: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(tiny_sd21, tmp_path / "model"))


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
    # The paper's baseline rows: neither adapter nor LoRA, and the base weights untouched by either.
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
    # An adapter without a LoRA takes the old LoRA away with the old adapter.
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
    # A clone of a repository has both: the full ones are what fp32 asks for.
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
    assert torch.equal(run(again), run(bundle)) and again.fingerprint() == bundle.fingerprint()
    pieces[-1].write_bytes(pieces[-1].read_bytes()[:-1])
    with pytest.raises(ModelError, match=f"{pieces[-1].name} is not a whole"):
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


def spoil_truncate(folder: Path) -> None:
    data = (folder / UNET_WEIGHTS).read_bytes()
    (folder / UNET_WEIGHTS).write_bytes(data[:-1])


def spoil_pickle(folder: Path) -> None:
    torch.save(load_file(folder / UNET_WEIGHTS), folder / "unet/diffusion_pytorch_model.bin")
    (folder / UNET_WEIGHTS).unlink()


def spoil_text_pickle(folder: Path) -> None:
    torch.save(load_file(folder / "text_encoder/model.safetensors"), folder / "text_encoder/pytorch_model.bin")
    (folder / "text_encoder/model.safetensors").unlink()


def spoil_missing(folder: Path) -> None:
    state = load_file(folder / UNET_WEIGHTS)
    state.pop("mid_block.attentions.0.norm.weight")
    save_file(state, folder / UNET_WEIGHTS, metadata={"format": "pt"})


def spoil_text_missing(folder: Path) -> None:
    file = folder / "text_encoder/model.safetensors"
    state = load_file(file)
    state.pop(next(n for n in state if n.endswith("final_layer_norm.weight")))
    save_file(state, file, metadata={"format": "pt"})


def spoil_shape(folder: Path) -> None:
    state = load_file(folder / UNET_WEIGHTS)
    state["conv_out.bias"] = torch.zeros(5)
    save_file(state, folder / UNET_WEIGHTS, metadata={"format": "pt"})


def set_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **values}))


SPOILS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (spoil_truncate, "diffusion_pytorch_model.safetensors is not a whole safetensors file"),
    "pickle": (spoil_pickle, "ragturbo convert .*/diffusion_pytorch_model.safetensors`"),
    # transformers looks for the weights under this name alone.
    "text-pickle": (spoil_text_pickle, "ragturbo convert .*/text_encoder/model.safetensors`"),
    "missing-weight": (spoil_missing, "lacks 1 weights.*mid_block.attentions.0.norm.weight"),
    "missing-text-weight": (spoil_text_missing, "lacks 1 weights.*final_layer_norm.weight"),
    "other-shape": (spoil_shape, "conv_out.bias"),
    "no-unet": (lambda f: shutil.rmtree(f / "unet"), "no folder unet/"),
    "no-vae": (lambda f: shutil.rmtree(f / "vae"), "no folder vae/"),
    "no-tokenizer": (lambda f: shutil.rmtree(f / "tokenizer"), "no folder tokenizer/"),
    "no-scheduler": (lambda f: shutil.rmtree(f / "scheduler"), "no scheduler"),
    "no-index": (lambda f: (f / "model_index.json").unlink(), "model_index.json is not there"),
    "no-weights": (lambda f: (f / UNET_WEIGHTS).unlink(), "no weights"),
    "two-encoders": (lambda f: set_json(f / "model_index.json", text_encoder_2=["a", "b"]), "two text encoders"),
    "other-encoder": (lambda f: set_json(f / "text_encoder/config.json", model_type="t5"), "'t5'"),
    "unknown-scheduler": (lambda f: set_json(f / "scheduler/scheduler_config.json", _class_name="Fast"), "Fast"),
    "no-scheduler-class": (
        lambda f: set_json(f / "scheduler/scheduler_config.json", _class_name="UNet2DConditionModel"),
        "no scheduler",
    ),
    "newer-bundle": (lambda f: set_json(f / "ragturbo.json", format=2, distilled=True, more=1), "format 2"),
    "odd-entry": (lambda f: set_json(f / "ragturbo.json", distilled=True, colour=1), "colour"),
    "odd-value": (lambda f: set_json(f / "ragturbo.json", distilled="yes"), "'yes'"),
    "no-value": (lambda f: set_json(f / "ragturbo.json", key_kind="pooled"), "distilled"),
    "no-json": (lambda f: (f / "ragturbo.json").write_text("{"), "ragturbo.json is not"),
    "no-clip-key": (lambda f: set_json(f / "ragturbo.json", distilled=True, key_kind="clip"), "clip_key.safetensors"),
}


@pytest.mark.parametrize("name", SPOILS)
def test_a_spoiled_folder_is_a_model_error_that_says_what(folder: Path, name: str) -> None:
    spoil, match = SPOILS[name]
    spoil(folder)
    with pytest.raises(ModelError, match=match):
        Bundle.load(folder, device="cpu")


def test_names_that_are_nothing_are_refused_before_any_request(tmp_path: Path) -> None:
    for name in (tmp_path / "nowhere", "./nowhere", "~/nowhere-at-all", "no such thing", "../up"):
        with pytest.raises(ModelError, match="no folder"):
            Bundle.load(name, device="cpu")
    with pytest.raises(ModelError, match="ragturbo convert"):
        Bundle.load("model.ckpt", device="cpu")
    (tmp_path / "one.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="is a file"):
        Bundle.load(tmp_path / "one.safetensors", device="cpu")


def test_parts_that_do_not_fit_each_other_are_refused(tiny: ModuleType, tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ModelError, match="32 wide.*48"):
        Bundle.load(tiny.make_bundle(tmp_path / "wide", cross_attention_dim=48), device="cpu")
    with pytest.raises(ModelError, match="conditions besides the prompt"):
        Bundle.load(tiny.make_bundle(tmp_path / "xl", "sdxl"), device="cpu")


def test_the_tiny_vae_takes_the_place_of_the_full_one(tiny: ModuleType, folder: Path, tmp_path: Path) -> None:
    tiny.tiny_vae().save_pretrained(tmp_path / "taesd")
    for choice, place in ((str(tmp_path / "taesd"), None), ("tiny", folder / "vae_tiny")):
        if place is not None:
            shutil.copytree(tmp_path / "taesd", place)
        bundle = Bundle.load(folder, device="cpu", vae=choice)
        assert bundle.vae.kind == "tiny"
        # Searching needs no VAE: a database built with the full one is still this model's.
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
    # Another key, another fingerprint; the rest is the same model.
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


def refuse(*arguments: Any) -> None:
    raise AssertionError(f"a connection was tried: {arguments[1:]}")


OFFLINE = """
import socket, sys
def refuse(*arguments):
    sys.exit(f"a connection was tried: {arguments[1:]}")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
from ragturbo.errors import ModelError
from ragturbo.model import Bundle
print(Bundle.load("someone/tiny", device="cpu").name)
try:
    Bundle.load("someone/else", device="cpu")
except ModelError as error:
    print(error)
"""


@pytest.fixture
def cache(tmp_path: Path, tiny_sd21: Path) -> Path:
    """The hub's cache with a model in it, as a download leaves it."""
    root = tmp_path / "models--someone--tiny"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("0" * 40)
    shutil.copytree(tiny_sd21, root / "snapshots" / ("0" * 40))
    return tmp_path


def test_local_means_no_connection_is_even_tried(cache: Path, tiny_sd21: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    options: dict[str, Any] = {"device": "cpu", "local_files_only": True, "cache_dir": cache}
    assert Bundle.load("someone/tiny", **options).name == "someone/tiny"
    with pytest.raises(ModelError, match="someone/else.*offline"):
        Bundle.load("someone/else", **options)
    with pytest.raises(ModelError, match="someone/tiny.*revision v2"):
        Bundle.load("someone/tiny", revision="v2", **options)
    # A folder needs no hub, whether anybody says so or not.
    assert Bundle.load(tiny_sd21, device="cpu").unet.channels == 64


def test_the_offline_variable_is_honoured_with_no_connection_tried(cache: Path) -> None:
    # The hub's client reads the variable when it is imported: a process of its own.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", OFFLINE], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    loaded, refusal = done.stdout.splitlines()[:2]
    assert loaded == "someone/tiny" and "someone/else" in refusal and "offline" in refusal


def test_a_bundles_description_checks_itself() -> None:
    for wrong in (
        {"distilled": 1},
        {"distilled": True, "key_kind": "bert"},
        {"distilled": True, "adapter_kind": "mlp"},
        {"distilled": True, "num_neighbors": 0},
        {"distilled": True, "format": "one"},
        {"distilled": True, "provenance": "somewhere"},
    ):
        with pytest.raises(ModelError):
            BundleInfo(**wrong)  # type: ignore[arg-type]
