"""Training the latent VGG, the dry run, and the commands."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from ragturbo.errors import ModelError
from ragturbo.train.config import load_config
from ragturbo.train.folder import Plan
from ragturbo.train.shards import write_shard
from ragturbo.train.train_vgg import average_precision, most_informative_words, train_vgg


def test_the_recipe_learns_what_captions_say_of_latents(tmp_path):
    """Latents whose channel tells the colour: held-out words are ranked better than by frequency."""
    names, generator = ("red", "green", "blue", "grey"), torch.Generator().manual_seed(0)
    which = torch.randint(0, 4, (256,), generator=generator)
    latents = torch.randn(256, 4, 8, 8, generator=generator)
    latents[torch.arange(256), which] += 3
    Plan("encoded", 256, 256, {}).write_or_check(tmp_path / "d")
    records = [{"caption": f"a {names[w]} thing"} for w in which.tolist()]
    write_shard(tmp_path / "d", 0, {"latents": latents, "input_ids": torch.zeros(256, 4, dtype=torch.int32)}, records)
    result = train_vgg(tmp_path / "d", tmp_path / "vgg.safetensors", width=2, steps=60, batch=32, lr=1e-2, device="cpu")
    assert result["words"] == 4
    assert result["average_precision"] > 0.9 > 0.8 > result["by_frequency"]
    from ragturbo.train.lpips import LatentLPIPS

    lpips = LatentLPIPS.load(tmp_path / "vgg.safetensors")
    same, other = latents[which == 0][:8], latents[which == 1][:8]
    assert lpips(same[:4], other[:4]).mean() > lpips(same[:4], same[4:8]).mean()


def test_informative_words_are_neither_everywhere_nor_nowhere():
    captions = [{"a", "cat", "red"}, {"a", "dog", "red"}, {"a", "cat"}, {"a", "cat", "once"}]
    assert most_informative_words(captions, 2) == {"cat": 0, "red": 1}


def test_average_precision_by_hand():
    scores, targets = torch.tensor([[0.9, 0.5, 0.1], [0.1, 0.2, 0.3]]), torch.tensor([[1.0, 0, 1], [1, 0, 0]])
    # (1/1 + 2/3) / 2 and 1/3
    assert average_precision(scores, targets) == pytest.approx(((1 + 2 / 3) / 2 + 1 / 3) / 2)


# The dry run


def test_a_dry_run_counts_the_tiny_models_own_parameters(world, tmp_path):
    from ragturbo.train.estimate import estimate
    from ragturbo.train.ladd import LADDTrainer

    config = world.config(loop__batch=4)
    report = estimate(config, processes=1)
    trainer = LADDTrainer(config, tmp_path / "out", device="cpu")
    parts = report["parameters"]
    count = sum(p.numel() for p in trainer.masters.parameters.values())
    assert parts["trainable"]["adapter"] + parts["trainable"]["decoder LoRA"] == count
    assert parts["trainable"]["discriminator heads"] == sum(p.numel() for p in trainer.discriminator.parameters())
    teacher = trainer.discriminator.backbone.unet.unet
    assert parts["frozen"]["teacher encoder"] == sum(p.numel() for p in teacher.parameters())
    assert report["micro_batches_per_step"] == 2 and report["samples_per_s"] is None
    assert report["flops_per_step"] == 4 * report["flops_per_sample"]["total"] > 0
    trainer.train(1)
    assert estimate(config, tmp_path / "out")["samples_per_s"] > 0


def test_a_dry_run_of_a_checkpointed_run_keeps_less_and_computes_more(world):
    from ragturbo.train.estimate import estimate

    plain, saved = (estimate(world.config(loop__gradient_checkpointing=on)) for on in (False, True))
    assert saved["memory_bytes"]["stored activations"] < plain["memory_bytes"]["stored activations"]
    assert saved["flops_per_sample"]["total"] > plain["flops_per_sample"]["total"]


@pytest.mark.slow
def test_the_papers_numbers_at_real_size():
    from ragturbo.train.estimate import estimate

    report = estimate(load_config("paper"), processes=64)
    assert report["parameters"]["trainable"]["adapter"] == 36_071_680
    assert report["parameters"]["frozen"]["student unet"] == 865_910_724
    assert 2.5e12 < report["flops_per_sample"]["total"] < 3.0e12


# Commands


@pytest.fixture
def commands():
    import typer

    from ragturbo.cli import data, train

    app = typer.Typer()
    app.command("train")(train.train)
    app.add_typer(data.app, name="data")
    return lambda *args: CliRunner().invoke(app, [str(arg) for arg in args], catch_exceptions=False)


def test_from_prompts_to_an_adapter_by_commands_alone(commands, world, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"a {c} {s}" for c in ("red", "blue") for s in ("cat", "dog", "boat")))
    made = commands("data", "teacher", prompts, "--out", tmp_path / "d", "--model", world.model, "--steps", 1,
                    "--shard-size", 4, "--dtype", "float32", "--device", "cpu")  # fmt: skip
    assert made.exit_code == 0 and "which has 6 samples in 2 shards" in made.output
    found = commands("data", "neighbors", tmp_path / "d", "--database", world.database, "--model", world.model, "-k", 1,
                     "--device", "cpu")  # fmt: skip
    assert found.exit_code == 0, found.output
    vgg = commands("data", "lpips", tmp_path / "d", "--out", tmp_path / "v.safetensors", "--width", 2, "--steps", 2,
                   "--batch", 4, "--device", "cpu")  # fmt: skip
    assert vgg.exit_code == 0 and "average precision" in vgg.output
    config = tmp_path / "run.yaml"
    settings = world.settings(data={"sources": [{"path": str(tmp_path / "d")}]}, loop__max_steps=9)
    config.write_text(json.dumps(settings))
    changes = ["--set", "loss.beta=1.0", "--set", f"loss.lpips_weights={tmp_path / 'v.safetensors'}"]
    plan = commands("train", config, "--out", tmp_path / "out", "--dry-run", "--json", *changes)
    assert json.loads(plan.stdout)["config"]["loss"]["beta"] == 1.0 and not (tmp_path / "out").exists()
    readable = commands("train", config, "--out", tmp_path / "out", "--dry-run", *changes)
    assert "discriminator heads" in readable.output and "samples/s: not measured" in readable.output
    for steps, extra in ((1, []), (2, ["--resume"])):
        run = commands("train", config, "--out", tmp_path / "out", "--max-steps", steps, "--device", "cpu", "--json",
                       *changes, *extra)  # fmt: skip
        assert json.loads(run.stdout)["steps"] == steps
    assert load_config(tmp_path / "out" / "config.yaml").loss.beta == 1.0
    assert (tmp_path / "out" / "export" / "adapter.safetensors").is_file()


def test_without_the_extra_the_error_names_it():
    """peft and accelerate hidden from a fresh process."""
    program = (
        "import sys; sys.modules.update(peft=None, accelerate=None)\n"
        "from ragturbo.train import LADDConfig\n"
        "from ragturbo.train import require\n"
        "from ragturbo.errors import ModelError\n"
        "for name in ('peft', 'accelerate'):\n"
        "    try: require(name)\n"
        "    except ModelError as error: print(error)\n"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert out == "".join(f"training needs {n}: pip install 'ragturbo[train]'\n" for n in ("peft", "accelerate"))


def test_importing_the_package_imports_no_training_library():
    program = "import sys, ragturbo.train; print([m for m in ('torch', 'peft', 'accelerate') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "[]\n"


def test_weights_that_are_no_vgg_stop_a_run_before_it_starts(world, tmp_path):
    from ragturbo.train.ladd import LADDTrainer

    config = world.config(loss={"beta": 1.0, "lpips_weights": str(world.database / "none.safetensors")})
    with pytest.raises(ModelError, match="none.safetensors"):
        LADDTrainer(config, tmp_path, device="cpu")
