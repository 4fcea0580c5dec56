"""`gen.teach` and `gen.forget`: what is stored, who sees it when, and what a failure leaves."""

from __future__ import annotations

import errno
import io
import os
import runpy
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ragturbo import Database, Generator
from ragturbo.errors import DatabaseError, DatabaseMismatch, GenerationError, InvalidRequest, OutOfDeviceMemory
from ragturbo.model import lora
from ragturbo.model.adapter import HSpaceAdapter
from ragturbo.model.bundle import Bundle
from ragturbo.retrieval import Record, durable

CAPTIONS = ["a red circle", "a blue square", "a green triangle"]


def picture(i: int) -> Image.Image:
    noise = np.random.default_rng(i).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((150, 140))


def huge() -> bytes:
    """A BMP of one pixel whose header says it has 144 million."""
    buffer = io.BytesIO()
    Image.new("RGB", (1, 1)).save(buffer, "BMP")
    data = bytearray(buffer.getvalue())
    struct.pack_into("<ii", data, 18, 12_000, 12_000)
    return bytes(data)


def files(folder: Path) -> dict[str, bytes]:
    """Every file of a database but its lock."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "LOCK"
    }


@pytest.fixture(scope="module")
def model(tiny, tmp_path_factory) -> Path:
    """A model with an adapter whose output projection is not zero: neighbours matter."""
    path = tiny.make_bundle(tmp_path_factory.mktemp("teach") / "model")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapter = HSpaceAdapter(64)
        torch.nn.init.normal_(adapter.proj_out.weight, std=0.3)
        adapter.save(path)
    return path


@pytest.fixture(scope="module")
def start(model, tmp_path_factory) -> Path:
    """A database of three pairs."""
    folder = tmp_path_factory.mktemp("teach") / "start"
    pairs = [(caption, picture(i)) for i, caption in enumerate(CAPTIONS)]
    Database.build(pairs, folder, model=Bundle.load(model, device="cpu", adapter=False))
    return folder


@pytest.fixture
def folder(start, tmp_path) -> Path:
    return shutil.copytree(start, tmp_path / "db")


@pytest.fixture
def gen(model, folder) -> Iterator[Generator]:
    with Generator.from_pretrained(model, database=folder, device="cpu") as generator:
        yield generator


def found(gen: Generator, prompt: str) -> list[int]:
    return [neighbor.id for neighbor in gen(prompt, seed=1, output_type="uint8", num_neighbors=1).neighbors[0]]


def test_the_next_request_finds_what_was_taught_until_it_is_forgotten(gen, folder):
    before = gen("a zib", seed=1, output_type="uint8")
    id = gen.teach("a zib", picture(9), source="a friend")
    assert id == 3
    out = gen("a zib", seed=1, output_type="uint8", num_neighbors=1)
    [[neighbor]] = out.neighbors
    assert (neighbor.id, neighbor.caption, neighbor.source, neighbor.used) == (3, "a zib", "a friend", True)
    assert neighbor.lam == pytest.approx(1.0, abs=1e-3) and not np.array_equal(out.images, before.images)
    assert Database.open(folder, verify="full").ids.tolist() == [0, 1, 2, 3]
    gen.forget(id)
    assert found(gen, "a zib") != [3]
    assert np.array_equal(gen("a zib", seed=1, output_type="uint8").images, before.images)
    gen.forget(id)
    with pytest.raises(InvalidRequest, match="99"):
        gen.forget(99)
    # Ids are not used again.
    assert gen.teach("a zib", picture(9)) == 4


def test_an_image_may_be_a_path_whose_name_becomes_the_source(gen, tmp_path):
    path = tmp_path / "zib.png"
    picture(9).save(path)
    by_path, by_bytes = gen.teach("a zib", path), gen.teach("a zib", path.read_bytes())
    first, second = gen.database.records([by_path, by_bytes])
    assert first.source == str(path) and second.source is None and first.sha256 == second.sha256
    rows = gen.database.rows([by_path, by_bytes])
    assert (rows[0] == rows[1]).all()


@pytest.fixture
def tuned(model, tmp_path) -> Path:
    """The model with a decoder LoRA, on which cached features must not depend."""
    import peft

    path = shutil.copytree(model, tmp_path / "tuned")
    unet = Bundle.load(model, device="cpu").unet.unet
    config = peft.LoraConfig(r=4, target_modules=r"up_blocks\..*(to_q|to_k)")
    peft.inject_adapter_in_model(config, unet, adapter_name=lora.NAME)
    unet.peft_config = {lora.NAME: config}
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "lora_" in name:
                parameter.fill_(0.2)
    lora.save_lora(unet, path / lora.FOLDER)
    return path


@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize("options", [{"engine": "reference"}, {"engine": "graph", "capture": False}])
def test_a_taught_pair_has_the_bytes_that_append_writes(dtype, options, model, tuned, tmp_path):
    torch.set_num_threads(1)
    pairs = [(caption, picture(i)) for i, caption in enumerate(CAPTIONS)]
    plain = Bundle.load(model, device="cpu", adapter=False)
    Database.build(pairs, tmp_path / "append", model=plain, feature_dtype=dtype)
    shutil.copytree(tmp_path / "append", tmp_path / "teach")
    picture(9).save(tmp_path / "zib.png")
    Database.open(tmp_path / "append").append([("two zibs", tmp_path / "zib.png")], model=plain)
    with Generator.from_pretrained(tuned, database=tmp_path / "teach", device="cpu", **options) as gen:
        gen("a dog", seed=1)
        gen.teach("two zibs", tmp_path / "zib.png")
        assert gen.info["decoder_lora"]
    appended, taught = files(tmp_path / "append"), files(tmp_path / "teach")
    names = [f"segments/000001.{kind}" for kind in ("hseg", "keys", "parquet")]
    assert [name for name in names if appended[name] != taught[name]] == []
    # A pair among others of a build has the same bytes, too.
    Database.build([*pairs, ("two zibs", picture(9))], tmp_path / "build", model=plain, feature_dtype=dtype)
    rows = [Database.open(tmp_path / name).rows([3]) for name in ("build", "teach")]
    assert np.array_equal(*rows)


def test_the_pair_is_encoded_by_the_loaded_model_on_the_device_thread(gen, monkeypatch):
    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("a second model was loaded")

    monkeypatch.setattr(Bundle, "load", refuse)
    threads = []
    encode = gen._bundle.vae.encode

    def spied(pixels: torch.Tensor) -> torch.Tensor:
        threads.append(threading.current_thread().name)
        return encode(pixels)

    monkeypatch.setattr(gen._bundle.vae, "encode", spied)
    gen.teach("a zib", picture(9))
    assert threads == ["ragturbo-device"]


def test_another_generator_sees_it_after_a_refresh(gen, model, folder):
    with Generator.from_pretrained(model, database=folder, device="cpu") as other:
        id = gen.teach("a zib", picture(9))
        assert found(other, "a zib") != [id]
        assert other.database.refresh()
        assert found(other, "a zib") == [id]
        gen.forget(id)
        assert found(other, "a zib") == [id]
        other.database.refresh()
        assert found(other, "a zib") != [id]


def test_another_process_appends_while_the_generator_is_open(gen, folder, model, tmp_path):
    picture(9).save(tmp_path / "zib.png")
    command = [sys.executable, "-c", "from ragturbo.cli import main; main()", "db", "append", folder,
               tmp_path / "zib.png", "--caption", "a zib", "--model", model, "--device", "cpu"]  # fmt: skip
    subprocess.run([str(part) for part in command], check=True, timeout=120)
    # Its own pair is added to the newest generation, and its refresh brings both.
    assert gen.teach("a frob", picture(8)) == 4
    assert found(gen, "a zib") == [3] and found(gen, "a frob") == [4]


def test_eight_threads_of_two_generators_lose_no_pair_while_requests_run(gen, model, folder, long_count):
    each = long_count(20)
    with Generator.from_pretrained(model, database=folder, device="cpu") as other:
        ids: list[int] = []
        errors: list[BaseException] = []
        stop = threading.Event()

        def guarded(work: Callable[[], None]) -> threading.Thread:
            def run() -> None:
                try:
                    work()
                except BaseException as error:
                    errors.append(error)

            thread = threading.Thread(target=run)
            thread.start()
            return thread

        def teach(number: int) -> None:
            own = (gen, other)[number % 2]
            for i in range(each):
                caption = f"a zib {number} {i}"
                id = own.teach(caption, picture(number))
                ids.append(id)
                assert own.database.records([id])[0].caption == caption

        def request() -> None:
            while not stop.is_set():
                out = gen("a red circle", seed=1, num_neighbors=1)
                assert out.neighbors[0][0].caption == "a red circle"

        client = guarded(request)
        for thread in [guarded(lambda n=n: teach(n)) for n in range(8)]:
            thread.join()
        stop.set()
        client.join()
        assert errors == []
    assert sorted(ids) == list(range(3, 3 + 8 * each))
    assert Database.open(folder, verify="full").ids.tolist() == list(range(3 + 8 * each))


@pytest.mark.parametrize(
    ("caption", "image", "message"),
    [
        ("", picture(9), "the caption is empty"),
        (" ", picture(9), "the caption is empty"),
        (7, picture(9), "the caption is int, not text"),
        ("x" * 20_000, picture(9), "20000 characters"),
        ("a zib", b"not an image", "cannot be read"),
        ("a zib", "missing.png", "missing.png: No such file"),
        ("a zib", 7, "an image must be a PIL image, a path or bytes"),
        ("a zib", huge(), "12000x12000 is more than 100000000 pixels"),
    ],
)
def test_a_wrong_pair_is_refused_and_changes_nothing(caption, image, message, gen, folder):
    before = files(folder)
    with pytest.raises(InvalidRequest, match=message):
        gen.teach(caption, image)
    assert files(folder) == before
    with pytest.raises(InvalidRequest, match="source=7 must be text"):
        gen.teach("a zib", picture(9), source=7)
    assert files(folder) == before and found(gen, "a zib")


def test_a_feature_that_is_not_finite_changes_nothing(gen, folder, monkeypatch):
    before, features = files(folder), gen._bundle.unet.retrieval_features
    monkeypatch.setattr(gen._bundle.unet, "retrieval_features", lambda *a: features(*a) * float("inf"))
    with pytest.raises(InvalidRequest, match="not finite"):
        gen.teach("a zib", picture(9))
    assert files(folder) == before
    monkeypatch.undo()
    assert gen.teach("a zib", picture(9)) == 3 and found(gen, "a zib") == [3]


def test_a_device_that_runs_out_of_memory_is_a_typed_error_and_changes_nothing(gen, folder, monkeypatch):
    def full(pixels: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    before = files(folder)
    monkeypatch.setattr(gen._bundle.vae, "encode", full)
    with pytest.raises(OutOfDeviceMemory, match="no room"):
        gen.teach("a zib", picture(9))
    assert files(folder) == before and found(gen, "a red circle") == [0]


def test_a_full_disk_leaves_the_database_and_the_generator_as_they_were(gen, folder, monkeypatch):
    before = gen("a zib", seed=1, output_type="uint8")

    def full(fd: int, data: memoryview) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(durable.os, "write", full)
    with pytest.raises(DatabaseError, match="No space left on device"):
        gen.teach("a zib", picture(9))
    monkeypatch.undo()
    assert Database.open(folder, verify="full").ids.tolist() == [0, 1, 2]
    after = gen("a zib", seed=1, output_type="uint8")
    assert np.array_equal(after.images, before.images) and after.lam == before.lam
    assert gen.teach("a zib", picture(9)) == 3 and found(gen, "a zib") == [3]


def test_if_a_stored_pair_cannot_be_opened_the_error_names_its_id(gen, folder, monkeypatch):
    def damaged(self: Database) -> bool:
        raise DatabaseError("too many open files")

    monkeypatch.setattr(Database, "refresh", damaged)
    with pytest.raises(DatabaseError, match="pair 3 is stored, but .*too many open files"):
        gen.teach("a zib", picture(9))
    assert found(gen, "a red circle") == [0]
    monkeypatch.undo()
    gen.database.refresh()
    assert found(gen, "a zib") == [3]


def test_a_closed_generator_teaches_nothing(model, folder):
    gen = Generator.from_pretrained(model, database=folder, device="cpu")
    gen.close()
    before = files(folder)
    with pytest.raises(GenerationError, match="closed"):
        gen.teach("a zib", picture(9))
    assert files(folder) == before


def test_without_a_database_the_error_says_how_to_make_one(model, folder):
    with Generator.from_pretrained(model, database=False, device="cpu") as gen:
        for call in (lambda: gen.teach("a zib", picture(9)), lambda: gen.forget(0)):
            with pytest.raises(InvalidRequest, match="no database .*`ragturbo db append my-db .*--create"):
                call()
        gen.use_database(folder)
        assert gen.teach("a zib", picture(9)) == 3


def test_the_database_of_an_installed_model_is_not_written_and_the_error_says_how_to_copy_it(tmp_path):
    with Generator.from_pretrained("shapes", device="cpu") as gen:
        own, pairs = gen.database.path, len(gen.database)
        before = {path: path.stat().st_mtime_ns for path in own.rglob("*")}
        for call in (lambda: gen.teach("a zib", picture(9)), lambda: gen.forget(0)):
            with pytest.raises(InvalidRequest, match="belongs to the model 'shapes'.*`ragturbo db copy shapes my-db`"):
                call()
        assert {path: path.stat().st_mtime_ns for path in own.rglob("*")} == before
        gen.use_database(Database.copy("shapes", tmp_path / "db"))
        gen.teach("a zib", picture(9))
        assert len(gen.database) == pairs + 1


def test_the_example_draws_the_taught_picture_and_the_prompt_before_and_after(tmp_path, capsys):
    main = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "teach.py"))["main"]
    main(["--out", str(tmp_path / "deep" / "teach.png"), "--caption", "a zib", "--seed", "1"])
    printed = capsys.readouterr().out
    assert "taught pair" in printed and printed.index("before: ") < printed.index("after: ")
    assert Image.open(tmp_path / "deep" / "teach.png").width > 3 * 192


def test_the_database_of_a_downloaded_model_is_not_written(gen, folder, monkeypatch):
    monkeypatch.setattr(gen._bundle, "database_path", folder)
    monkeypatch.setattr(gen._bundle, "name", "somebody/model")
    with pytest.raises(InvalidRequest, match="belongs to the model 'somebody/model'"):
        gen.teach("a zib", picture(9))
    # One that lies in a folder of the user's own is theirs.
    monkeypatch.setattr(gen._bundle, "name", str(folder.parent))
    assert gen.teach("a zib", picture(9)) == 3


def test_a_database_of_other_settings_than_the_models_is_refused(model, folder, tmp_path):
    plain = Bundle.load(model, device="cpu", adapter=False)
    keys = plain.text.encode(plain.text.tokenize(["a dog"]).input_ids).key.numpy()
    geometry = Database.open(folder).geometry
    rows = np.zeros((1, geometry.tokens, geometry.channels), np.float16)
    Database.write(tmp_path / "other", [([Record(0, "a dog")], keys, rows)], geometry=geometry)
    with Generator.from_pretrained(model, database=tmp_path / "other", device="cpu") as gen:
        with pytest.raises(DatabaseMismatch, match="was built with .* this encoder has"):
            gen.teach("a zib", picture(9))
    assert len(Database.open(tmp_path / "other")) == 1
