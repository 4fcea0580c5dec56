"""`ragturbo convert`: pickles become safetensors, and their code does not run."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ragturbo.convert import convert, state_dict_of
from ragturbo.errors import InvalidRequest, ModelError


class Malicious:
    """Runs a command when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch '{self.proof}'",)


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "conv.weight": torch.randn(4, 3, 3, 3, generator=generator).half(),
        "norm.weight": torch.randn(4, generator=generator),
        "head.weight": torch.randn(2, 4, generator=generator).bfloat16(),
        "steps": torch.tensor(7),
    }


def assert_same(path: Path, state: dict[str, torch.Tensor]) -> None:
    read = load_file(path)
    assert read.keys() == state.keys()
    for name, value in state.items():
        assert read[name].dtype == value.dtype
        torch.testing.assert_close(read[name], value, rtol=0, atol=0)


def test_every_wrapper_people_save_gives_the_same_weights(state, tmp_path: Path, caplog) -> None:
    forms = {
        "plain.bin": state,
        "parameters.pt": {name: torch.nn.Parameter(value, value.is_floating_point()) for name, value in state.items()},
        "open_clip.pt": {"epoch": 3, "name": "run", "state_dict": {f"module.{n}": v for n, v in state.items()}},
        "trainer.ckpt": {"model": {"state_dict": {f"_orig_mod.{n}": v for n, v in state.items()}}, "optimizer": {}},
        "noted.pth": {**state, "version": "1.0", "config": {"width": 4}},
    }
    (tmp_path / "old").mkdir()
    for name, form in forms.items():
        torch.save(form, tmp_path / "old" / name)
    torch.save(state, tmp_path / "old" / "legacy.bin", _use_new_zipfile_serialization=False)
    with caplog.at_level("WARNING", "ragturbo"):
        written = convert(tmp_path / "old", tmp_path / "new")
    assert len(written) == len(forms) + 1
    for path in written:
        assert_same(path, state)
    # What was left out is logged.
    assert "noted.pth: left out, not tensors: version, config" in caplog.text


def test_tied_and_transposed_weights_become_plain_ones(tmp_path: Path) -> None:
    big = torch.arange(1000.0).reshape(10, 100)
    state = {"embed": big, "tied": big, "view": big[3:5], "transposed": big.T, "empty": torch.zeros(0, 4)}
    torch.save(state, tmp_path / "tied.bin")
    convert(tmp_path / "tied.bin", tmp_path / "tied.safetensors")
    assert_same(tmp_path / "tied.safetensors", {name: value.contiguous() for name, value in state.items()})


