"""Every snippet of README and docs runs: Python blocks as they are, commands made small.

The hub ids and files that the pages name exist here: small models in the hub's cache, pictures, tables, an adapter.
Each page has a folder of its own, in which its snippets run from top to bottom.
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import json
import re
import shlex
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub import constants
from PIL import Image

import ragturbo
from ragturbo.cli import main

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
CAPTIONS = ["a red circle", "a blue square", "a green triangle", "a yellow circle", "a red square", "a photo of a cat"]

# What makes a command small: the first words of its line -> further options, of which the last one counts.
SMALL = {
    "ragturbo eval": "--limit 2",
    "ragturbo data lpips": "--steps 2 --width 8 --words 8 --batch 2",
    "ragturbo data teacher": "--steps 2 --batch 4",
    "ragturbo train one-gpu": "--max-steps 1",
}
# Settings of a training run, for the same reason; they take the place of the page's own.
SMALL_RUN = (
    "loop.batch=4", "loop.micro_batch=2", "loop.max_steps=2", "loop.compile=false", "loop.precision=fp32",
    "student.lora.rank=2", "discriminator.width=8", "loop.sample_every=0",
)  # fmt: skip
# What cannot run inside a test -> why, and what does run it.
ELSEWHERE = {
    "make ": "CI runs the targets themselves",
    "pip install": "CI installs the package",
    "torchrun --nproc-per-node 2 examples/shapes/recipe.py": "tests/evaluate/test_recipe.py runs every stage",
    "python examples/shapes/recipe.py": "tests/evaluate/test_recipe.py runs every stage",
    "python examples/train_adapter.py": "tests/train runs it",
    "ragturbo eval --suite text": "needs CLIP's weights of 10 GB: tests/evaluate/test_metrics.py has a small CLIP",
    "serve run": "tests/serve/test_ray.py",
    "ragturbo serve": "runs until it is stopped: tests/serve/test_process.py",
}


MAKES = re.compile(r"Database\.build\(.*my-db|db (build|copy) .*my-db")


@dataclass(frozen=True)
class Snippet:
    language: str
    text: str

    @property
    def commands(self) -> list[str]:
        """Its command lines, without comments."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [text for line in lines if (text := re.sub(r"(^|\s)#\s.*", "", line).strip())]


def snippets(page: str) -> list[Snippet]:
    text = (ROOT / page).read_text("utf-8")
    found = [Snippet(*match) for match in re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S)]
    # A block without a language may also be a listing of files or a format.
    return [one for one in found if one.language or re.match(r"(#|ragturbo|python|pip|torchrun) ", one.text)]


def with_adapter(folder: Path) -> None:
    from ragturbo.model.adapter import HSpaceAdapter

    HSpaceAdapter(64).save(folder)


