"""Samples on disk, their order, and the commands that make them."""

from __future__ import annotations

import json
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ragturbo.errors import DatabaseError, InvalidRequest
from ragturbo.train.data import Mixture, Prefetcher, TrainingData
from ragturbo.train.encode import make_encoded_data
from ragturbo.train.folder import Plan, remaining
from ragturbo.train.neighbors import NeighborSearch, make_neighbors
from ragturbo.train.prompts import read_prompts
from ragturbo.train.shards import Shards, write_shard
from ragturbo.train.teacher import TeacherSampler, load_teacher, make_teacher_data

PROMPTS = ["a red cat", "a blue dog on a boat", "two green triangles", "a photo", "yellow circle"]


def write(folder, counts, **fields):
    total, rows = len(counts), iter(range(10_000))
    Plan("test", total * 4, 4, {}).write_or_check(folder)
    for shard, count in enumerate(counts):
        numbers = [next(rows) for _ in range(count)]
        tensors = {"latents": torch.tensor(numbers, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 4, 2, 2)}
        write_shard(folder, shard, tensors if count else {}, [{"caption": f"é {n}"} for n in numbers])
    return Shards(folder)


def records(shards):
    return [record for shard in range(len(shards.files)) for record in shards.records(shard)]


# Shards


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=6).filter(any))
def test_every_sample_written_is_read_back_at_its_number(tmp_path_factory, counts):
    shards = write(tmp_path_factory.mktemp("shards"), counts)
    assert len(shards) == sum(counts)
    for n in range(len(shards)):
        assert shards.read(n, "latents").unique().item() == n
    assert records(shards) == [{"caption": f"é {n}"} for n in range(len(shards))]
    for beyond in (-1, len(shards)):
        with pytest.raises(IndexError):
            shards.read(beyond, "latents")


def test_an_unfinished_folder_says_what_is_missing_and_how_to_go_on(tmp_path):
    write(tmp_path, [4, 2, 4])
    (tmp_path / "000001.safetensors").unlink()
    with pytest.raises(DatabaseError, match="1 of its 3 shards are missing .000001.safetensors.*again"):
        Shards(tmp_path)
    with pytest.raises(DatabaseError, match="there is no folder .*elsewhere: make it with"):
        Shards(tmp_path / "elsewhere")


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 20), st.integers(1, 5), st.sets(st.integers(0, 19)))
def test_processes_share_what_is_left_however_many_there_were(tmp_path_factory, shards, world, done):
    folder = tmp_path_factory.mktemp("shared")
    for i in done:
        (folder / f"{i:06d}.safetensors").touch()
    taken = []
    for rank in range(world):
        # One after the other: those that start late find the work of the others done.
        part = remaining(folder, shards, rank, world)
        for i in part:
            (folder / f"{i:06d}.safetensors").touch()
        taken += part
    assert sorted(taken) == sorted(set(range(shards)) - done)


