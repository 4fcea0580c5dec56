"""Starting and resuming a run: what is checked, when, and in which words."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml
from safetensors import SafetensorError
from typer.testing import CliRunner

from ragturbo.errors import DatabaseError, DatabaseMismatch, InvalidRequest, ModelError, RagTurboError
from ragturbo.train import checkpoint
from ragturbo.train.config import load_config, settle
from ragturbo.train.start import check_run, read_settings


@pytest.fixture
def train():
    from ragturbo.cli import train

    app = typer.Typer()
    app.command("train")(train.train)

    def run(*arguments):
        return CliRunner().invoke(app, [*map(str, arguments), "--device", "cpu"])

    return run


@pytest.fixture
def settings(world, tmp_path):
    """Write a configuration and return its path."""

    def write(**changes):
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(world.settings(**changes)))
        return path

    return write


def started(world, out, **changes):
    """A folder as a run leaves it that was killed after its first step."""
    from ragturbo.train.ladd import LADDTrainer

    LADDTrainer(world.config(loop__max_steps=1, **changes), out, device="cpu").train()
    return out


# Resume


def test_resume_takes_the_saved_configuration(world, train, settings, tmp_path):
    out = tmp_path / "out"
    first = train(settings(loop__max_steps=9, optim__lr=3e-3), "--out", out, "--max-steps", 1, "--json")
    assert json.loads(first.stdout)["steps"] == 1
    again = train("--out", out, "--resume", "--max-steps", 2, "--json")
    assert json.loads(again.stdout)["steps"] == 2
    saved = load_config(out / "config.yaml")
    assert saved.optim.lr == 3e-3 and saved.loop.max_steps == 9


def test_on_resume_a_setting_changes_only_if_it_does_not_change_what_is_trained(world, tmp_path):
    started(world, tmp_path)
    changed = read_settings(None, tmp_path, ["loop.max_steps=7", "loop.save_every=3"], resume=True)
    assert (changed.loop.max_steps, changed.loop.save_every) == (7, 3)
    with pytest.raises(InvalidRequest, match=r"config.yaml has other settings: optim.lr \(was 0.001, now 0.01\)"):
        read_settings(None, tmp_path, ["optim.lr=0.01"], resume=True)


def test_a_configuration_given_on_resume_must_agree_with_the_saved_one(world, settings, tmp_path):
    started(world, tmp_path / "out")
    assert read_settings(settings(loop__max_steps=8), tmp_path / "out", resume=True).loop.max_steps == 8
    with pytest.raises(InvalidRequest, match=r"student.lora.rank \(was 2, now 3\)"):
        read_settings(settings(student__lora__rank=3), tmp_path / "out", resume=True)


@pytest.mark.parametrize("exists", [False, True])
def test_resume_without_a_run_says_how_to_start_one(tmp_path, exists):
    out = tmp_path / "out"
    if exists:
        out.mkdir()
    with pytest.raises(InvalidRequest, match=r"no run to resume in .*out: it has no config.yaml. Start one with"):
        read_settings(None, out, resume=True)
    with pytest.raises(
        InvalidRequest, match="give a configuration, one-gpu, paper or shapes or a YAML file; or --resume"
    ):
        read_settings(None, out)


def test_a_micro_batch_that_settled_is_saved_and_kept_on_resume(world, tmp_path):
    started(world, tmp_path, loop__batch=12, loop__micro_batch=None)
    assert load_config(tmp_path / "config.yaml").loop.micro_batch == 12
    values = yaml.safe_load((tmp_path / "config.yaml").read_text())
    values["loop"]["micro_batch"] = 4
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    del values["loop"]["micro_batch"]
    (tmp_path / "given.yaml").write_text(yaml.safe_dump(values))
    # Not chosen again: another value would draw other numbers.
    assert read_settings(tmp_path / "given.yaml", tmp_path, resume=True).loop.micro_batch == 4


def test_several_settings_may_follow_one_set(train, settings, world, tmp_path):
    dry = ("--out", tmp_path / "out", "--dry-run", "--json")
    plan = train(settings(), *dry, "--set", "optim.lr=0.5", "loop.batch=8", "seed=3")
    config = json.loads(plan.stdout)["config"]
    assert (config["optim"]["lr"], config["loop"]["batch"], config["seed"]) == (0.5, 8, 3)
    started(world, tmp_path / "out")
    plan = train(*dry, "--resume", "--set", "loop.max_steps=7", "loop.keep=5")
    assert json.loads(plan.stdout)["config"]["loop"]["keep"] == 5
    assert "settings are written key=value" in train("paper", "loop.batch", *dry).output


# What is checked before anything is loaded


def mistakes(world) -> dict[str, tuple[dict, str]]:
    """Changes of a configuration that works, and a part of the message."""
    data, real = str(world.data), str(world.real)
    return {
        "no data folder": ({"data__sources": [{"path": "nowhere"}]}, "there is no folder nowhere: make it with"),
        "no data": ({"data__sources": [{"path": str(world.model)}]}, "is not a folder of training samples, which"),
        "no neighbours": ({"data__sources": [{"path": data + "-plain"}]}, "has no neighbours: run `ragturbo data"),
        "few neighbours": ({"student__num_neighbors": 3}, "has 2 neighbours a sample, not 3: lower student."),
        "no images": ({"discriminator__real": "images"}, "no source of data.sources has images"),
        "held out images": ({"data__held_out": real}, "has no stored noise: make it with `ragturbo data teacher`"),
        "no database": ({"database": "nowhere"}, "there is no database nowhere: `ragturbo db build` makes one"),
        "no own database": ({"database": None}, "has no database: set `database=FOLDER`"),
        "no model": ({"model": "nowhere"}, "there is no folder nowhere, and 'nowhere' is not a hub id"),
        "no teacher": ({"teacher": "nowhere"}, "there is no folder nowhere, and 'nowhere' is not a hub id"),
        "not a model": ({"model": data}, "is not a model in diffusers' layout"),
        "no lpips weights": ({"loss__beta": 1.0}, "loss.lpips_weights is not set: make the file with `ragturbo data"),
        "no lpips file": ({"loss__beta": 1.0, "loss__lpips_weights": "no.safetensors"}, "there is no file no.saf"),
    }


@pytest.fixture
def plain(world):
    """The training data without neighbours."""
    folder = Path(f"{world.data}-plain")
    if not folder.exists():
        shutil.copytree(world.data, folder, ignore=shutil.ignore_patterns("neighbors"))
    return folder


def test_a_mistake_in_what_a_configuration_names_is_one_line_with_what_to_do(world, plain, tmp_path):
    for what, (changes, message) in mistakes(world).items():
        with pytest.raises(RagTurboError) as error:
            check_run(settle(world.config(**changes)), tmp_path / "out")
        assert message in str(error.value) and "\n" not in str(error.value), what
        assert not (tmp_path / "out").exists()


def test_an_unfinished_folder_of_data_or_neighbours_is_named(world, tmp_path):
    for broken in (tmp_path / "a" / "000001.safetensors", tmp_path / "b" / "neighbors" / "000001.safetensors"):
        folder = tmp_path / broken.relative_to(tmp_path).parts[0]
        shutil.copytree(world.data, folder)
        broken.unlink()
        with pytest.raises(DatabaseError, match="unfinished: 1 of its 3 shards are missing .000001.safetensors"):
            check_run(settle(world.config(data__sources=[{"path": str(folder)}])), tmp_path / "out")


@pytest.mark.parametrize("where", ["file", "file/below"])
def test_an_out_that_cannot_be_a_folder_is_refused(world, tmp_path, where):
    (tmp_path / "file").touch()
    with pytest.raises(InvalidRequest, match="cannot be written: .*file is a file, not a folder"):
        check_run(settle(world.config()), tmp_path / where)


def test_a_read_only_place_is_refused(world, tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(InvalidRequest, match="read-only for this user"):
        check_run(settle(world.config()), tmp_path / "new" / "out")


def test_missing_packages_are_named_before_anything_is_loaded(world, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModelError, match=r"training needs peft: pip install 'ragturbo\[train\]'"):
        check_run(settle(world.config()), tmp_path / "out")


def test_a_cheap_mistake_is_answered_without_importing_torch(tmp_path):
    """Every command of the training door, in one fresh process."""
    (tmp_path / "prompts.txt").write_text("a cat\n")
    (tmp_path / "broken.yaml").write_text("loop: [")
    commands = [
        ["train", "--out", "x"],
        ["train", "--out", "x", "--resume"],
        ["train", "shaped", "--out", "x"],
        ["train", "broken.yaml", "--out", "x"],
        ["train", "shapes", "--out", "x"],
        ["train", "shapes", "--out", "prompts.txt"],
        ["train", "shapes", "--out", "x", "--set", "loop.bach=3"],
        ["train", "shapes", "--out", "x", "--max-steps", "0"],
        ["data", "teacher", "nowhere.txt", "--out", "x", "--model", "shapes"],
        ["data", "teacher", "prompts.txt", "--out", "x", "--model", "nowhere"],
        ["data", "teacher", "prompts.txt", "--out", "prompts.txt", "--model", "shapes"],
        ["data", "teacher", "prompts.txt", "--out", "x", "--model", "shapes", "--dtype", "half"],
        ["data", "encode", "nowhere", "--out", "x", "--model", "shapes"],
        ["data", "relabel", "nowhere", "prompts.txt", "--out", "x", "--model", "shapes"],
        ["data", "neighbors", "nowhere", "--database", "x", "--model", "shapes"],
        ["data", "lpips", "nowhere", "--out", "x"],
    ]
    program = (
        "import json, sys\n"
        "from ragturbo.cli import app\n"
        "from ragturbo.cli.errors import CLICK_ERROR\n"
        "from ragturbo.errors import RagTurboError\n"
        "for command in json.loads(sys.argv[1]):\n"
        "    try: app(command, standalone_mode=False)\n"
        "    except (RagTurboError, CLICK_ERROR) as error:\n"
        "        print(len(str(error).splitlines()), 'torch' in sys.modules)\n"
        "    else: print('no error', command)\n"
    )
    arguments = [sys.executable, "-c", program, json.dumps(commands)]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.splitlines() == ["1 False"] * len(commands), done.stdout + done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.yaml", "prompts.txt"]


# What is found after loading


def test_the_configuration_is_printed_only_when_the_run_starts(world, train, settings, tmp_path):
    """So that the last lines of a refused run are the error."""
    refused = train(settings(discriminator__stages=["down_9"]), "--out", tmp_path / "out")
    assert isinstance(refused.exception, InvalidRequest) and "max_steps" not in refused.stderr
    begun = train(settings(loop__max_steps=1), "--out", tmp_path / "out")
    assert begun.exit_code == 0 and "max_steps: 1" in begun.stderr


def test_data_made_for_another_model_is_refused(world, tiny, tmp_path):
    from ragturbo.train.ladd import LADDTrainer

    folder = tmp_path / "data"
    shutil.copytree(world.data, folder)
    index = json.loads((folder / "index.json").read_text())
    index["made_by"] |= {"vae_encoder": "another", "model": "some/model"}
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(DatabaseMismatch, match="was made with some/model, which has another VAE than"):
        LADDTrainer(world.config(data__sources=[{"path": str(folder)}]), tmp_path / "out", device="cpu")


def test_neighbours_in_another_database_are_refused_with_the_command_that_finds_them(world, tmp_path):
    from ragturbo.train.ladd import LADDTrainer

    folder = tmp_path / "data"
    shutil.copytree(world.data, folder)
    index = folder / "neighbors" / "index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "database": "gen-000007 0123456789abcdef"}))
    with pytest.raises(
        DatabaseMismatch, match=r"gen-000007 01234567, now gen-000001 \w{8}\): delete it, and run `ragt"
    ):
        LADDTrainer(world.config(data__sources=[{"path": str(folder)}]), tmp_path / "out", device="cpu")


def test_a_run_of_no_steps_is_refused(make):
    with pytest.raises(InvalidRequest, match="max_steps=0 must be at least 1"):
        make().train(0)


def test_a_full_disk_is_an_error_that_names_the_file(make, monkeypatch, tmp_path):
    trainer = make(loop__max_steps=1)

    def full(*arguments, **options):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(DatabaseError, match="trainable.safetensors cannot be written: .*No space left on device"):
        trainer.train()
    assert checkpoint.latest(trainer.out / "checkpoints") is None