def pictures(folder: Path, side: int = 64) -> Path:
    """Pictures with captions beside them."""
    folder.mkdir()
    for i, caption in enumerate(CAPTIONS):
        Image.new("RGB", (side, side), (40 * i, 200 - 30 * i, 90)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(caption)
    return folder


@pytest.fixture(scope="session")
def desk(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that the pages name, and the hub's cache with the models that they load."""
    home = tmp_path_factory.mktemp("desk")
    student = tiny.make_bundle(home / "STUDENT")
    teacher = tiny.make_bundle(home / "TEACHER", "sd21", seed=1)
    scheduler = json.loads((teacher / "scheduler" / "scheduler_config.json").read_text())
    (teacher / "scheduler" / "scheduler_config.json").write_text(
        json.dumps({**scheduler, "timestep_spacing": "leading"})
    )
    for name, model in (("sd-turbo", student), ("stable-diffusion-2-1-base", teacher)):
        repository = home / "hub" / f"models--stabilityai--{name}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("0" * 40)
        shutil.copytree(model, repository / "snapshots" / ("0" * 40))
    (home / "my-adapter").mkdir()
    with_adapter(home / "my-adapter")
    ragturbo.Database.build(pictures(home / "photos"), home / "my-database", model=student, device="cpu")
    shutil.copytree(student, home / "my-model")
    with_adapter(home / "my-model")
    shutil.copytree(home / "photos", home / "my-images")
    pictures(home / "large", 1024)
    for name in ("lorp.png", "zib.png"):
        shutil.copy(home / "photos" / "0.png", home / name)
    (home / "prompts.txt").write_text("\n".join(CAPTIONS[:3]))
    pq.write_table(pa.table({"TEXT": CAPTIONS}), home / "prompts.parquet")
    pq.write_table(pa.table({"caption": ["a circle"] * len(CAPTIONS)}), home / "short.parquet")
    images = [f"large/{i}.png" for i in range(len(CAPTIONS))]
    pq.write_table(
        pa.table({"image": images, "caption": CAPTIONS, "aesthetic": [6.0] * 5 + [4.0]}), home / "laion.parquet"
    )
    (home / "train").mkdir()
    rows = []
    for i, caption in enumerate(CAPTIONS):
        shutil.copy(home / "photos" / f"{i}.png", home / "train" / f"x{i}.jpg")
        rows.append(json.dumps({"image_id": f"x{i}", "caption": caption, "image": f"photos/{i}.png"}))
    for name in ("pairs.jsonl", "open_images_train_v6_captions.jsonl"):
        (home / name).write_text("\n".join(rows))
    return home


@pytest.fixture
def place(desk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An own copy of the desk, as the current folder, and no way to the network."""
    folder = tmp_path / "desk"
    shutil.copytree(desk, folder, symlinks=True)
    (folder / "data").mkdir()
    shutil.copytree(folder / "my-database", folder / "data" / "db")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return folder


def small(command: str) -> list[str]:
    """The arguments of a command line, as one process runs it in a test."""
    words = shlex.split(re.sub(r"^torchrun --nproc-per-node \d+ --no-python ", "", command))
    extra = next((options for start, options in SMALL.items() if command.startswith(start)), "")
    words += shlex.split(extra)
    if words[1] == "train":
        for change in SMALL_RUN:
            words += ["--set", change]
    return words[1:]


def run_command(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["ragturbo", *small(command)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code, command


def run_python(text: str, names: dict[str, Any]) -> None:
    """A block, in which `await` may be used as in a notebook."""
    code = compile(text, "snippet", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    made = eval(code, names)
    if inspect.iscoroutine(made):
        asyncio.run(made)


@pytest.fixture
def openai_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], int]]:
    """Starts an endpoint in this process and returns its port."""
    import threading

    import uvicorn

    from ragturbo.serve.app import create_app
    from ragturbo.serve.config import ServeConfig

    started: list[tuple[Any, threading.Thread]] = []

    def start() -> int:
        listener = socket.create_server(("127.0.0.1", 0))
        app = create_app(ServeConfig(device="cpu", timeout=300), background=False)
        server = uvicorn.Server(uvicorn.Config(app, log_config=None))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        started.append((server, thread))
        return listener.getsockname()[1]

    yield start
    for server, thread in started:
        server.should_exit = True
        thread.join()


def names_before(page: str, place: Path, openai_server: Callable[[], int]) -> dict[str, Any]:
    """What a page's Python blocks take as given."""
    if page == "docs/serving.md":
        gen = ragturbo.Generator.from_pretrained("shapes", device="cpu")
        return {"ragturbo": ragturbo, "gen": gen, "prompt": "a red circle", "port": openai_server()}
    if page == "docs/databases.md":
        return {"keys": np.random.default_rng(0).normal(size=(2, 32)).astype(np.float32)}
    return {}


@pytest.mark.parametrize("page", [page for page in PAGES if snippets(page)])
def test_every_snippet_runs(page, place, openai_server, monkeypatch):
    torch.manual_seed(0)
    names = names_before(page, place, openai_server)
    for snippet in snippets(page):
        if MAKES.search(snippet.text):
            # The same example, in Python and as a command.
            shutil.rmtree(place / "my-db", ignore_errors=True)
        if snippet.language == "python":
            text = snippet.text.replace(":8000/", f":{names.get('port')}/")
            run_python(text, names)
            continue
        for command in snippet.commands:
            if MAKES.search(command):
                shutil.rmtree(place / "my-db", ignore_errors=True)
            if not any(command.startswith(start) for start in ELSEWHERE):
                run_command(command, monkeypatch)
    if "gen" in names:
        names["gen"].close()


def commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], set[str]]]:
    """Every command of the command line, with its options."""
    options = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    yield path, options | {"--help"}
    for name, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, (*path, name))


@pytest.mark.parametrize("page", PAGES)
def test_every_command_and_option_that_a_page_mentions_exists(page):
    from typer.main import get_command

    from ragturbo.cli import app

    known = dict(commands(get_command(app)))
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text("utf-8"), flags=re.M | re.S)
    for code in re.findall(r"`([^`\n]+)`", text):
        words = code.split()
        if words[:1] == ["ragturbo"] and len(words) > 1:
            path = tuple(words[1:2]) if tuple(words[1:3]) not in known else tuple(words[1:3])
            # "bench breakdown|report" names several.
            for one in path[-1].split("|"):
                assert (*path[:-1], one) in known, code
            options = known.get(path, set())
            assert {word for word in words if re.fullmatch(r"--[a-z-]+", word)} <= options, code
        elif words and re.fullmatch(r"--[a-z][a-z-]+", words[0]):
            tools = "--benchmark-only --help --version --scale --grid --only --size --threads".split()
            assert words[0] in tools or any(words[0] in options for options in known.values()), code