# Order


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(1, 3000), min_size=1, max_size=3), st.data())
def test_every_epoch_takes_every_sample_once_and_every_block_every_share(lengths, data):
    weights = data.draw(st.lists(st.integers(1, 9), min_size=len(lengths), max_size=len(lengths)))
    seed = data.draw(st.integers(0, 2**31))
    mixture = Mixture(lengths, weights, seed)
    places = [mixture(n) for n in range(2048)]
    again = Mixture(lengths, weights, seed)
    assert [again(n) for n in range(1500, 1600)] == places[1500:1600]
    for source, length in enumerate(lengths):
        taken = [index for s, index in places if s == source]
        for epoch in range(len(taken) // length):
            assert sorted(taken[epoch * length : (epoch + 1) * length]) == list(range(length))
        for block in (0, 1):
            share = sum(s == source for s, _ in places[1024 * block : 1024 * (block + 1)])
            assert abs(share - 1024 * weights[source] / sum(weights)) <= 1


def test_a_source_too_light_to_be_seen_is_refused():
    with pytest.raises(InvalidRequest, match="leave it out"):
        Mixture([10, 10], [1, 10_000], 0)


def test_what_is_read_ahead_comes_in_order_and_an_error_at_its_place():
    def load(n):
        if n == 3:
            raise ValueError("three")
        return n

    before = threading.active_count()
    reader = Prefetcher(load, iter(range(10)), 2)
    assert [reader.next() for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="three"):
        reader.next()
    reader.close()
    stopped = Prefetcher(load, iter(range(3)), 1)
    stopped.close()
    assert threading.active_count() == before


# Teacher


def test_the_stored_noise_is_the_one_that_made_the_latents(world, tmp_path):
    make_teacher_data(PROMPTS, tmp_path, model=str(world.model), steps=2, shard_size=2, batch=2, device="cpu")
    shards = Shards(tmp_path)
    assert shards.plan.kind == "teacher" and shards.fields == {"latents", "noise", "input_ids"}
    bundle, unet = load_teacher(str(world.model), "cpu", None)
    assert unet is bundle.teacher
    sampler = TeacherSampler(unet, bundle.scheduler, steps=2, guidance=7.5)
    empty = bundle.text.encode(bundle.text.tokenize([""]).input_ids).hidden_states
    noise = torch.stack([shards.read(i, "noise") for i in (2, 3)])
    assert noise.dtype == torch.float16
    text = bundle.text.encode(torch.stack([shards.read(i, "input_ids") for i in (2, 3)]).long()).hidden_states
    again = sampler(noise, text, empty).half()
    assert torch.equal(again, torch.stack([shards.read(i, "latents") for i in (2, 3)]))
    assert [record["caption"] for record in records(shards)] == PROMPTS


def test_the_sampler_is_diffusers_own_pipeline(world):
    """The same UNet, prompt and noise through StableDiffusionPipeline with guidance."""
    from diffusers import StableDiffusionPipeline

    bundle, _ = load_teacher(str(world.model), "cpu", None)
    unet = bundle.unet.unet
    pipe = StableDiffusionPipeline.from_pretrained(world.model, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    theirs = pipe(
        "a red cat", num_inference_steps=4, guidance_scale=7.5, latents=noise, output_type="latent", height=64, width=64
    ).images
    states = [bundle.text.encode(bundle.text.tokenize([p]).input_ids).hidden_states for p in ("a red cat", "")]
    ours = TeacherSampler(unet, bundle.scheduler, steps=4, guidance=7.5)(noise, *states)
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)


def test_a_distilled_model_is_no_teacher(tiny_sd21, tmp_path):
    from ragturbo.errors import ModelError

    with pytest.raises(ModelError, match="distilled"):
        make_teacher_data(PROMPTS, tmp_path, model=str(tiny_sd21), device="cpu")


def test_a_folder_made_again_with_other_processes_has_the_same_bytes(world, tmp_path, monkeypatch):
    options = {"model": str(world.model), "steps": 1, "shard_size": 2, "batch": 2, "device": "cpu"}
    make_teacher_data(PROMPTS, tmp_path / "one", **options)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert make_teacher_data(PROMPTS, tmp_path / "two", **options).made == 1
    # The other process was killed; three are started in its place.
    for rank in range(3):
        monkeypatch.setenv("WORLD_SIZE", "3")
        monkeypatch.setenv("RANK", str(rank))
        make_teacher_data(PROMPTS, tmp_path / "two", **options)
    for file in sorted((tmp_path / "one").glob("*.safetensors")):
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()
    with pytest.raises(InvalidRequest, match="made_by.guidance .was 7.5, now 3.0."):
        make_teacher_data(PROMPTS, tmp_path / "two", **options, guidance=3.0)


# Encode


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    rows = []
    for i, side in enumerate((64, 96, 40, 80)):
        pixels = np.random.default_rng(i).integers(0, 255, (side, side + 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        rows.append({"image": f"{i}.png", "caption": f"a {i}", "aes": 5 + i})
    (folder / "broken.png").write_bytes(b"\x89PNG nothing")
    rows.append({"image": "broken.png", "caption": "broken", "aes": 9})
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "pairs.jsonl"


def test_real_images_are_encoded_and_the_unfit_left_out(world, pictures, tmp_path):
    options = {"model": str(world.model), "size": 64, "shard_size": 2, "batch": 2, "device": "cpu"}
    make_encoded_data(pictures, tmp_path / "all", min_size=64, **options)
    shards = Shards(tmp_path / "all")
    assert [record["caption"] for record in records(shards)] == ["a 0", "a 1", "a 3"]
    assert "noise" not in shards.fields and tuple(shards.read(0, "latents").shape) == (4, 8, 8)
    make_encoded_data(pictures, tmp_path / "scored", min_size=1, score_column="aes", min_score=6, **options)
    scored = Shards(tmp_path / "scored")
    assert [record["score"] for record in records(scored)] == [6.0, 7.0, 8.0]
    from ragturbo.model.bundle import Bundle
    from ragturbo.retrieval.images import square

    bundle = Bundle.load(world.model, device="cpu", adapter=False)
    picture = torch.from_numpy(square(pictures.parent / "3.png", 64).copy())
    pixels = picture.permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        expected = bundle.vae.encode(pixels)[0]
    torch.testing.assert_close(shards.read(2, "latents").float(), expected, atol=2e-3, rtol=2e-3)


# Neighbours


def test_a_sample_never_has_itself_or_its_double_as_a_neighbour(world):
    """The first eight prompts are in the database word for word."""
    shards = Shards(world.data)
    table = shards.neighbors()
    from ragturbo.retrieval.database import Database

    db = Database.open(world.database)
    for i, caption in enumerate(record["caption"] for record in records(shards)):
        ids, lam = table.read(i)
        assert (ids >= 0).all() and len(set(ids.tolist())) == 2
        assert caption not in [record.caption for record in db.records(ids, thumbnails=False)]
        assert (lam[:-1] >= lam[1:]).all() and (lam <= 1).all()


def test_images_sources_and_close_keys_are_doubles_too(world):
    from ragturbo.retrieval.database import Database

    db = Database.open(world.database)
    keys = db.keys(db.ids[:1])
    best = NeighborSearch(db, 1)(keys, [{"caption": "another"}])[0].item()
    assert best == db.ids[0]
    same_words = NeighborSearch(db, 1)(keys, [{"caption": "  A RED   circle "}])[0].item()
    assert same_words != best
    ids, lam = NeighborSearch(db, 2, max_cosine=0.99)(keys, [{"caption": "another"}])
    assert best not in ids.tolist()[0] and (lam[~lam.isnan()] < 0.99).all()


def test_too_few_neighbours_are_said_with_minus_one(world, caplog):
    from ragturbo.retrieval.database import Database

    db = Database.open(world.database)
    search = NeighborSearch(db, len(db) + 3)
    ids, lam = search(db.keys(db.ids[:1]), [{"caption": "a red circle"}])
    assert (ids[0] == -1).sum() == 4 and lam[0, -4:].isnan().all()


def test_neighbours_of_another_database_are_refused(world, tmp_path):
    with pytest.raises(
        InvalidRequest, match="started with other settings: k .was 2, now 3.. Use those, or delete that folder"
    ):
        make_neighbors(world.data, world.database, model=str(world.model), k=3, device="cpu")
    from ragturbo.retrieval.database import Database

    db = Database.open(world.database)
    with pytest.raises(InvalidRequest, match="2 neighbours a sample, not 5"):
        TrainingData([Shards(world.data)], [1.0], 0, database=db, num_neighbors=5)


# Prompts


def test_prompts_come_from_text_and_from_tables(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"TEXT": t, "aes": a} for t, a in (("one", 6.5), ("  two ", 6.0), ("", 9), ("three", 7))]
    (tmp_path / "p.txt").write_text("one\n\n two \nthree\n")
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "p.csv").write_text("TEXT,aes\n" + "\n".join(f"{r['TEXT']},{r['aes']}" for r in rows))
    pq.write_table(pa.Table.from_pylist([{**r, "aes": float(r["aes"])} for r in rows]), tmp_path / "p.parquet")
    assert read_prompts(tmp_path / "p.txt").texts == ["one", "two", "three"]
    for kind in ("jsonl", "csv", "parquet"):
        path = tmp_path / f"p.{kind}"
        assert read_prompts(path, caption="TEXT").texts == ["one", "two", "three"]
        assert read_prompts(path, caption="TEXT", score_column="aes", min_score=6.25).texts == ["one", "three"]
        assert read_prompts(path, caption="TEXT", limit=1).texts == ["one"]
        with pytest.raises(InvalidRequest, match="no column 'caption'"):
            read_prompts(path)
    with pytest.raises(InvalidRequest, match="--min-score needs --score-column"):
        read_prompts(tmp_path / "p.csv", min_score=1.0)
