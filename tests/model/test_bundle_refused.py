"""Folders that cannot be loaded, with the error for each, and loading without a network."""

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
from safetensors.torch import load_file, save_file

from ragturbo.errors import ModelError
from ragturbo.model.bundle import Bundle
from ragturbo.model.info import BundleInfo

UNET_WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


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
    "truncated": (spoil_truncate, "diffusion_pytorch_model.safetensors is not a complete safetensors file"),
    "pickle": (spoil_pickle, "pickles .unet/diffusion_pytorch_model.bin.*`ragturbo convert \\S+ \\S+-safetensors`"),
    "text-pickle": (spoil_text_pickle, "text_encoder/pytorch_model.bin.*`ragturbo convert \\S+ \\S+-safetensors`"),
    "missing-weight": (spoil_missing, "lacks 1 weights.*mid_block.attentions.0.norm.weight"),
    "missing-text-weight": (spoil_text_missing, "lacks 1 weights.*final_layer_norm.weight"),
    "other-shape": (spoil_shape, "conv_out.bias"),
    "no-unet": (lambda f: shutil.rmtree(f / "unet"), "no folder unet/"),
    "no-vae": (lambda f: shutil.rmtree(f / "vae"), "no folder vae/"),
    "no-tokenizer": (lambda f: shutil.rmtree(f / "tokenizer"), "no folder tokenizer/"),
    "no-scheduler": (lambda f: shutil.rmtree(f / "scheduler"), "no folder scheduler/"),
    "no-index": (lambda f: (f / "model_index.json").unlink(), "no model_index.json"),
    "no-weights": (lambda f: (f / UNET_WEIGHTS).unlink(), "no weights"),
    "two-encoders": (lambda f: set_json(f / "model_index.json", text_encoder_2=["a", "b"]), "one CLIP text encoder"),
    "other-encoder": (lambda f: set_json(f / "text_encoder/config.json", model_type="t5"), "'t5'"),
    "unknown-scheduler": (lambda f: set_json(f / "scheduler/scheduler_config.json", _class_name="Fast"), "Fast"),
    "no-scheduler-class": (
        lambda f: set_json(f / "scheduler/scheduler_config.json", _class_name="UNet2DConditionModel"),
        "no scheduler",
    ),
    "odd-scheduler": (
        lambda f: set_json(f / "scheduler/scheduler_config.json", beta_start="small"),
        "no scheduler of diffusers can be made",
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
    with pytest.raises(ModelError, match="there is no file"):
        Bundle.load(tmp_path / "none.safetensors", device="cpu")
    for name in (tmp_path / "nowhere", "./nowhere", "~/nowhere-at-all", "no such thing", "../up"):
        with pytest.raises(ModelError, match="no folder"):
            Bundle.load(name, device="cpu")
    with pytest.raises(ModelError, match="ragturbo convert"):
        Bundle.load("model.ckpt", device="cpu")
    (tmp_path / "one.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="single file.*from_single_file"):
        Bundle.load(tmp_path / "one.safetensors", device="cpu")


def test_parts_that_do_not_fit_each_other_are_refused(tiny: ModuleType, tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ModelError, match="32 wide.*48"):
        Bundle.load(tiny.make_bundle(tmp_path / "wide", cross_attention_dim=48), device="cpu")
    with pytest.raises(ModelError, match="conditions besides the prompt"):
        Bundle.load(tiny.make_bundle(tmp_path / "xl", "sdxl"), device="cpu")


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


def refuse(*arguments: Any) -> None:
    raise AssertionError(f"a connection was tried: {arguments[1:]}")


OFFLINE = """
import socket, sys
def refuse(*arguments):
    sys.exit(f"a connection was tried: {arguments[1:]}")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
from ragturbo.errors import ModelError
from ragturbo.model.bundle import Bundle
print(Bundle.load("someone/tiny", device="cpu").name)
try:
    Bundle.load("someone/else", device="cpu")
except ModelError as error:
    print(error)
"""


@pytest.fixture
def cache(tmp_path: Path, tiny_sd21: Path) -> Path:
    """A hub cache with a model, as after a download."""
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
    with pytest.raises(ModelError, match="^offline: .*someone/else"):
        Bundle.load("someone/else", **options)
    with pytest.raises(ModelError, match="someone/tiny.*revision v2"):
        Bundle.load("someone/tiny", revision="v2", **options)
    # A folder needs no connection, even without local_files_only.
    assert Bundle.load(tiny_sd21, device="cpu").unet.channels == 64


def test_the_offline_variable_is_honoured_with_no_connection_tried(cache: Path) -> None:
    # The hub client reads the variable when it is imported, hence a new process.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", OFFLINE], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    loaded, refusal = done.stdout.splitlines()[:2]
    assert loaded == "someone/tiny" and "someone/else" in refusal and "offline" in refusal
