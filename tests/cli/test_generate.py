"""`ragturbo generate`: files, exit codes and output streams."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from PIL import Image

from ragturbo.cli import main

PROMPT = "a red circle left of a blue square"


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def ragturbo(monkeypatch, capfd, tmp_path) -> Callable[..., Done]:
    """Run the command in this process, which has imported torch, and capture its streams and exit code."""

    def run(*arguments: object) -> Done:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["ragturbo", *map(str, arguments)])
        capfd.readouterr()
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
        return Done(code, *capfd.readouterr())

    return run


def test_the_installed_command_runs_in_a_process_of_its_own(tiny_sd21, tmp_path):
    command = [sys.executable, "-c", "from ragturbo.cli import main; main()"]
    done = subprocess.run(
        [*command, "generate", PROMPT, "--model", tiny_sd21, "--seed", "7"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "out.png").size == (128, 128)
    # No progress bars: stderr is not a terminal.
    assert "\r" not in done.stderr and "Traceback" not in done.stderr and "decode" in done.stderr


def test_one_prompt_makes_one_file_and_says_where_the_time_went(ragturbo, tiny_sd21, tmp_path):
    done = ragturbo("generate", PROMPT, "--model", tiny_sd21, "--seed", 7, "-o", "deep/er/boat.png")
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "deep/er/boat.png").size == (128, 128)
    assert "deep/er/boat.png  seed 7" in done.stdout
    assert "decode" in done.stderr and "Traceback" not in done.stderr


def test_several_images_are_numbered_and_json_is_all_there_is_on_stdout(ragturbo, tiny_sd21, tmp_path):
    done = ragturbo("generate", PROMPT, "a dog", "-n", 2, "--model", tiny_sd21, "--seed", 1, "-o", "x.jpg", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert [row["file"] for row in report["images"]] == [f"x-{i}.jpg" for i in range(4)]
    assert [row["seed"] for row in report["images"]] == [1, 2, 1, 2]
    assert report["mode"] == "none" and report["timings"]["total"] > 0
    assert all(Image.open(tmp_path / row["file"]).format == "JPEG" for row in report["images"])


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["generate", ""], 2, "prompt is empty"),
        (["generate", PROMPT, "--mode", "magic"], 2, "--mode magic is not one of"),
        (["generate", PROMPT, "-w", "0.5"], 2, "-w has no effect"),
        (["generate"], 2, "Missing argument"),
        (["generate", PROMPT, "--engine", "warp"], 2, "--engine warp is not one of"),
        (["generate", PROMPT, "-o", "x.nothing"], 2, "must end in .png"),
        (["generate", PROMPT, "--database", "nowhere"], 3, "nowhere"),
        (["generate", PROMPT, "--adapter", "nowhere"], 3, "nowhere"),
    ],
)
def test_a_mistake_is_one_line_and_the_exit_code_of_its_kind(ragturbo, tiny_sd21, tmp_path, arguments, code, message):
    done = ragturbo(*arguments, *(["--model", tiny_sd21] if len(arguments) > 1 else []))
    assert done.returncode == code, done.stderr
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_mistake_that_needs_no_model_is_answered_without_importing_torch(answers_without_torch, tmp_path):
    """torch takes seconds to import, and models longer."""
    (tmp_path / "pairs.jsonl").write_text("{}\n")
    generate = ["generate", PROMPT]
    mistakes = [
        (["generate", ""], "prompt is empty"),
        ([*generate, "--mode", "adaptr"], "did you mean 'adapter'"),
        ([*generate, "--steps", "9"], "--steps 9: this model takes 1 to 4"),
        ([*generate, "-w", "0.5"], "-w is the blend"),
        ([*generate, "--dtype", "float8"], "--dtype float8"),
        ([*generate, "--device", "tpu"], "--device tpu"),
        ([*generate, "-n", "0"], "--num-images 0"),
        ([*generate, "-o", "x.tiff"], "must end in .png"),
        ([*generate, "--height", "63"], "must be a multiple of 4"),
        ([*generate, "--model", "./nowhere"], "there is no folder nowhere"),
        ([*generate, "--database", "nowhere"], "not a ragturbo database"),
        ([*generate, "--adapter", "nowhere"], "there is no adapter nowhere"),
        ([*generate, "--query", ""], "--query is empty"),
        ([*generate, "--negative-prompt", "ugly"], "takes no guidance"),
        ([*generate, "--vae", "nowhere"], "no AutoencoderTiny"),
        (["profile", PROMPT, "--steps", "9"], "--steps 9: this model takes 1 to 4"),
        (["bench", "breakdown", "--profile", "fast"], "--profile fast"),
        (["convert", "nowhere", "out"], "no file or folder nowhere"),
        (["db", "build", "nowhere", "-o", "db"], "no such file or folder"),
        (["db", "info", "nowhere"], "not a ragturbo database"),
        (["train", "nowhere", "--out", "run"], "no configuration nowhere"),
        (["data", "encode", "nowhere", "--out", "data", "--model", "shapes"], "no such file or folder"),
        (["data", "encode", "pairs.jsonl", "--out", "data", "--model", "shapes", "--size", "63"], "a multiple of 4"),
    ]
    answers = answers_without_torch([line for line, _ in mistakes], tmp_path)
    for (line, words), said in zip(mistakes, answers, strict=True):
        assert words in said and "Traceback" not in said, (line, said)
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["generate", PROMPT, "--steps", "0"], "--steps 0 must be a whole number"),
        (["generate", PROMPT, "-n", "0"], "--num-images 0 must be a whole number"),
        (["generate", PROMPT, "--guidance", "7.5"], "--guidance 7.5: a distilled model.*--undistilled says"),
        (["generate", PROMPT, "--mode", "slerp", "--lam", "1"], "needs a database .--database.$"),
        (["generate", PROMPT, "--num-neighbors", "2"], "--num-neighbors has no effect with --mode none"),
    ],
)
def test_an_error_speaks_of_the_options_of_the_command_line(ragturbo, tiny_sd21, arguments, says):
    done = ragturbo(*arguments, "--model", tiny_sd21)
    assert done.returncode == 2 and re.search(says, done.stderr), done.stderr
    assert not re.search(r"num_inference_steps|num_images_per_prompt|guidance_scale|\w+='", done.stderr)


@pytest.mark.parametrize(
    "arguments", [["generate", ""], ["generate"], ["db", "info", "nowhere"], ["generate", PROMPT, "--stepz", "1"]]
)
def test_an_error_is_json_where_json_is_asked_for(ragturbo, arguments):
    done = ragturbo(*arguments, "--json")
    error = json.loads(done.stdout)["error"]
    assert error["exit_code"] == done.returncode != 0 and error["message"] in done.stderr and error["type"]


def test_a_folder_as_out_gets_the_files_and_missing_folders_are_made(ragturbo, tiny_sd21, tmp_path):
    (tmp_path / "there").mkdir()
    for out, file in (("there", "there/out.png"), ("new/", "new/out.png"), ("a/b/x.webp", "a/b/x.webp")):
        done = ragturbo("generate", PROMPT, "--model", tiny_sd21, "-o", out)
        assert done.returncode == 0 and done.stdout.startswith(f"{file}  seed"), done.stderr
        assert (tmp_path / file).is_file()
    (tmp_path / "file").write_text("")
    done = ragturbo("generate", PROMPT, "--model", tiny_sd21, "-o", "file/x.png")
    assert done.returncode == 2 and "file is a file" in done.stderr


def test_a_long_prompt_is_printed_short(ragturbo, tiny_sd21):
    done = ragturbo("generate", "a red circle " * 40, "--model", tiny_sd21)
    assert done.returncode == 0 and len(done.stdout.splitlines()[0]) < 130 and "…" in done.stdout


def test_a_database_without_an_adapter_is_used_and_said(ragturbo, tmp_path):
    done = ragturbo("generate", PROMPT, "--adapter", "off", "--seed", 7)
    assert done.returncode == 0 and "λ" in done.stdout and "mode slerp" in done.stderr


def test_a_missing_model_is_bad_data(ragturbo):
    done = ragturbo("generate", PROMPT, "--model", "./nowhere")
    assert done.returncode == 3 and "nowhere" in done.stderr and "Traceback" not in done.stderr


def test_version_and_help(ragturbo):
    from ragturbo import __version__

    assert ragturbo("--version").stdout.strip() == __version__
    assert "generate" in ragturbo("--help").stdout


def test_an_option_of_retrieval_is_refused_without_a_database(ragturbo, tiny_sd21):
    done = ragturbo("generate", PROMPT, "--model", tiny_sd21, "--compose")
    assert done.returncode != 0 and "compose has no effect" in done.stderr
    done = ragturbo("generate", PROMPT, "--model", tiny_sd21, "--retriever", "hybrid")
    assert done.returncode == 2 and "--retriever hybrid has no effect without a database" in done.stderr
    done = ragturbo("generate", PROMPT, "--model", tiny_sd21, "--grid")
    assert done.returncode == 2 and "nothing is retrieved here" in done.stderr
    assert ragturbo("generate", PROMPT, "--model", tiny_sd21, "--no-compose").returncode == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--prompt", "x"], 'prompts are arguments: ragturbo generate "a red circle"'),
        (["--num-inference-steps", "3"], "use --steps"),
        (["--size", "512x512"], "use --width and --height"),
        (["--seed", "x"], "it must be a whole number"),
        (["-n", "0"], "--num-images 0 must be a whole number"),
        (["--mode"], "requires an argument"),
        (["--model", ""], "--model is empty"),
        (["--database", ""], "--database: give a folder"),
        (["--vae", "tinny"], "did you mean 'tiny'?"),
        (["--no-capture"], "has no effect without a GPU"),
    ],
)
def test_a_habit_from_elsewhere_is_told_the_way(ragturbo, monkeypatch, arguments, says):
    monkeypatch.setattr("ragturbo.cli.generate.has_driver", lambda: False)
    done = ragturbo("generate", PROMPT, *arguments)
    assert done.returncode in (2, 3) and says in done.stderr, done.stderr
    assert "Try `ragturbo generate --help`" in done.stderr or "No such option" not in done.stderr


def test_a_prompt_without_quotes_is_noticed(ragturbo, tiny_sd21):
    done = ragturbo("generate", "a", "dog", "--model", tiny_sd21)
    assert done.returncode == 0 and "2 prompts of one word each; quote" in done.stderr
    assert "quote" not in ragturbo("generate", PROMPT, "a dog", "--model", tiny_sd21).stderr


def test_help_has_a_short_name(ragturbo):
    assert ragturbo("generate", "-h").stdout == ragturbo("generate", "--help").stdout
