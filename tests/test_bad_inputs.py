"""What a stranger types wrong in Python: every mistake is answered in words, by an error of this library."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import ragturbo
from ragturbo import Generator
from ragturbo.errors import RagTurboError

load = Generator.from_pretrained
PICTURE = Image.new("RGB", (64, 64))

# What is typed, and what the answer must say.
LOADING: list[tuple[str, Callable[[], Any], str]] = [
    ("model=None", lambda: load(None), "model=None: give a folder"),
    ("model=3", lambda: load(3), "model=3: give a folder"),
    ("model=''", lambda: load(""), "model='': give a folder"),
    ("a misspelled model", lambda: load("shape"), "did you mean 'shapes'"),
    ("an empty folder", lambda: load("empty"), "no model_index.json"),
    ("a text file", lambda: load("file.txt"), "is a file; a model is a folder"),
    ("a pickle", lambda: load("model.ckpt"), "ragturbo convert"),
    ("a single file", lambda: load("one.safetensors"), "Generator.from_single_file"),
    ("a file that is not there", lambda: load("none.safetensors"), "there is no file"),
    ("not a pipeline", lambda: load(torch.nn.Linear(1, 1)), "model is a Linear"),
    ("device='tpu'", lambda: load(device="tpu"), "device='tpu' is not one of 'cpu', 'cuda'"),
    ("device=3", lambda: load(device=3), "device='3'"),
    ("dtype='int8'", lambda: load(dtype="int8"), "dtype='int8' is not one of float32"),
    ("dtype=torch.int8", lambda: load(dtype=torch.int8), "dtype=torch.int8"),
    ("engine", lambda: load(engine="grpah"), "did you mean 'graph'"),
    ("graph on a CPU", lambda: load(engine="graph", device="cpu"), "needs a CUDA device"),
    ("vae", lambda: load(vae="tinny"), "did you mean 'tiny'"),
    ("vae=None", lambda: load(vae=None), "vae=None"),
    ("batch_sizes", lambda: load(batch_sizes=(3,)), "powers of two"),
    ("batch_window", lambda: load(batch_window="x"), "batch_window='x'"),
    ("max_queue", lambda: load(max_queue=0), "max_queue=0"),
    ("host_cache", lambda: load(host_cache="8Gigs"), "like '8GiB'"),
    ("prompt_cache", lambda: load(prompt_cache=-1), "prompt_cache=-1"),
    ("retriever", lambda: load(retriever="fiass"), "retriever='fiass' is not one of"),
    ("retriever=3", lambda: load(retriever=3), "implement search"),
    ("compose", lambda: load(compose="yes"), "compose='yes'"),
    ("attention", lambda: load(attention="flash"), "attention='flash'"),
    ("capture", lambda: load(capture="no"), "capture='no' must be True or False"),
    ("compile", lambda: load(compile=1), "compile=1 must be True or False"),
    ("revision", lambda: load(revision=3), "revision=3"),
    ("distilled", lambda: load(distilled=1), "distilled=1"),
    ("scheduler", lambda: load(scheduler="ddim"), "a scheduler of diffusers"),
    ("database=True", lambda: load(database=True), "database=True: give a folder"),
    ("database=3", lambda: load(database=3), "database=3"),
    ("a database that is not there", lambda: load(database="nowhere"), "db build"),
    ("an empty folder as database", lambda: load(database="empty"), "not a ragturbo database"),
    ("database=[]", lambda: ragturbo.generate("a", database=[]), "give a folder"),
    ("adapter=3", lambda: load(adapter=3), "adapter=3: give a folder"),
    ("a name where a Bundle belongs", lambda: Generator("shapes"), r"use Generator.from_pretrained\('shapes'\)"),
    ("a file of None", lambda: Generator.from_single_file(None), "path=None must be a file"),
    ("a revision of the package", lambda: load(revision="main"), "is a local model"),
    ("token=3", lambda: load(token=3), "token=3"),
    ("local_files_only", lambda: load(local_files_only="x"), "local_files_only='x' must be True or False"),
    ("attention without a GPU", lambda: load(attention="triton", device="cpu"), "needs a GPU"),
    ("a file as database", lambda: load(database="file.txt"), "it is a file"),
    ("adapter=True", lambda: load(adapter=True), "adapter=True: give a folder"),
    ("an adapter that is not there", lambda: load(adapter="nowhere"), "there is no adapter nowhere"),
    ("an empty folder as adapter", lambda: load(adapter="empty"), "neither adapter.safetensors"),
    ("a text file as adapter", lambda: load(adapter="file.txt"), "not a complete safetensors file"),
]
CALLS: list[tuple[str, Callable[[Any], Any], str]] = [
    ("nothing", lambda gen: gen(), "either prompt or prompt_embeds"),
    ("bytes", lambda gen: gen(b"a"), "must be a text or a list"),
    ("a set", lambda gen: gen({"a"}), "must be a text or a list"),
    ("half a character", lambda gen: gen("a\ud800"), "not valid Unicode"),
    ("a huge side", lambda gen: gen("a", height=64_000), "from 1 to 8192"),
    ("a negative side", lambda gen: gen("a", width=-64), "width=-64"),
    ("a billion images", lambda gen: gen("a", num_images_per_prompt=10**9), "from 1 to 4096"),
    ("guidance as text", lambda gen: gen("a", guidance_scale="7"), "guidance_scale='7'"),
    ("no values", lambda gen: gen("a", lam=[]), "0 values of lam for 1 image"),
    ("λ as text", lambda gen: gen("a", lam="high"), "lam='high' must be a number"),
    ("an unknown id", lambda gen: gen("a", neighbors=[10**9]), "which the database does not have"),
    ("neighbours as text", lambda gen: gen("a", neighbors="a cat"), "non-empty list"),
    ("an image that is not there", lambda gen: gen("a", neighbors=[("a cat", "no.png")]), "no.png: .*no such file"),
    ("a text as image", lambda gen: gen("a", neighbors=[("a cat", "file.txt")]), "file.txt: .*no known format"),
    ("image before caption", lambda gen: gen("a", neighbors=[(PICTURE, "a cat")]), "in this order"),
    ("a pair without caption", lambda gen: gen("a", neighbors=[("", PICTURE)]), "the caption is empty"),
    ("a wrong key", lambda gen: gen("a", query=torch.ones(7)), r"\(128,\) or \(1, 128\)"),
    ("too many neighbours", lambda gen: gen("a", num_neighbors=17), "from 1 to 16"),
    ("latents of NumPy", lambda gen: gen("a", latents=np.zeros((1, 4, 16, 16))), "latents must be a tensor"),
    ("whole latents", lambda gen: gen("a", latents=torch.zeros(1, 4, 16, 16, dtype=torch.int64)), "floating-point"),
    ("slerp at another size", lambda gen: gen("a", mode="slerp", height=128), "128x64 .* or an adapter"),
    ("a hook that returns nothing", lambda gen: gen("a", postprocess=print), "postprocess returned nothing"),
    ("a made-up reservation", lambda gen: gen("a", reservation=3), "must come from reserve"),
    ("no room", lambda gen: gen.reserve(0), "images=0"),
    ("a wait of text", lambda gen: gen.reserve(1, timeout="x"), "timeout='x'"),
    ("a wait of centuries", lambda gen: gen("a", timeout=10**30), "at most 1000000"),
    ("images as text", lambda gen: gen.expected_wait("x"), "images='x'"),
    ("no adapter", lambda gen: gen.load_adapter(None), "load_adapter takes a folder"),
    ("no database", lambda gen: gen.use_database(3), "database=3 must be a folder"),
    ("teaching the package", lambda gen: gen.teach("a lorp", PICTURE), "ragturbo db copy shapes my-db"),
    ("a positional seed", lambda gen: gen("a", 7), "positional"),
]


@pytest.fixture(scope="module")
def gen() -> Iterator[Generator]:
    with load("shapes", device="cpu") as generator:
        yield generator


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("file.txt", "model.ckpt", "one.safetensors"):
        (tmp_path / name).write_text("x")
    monkeypatch.chdir(tmp_path)


def answered(type_it: Callable[[], Any], says: str) -> None:
    """The error is this library's (or Python's own of a wrong call), says what is wrong, and shows no internals."""
    with pytest.raises((RagTurboError, TypeError)) as raised:
        type_it()
    message = str(raised.value)
    assert re.search(says, message), message
    assert len(message) < 400 and not re.search(r"Traceback|FileSum|Errno", message), message


@pytest.mark.parametrize(("type_it", "says"), [row[1:] for row in LOADING], ids=[row[0] for row in LOADING])
def test_a_mistake_in_loading_is_answered_in_words(type_it, says):
    answered(type_it, says)


@pytest.mark.parametrize(("type_it", "says"), [row[1:] for row in CALLS], ids=[row[0] for row in CALLS])
def test_a_mistake_in_a_call_is_answered_in_words(gen, type_it, says):
    answered(lambda: type_it(gen), says)
    assert gen("a red circle", seed=1).mode == "adapter"


def test_a_prompt_of_any_text_is_drawn(gen):
    for prompt in ("🦊", "a\0b", "\u202ea red circle", "ａ ｒｅｄ circle", "red circle " * 2000, " a ", "</s>"):
        assert len(gen(prompt, seed=1).images) == 1


def test_a_closed_generator_says_so():
    gen = ragturbo.Generator.from_pretrained("shapes", device="cpu")
    gen.close()
    answered(lambda: gen("a red circle"), "is closed; make a new one")