@pytest.mark.parametrize("form", ["inside a checkpoint", "as the whole file", "as a bare pickle"])
def test_a_malicious_pickle_does_not_run(form: str, state, tmp_path: Path) -> None:
    proof, path = tmp_path / "it ran", tmp_path / "weights.bin"
    evil = Malicious(proof)
    if form == "as a bare pickle":
        path.write_bytes(pickle.dumps(evil, protocol=2))
    else:
        torch.save({**state, "extra": evil} if form == "inside a checkpoint" else evil, path)
    with pytest.raises(ModelError, match=r"weights\.bin.*could run code"):
        convert(path, tmp_path / "out.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["weights.bin"]


@pytest.mark.parametrize("damage", ["cut short", "empty", "another format"])
def test_a_damaged_file_is_refused_with_the_reason_and_leaves_nothing(damage: str, state, tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    torch.save(state, path)
    if damage == "cut short":
        os.truncate(path, path.stat().st_size - 200)
    else:
        path.write_bytes(b"" if damage == "empty" else b"P6 64 64 255 " + bytes(500))
    match = (
        r"is not a pickled checkpoint" if damage == "another format" else "cannot be converted: .*truncated or damaged"
    )
    with pytest.raises(ModelError, match=rf"x\.bin {match}"):
        convert(path, tmp_path / "x.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.bin"]


@pytest.mark.parametrize(
    ("held", "reason"),
    [
        ([torch.ones(2)], "holds a list"),
        ({"epoch": 3, "lr": 0.1}, "epoch, lr"),
        ({"state_dict": {"epoch": 3}}, "'state_dict' holds no named tensors, only: epoch"),
        ({"sparse": torch.eye(2).to_sparse()}, "sparse is a torch.sparse_coo"),
    ],
)
def test_what_is_no_state_dict_is_refused_with_what_it_is(held: object, reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        state_dict_of(held)


def test_nothing_is_overwritten_and_names_are_checked(state, tmp_path: Path) -> None:
    source = tmp_path / "a.bin"
    torch.save(state, source)
    (tmp_path / "there.safetensors").write_bytes(b"precious")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InvalidRequest, match="already exists"):
        convert(source, tmp_path / "there.safetensors")
    with pytest.raises(InvalidRequest, match="must end in .safetensors"):
        convert(source, tmp_path / "a.weights")
    with pytest.raises(InvalidRequest, match="is already a safetensors file"):
        convert(tmp_path / "there.safetensors", tmp_path / "b.safetensors")
    with pytest.raises(ModelError, match="no file or folder"):
        convert(tmp_path / "none.bin", tmp_path / "b.safetensors")
    with pytest.raises(InvalidRequest, match="already exists"):
        convert(tmp_path / "folder", tmp_path / "folder")
    with pytest.raises(ModelError, match="no pickled weights"):
        convert(tmp_path / "folder", tmp_path / "new")
    assert (tmp_path / "there.safetensors").read_bytes() == b"precious"
    assert convert(source, tmp_path / "folder") == [tmp_path / "folder" / "a.safetensors"]


def test_a_wrong_name_is_answered_without_torch(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a boat\n")
    code = (
        "import sys\nfrom ragturbo.cli import main\nsys.argv = ['ragturbo', 'convert', 'p.txt', sys.argv[1]]\n"
        "try:\n    main()\nfinally:\n    assert 'torch' not in sys.modules"
    )
    for target, words in (("x.weights", "must end in .safetensors"), ("x.safetensors", "is not a pickled checkpoint")):
        done = subprocess.run([sys.executable, "-c", code, target], cwd=tmp_path, capture_output=True, text=True)
        assert words in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_a_folder_of_pickles_becomes_a_model_that_loads(tiny_sd21: Path, tmp_path: Path) -> None:
    """A diffusers folder from before safetensors: .bin weights, one of them sharded."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    old = tmp_path / "old"
    for path in tiny_sd21.rglob("*"):
        if path.is_file() and path.suffix != ".safetensors":
            (old / path.relative_to(tiny_sd21)).parent.mkdir(parents=True, exist_ok=True)
            (old / path.relative_to(tiny_sd21)).write_bytes(path.read_bytes())
    weights = {
        part: load_file(next((tiny_sd21 / part).glob("*.safetensors"))) for part in ("unet", "vae", "text_encoder")
    }
    torch.save(weights["vae"], old / "vae/diffusion_pytorch_model.bin")
    torch.save(weights["text_encoder"], old / "text_encoder/pytorch_model.bin")
    names = sorted(weights["unet"])
    shards = {f"diffusion_pytorch_model-0000{i + 1}-of-00002.bin": names[i::2] for i in range(2)}
    for shard, members in shards.items():
        torch.save({name: weights["unet"][name] for name in members}, old / "unet" / shard)
    index = {"metadata": {}, "weight_map": {name: shard for shard, members in shards.items() for name in members}}
    (old / "unet/diffusion_pytorch_model.bin.index.json").write_text(json.dumps(index))
    # A single-file copy of the model, as in many hub repositories.
    (old / "v2-1_512-ema-pruned.ckpt").write_bytes(b"not read")

    written = convert(old, tmp_path / "new")
    assert len(written) == 4 and all(path.is_file() for path in written)
    assert not [path for path in (tmp_path / "new").rglob("*") if path.suffix in (".bin", ".ckpt")]
    for part, kind in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL), ("text_encoder", CLIPTextModel)):
        model = kind.from_pretrained(tmp_path / "new" / part, use_safetensors=True)
        loaded = model.state_dict()
        for name, value in weights[part].items():
            torch.testing.assert_close(loaded[name], value, rtol=0, atol=0)
    assert json.loads((tmp_path / "new/unet/config.json").read_text())["_class_name"] == "UNet2DConditionModel"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "old"]
