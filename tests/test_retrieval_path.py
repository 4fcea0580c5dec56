"""From prompt to neighbours to image: retrieved features must affect the image, and nothing else may."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ragturbo import Database, Generator
from ragturbo.errors import DatabaseMismatch, InvalidRequest
from ragturbo.model.adapter import HSpaceAdapter
from ragturbo.retrieval import Geometry, Record

CAPTIONS = [
    "a red circle",
    "a blue square",
    "a green triangle",
    "a photo of a cat",
    "a dog with a boat",
    "a yellow boat",
]
PROMPT = "a red circle left of a blue square"


def picture(i: int) -> Image.Image:
    noise = np.random.default_rng(i).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((150, 140))


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory) -> Path:
    """A model with an adapter whose output projection is not zero: neighbours matter."""
    path = tiny.make_bundle(tmp_path_factory.mktemp("rag") / "model")
    with Generator.from_pretrained(path, device="cpu") as gen, torch.random.fork_rng():
        torch.manual_seed(0)
        adapter = HSpaceAdapter(gen._bundle.unet.channels)
        torch.nn.init.normal_(adapter.proj_out.weight, std=0.3)
        adapter.save(path)
        pairs = encoded(gen, CAPTIONS)
        write(path / "database", gen, CAPTIONS, *pairs)
    return path


def encoded(gen: Generator, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    from ragturbo.engine.neighbors import pixels

    images = torch.stack([pixels(picture(i), gen._bundle.default_size) for i in range(len(captions))])
    keys, rows = gen._engine.encode_pairs(captions, images)
    return keys, rows


def write(path: Path, gen: Generator, captions: list[str], keys: torch.Tensor, rows: torch.Tensor) -> Database:
    size = gen._bundle.default_size // gen._bundle.vae.factor
    side = int(rows.shape[1] ** 0.5)
    assert side * side == rows.shape[1] and size % side == 0
    geometry = Geometry(side, side, rows.shape[2], "float16", keys.shape[1])
    records = [Record(i, caption, source=f"set-{i % 2}") for i, caption in enumerate(captions)]
    batch = (records, keys.numpy(), rows.numpy().astype(np.float16))
    return Database.write(path, [batch], geometry=geometry, key_kind="pooled", encoder=gen._bundle.fingerprint())


@pytest.fixture(scope="module")
def gen(folder: Path) -> Iterator[Generator]:
    with Generator.from_pretrained(folder, device="cpu") as generator:
        yield generator


def image(out) -> np.ndarray:
    return out.images


def test_a_bundles_own_adapter_and_database_are_the_default(gen):
    out = gen("a blue square", seed=1, output_type="np")
    assert out.mode == "adapter" and gen.info["database"]["pairs"] == len(CAPTIONS)
    [[neighbor]] = out.neighbors
    assert neighbor.caption == "a blue square" and neighbor.source == "set-1"
    # Stored in fp16: the prompt's own key comes back as a cosine of one but for that.
    assert neighbor.lam == pytest.approx(1.0, abs=1e-3) and out.lam == [pytest.approx(neighbor.lam)]


def test_another_neighbour_changes_the_image_and_lam_zero_is_mode_none_bit_for_bit(gen):
    def make(**options):
        return gen(PROMPT, seed=4, output_type="np", **options).images

    none = make(mode="none")
    first, second = make(neighbors=[0], lam=1.0), make(neighbors=[3], lam=1.0)
    assert np.abs(first - second).max() > 1e-3 and np.abs(first - none).max() > 1e-3
    assert np.array_equal(make(lam=0.0), none)
    assert np.array_equal(make(min_score=2.0), none)


def test_neighbours_under_min_score_are_named_but_not_used(gen):
    out = gen(PROMPT, seed=4, num_neighbors=2, min_score=2.0)
    assert out.lam == [0.0] and [n.used for n in out.neighbors[0]] == [False, False]


def test_more_neighbours_than_there_are_pairs_is_fine(gen):
    out = gen(PROMPT, seed=4, num_neighbors=10)
    assert sorted(n.id for n in out.neighbors[0]) == list(range(len(CAPTIONS)))


@pytest.mark.parametrize("mode", ["slerp", "lerp"])
def test_the_blends_have_their_ends(gen, mode):
    def make(**options):
        return gen(PROMPT, seed=4, mode=mode, output_type="np", **options).images

    none = gen(PROMPT, seed=4, mode="none", output_type="np").images
    assert np.allclose(make(w=1.0), none, atol=1e-5)
    assert np.array_equal(make(), make(w=0.8))
    assert np.abs(make(w=0.2, neighbors=[0]) - make(w=0.2, neighbors=[3])).max() > 1e-3


def test_slerp_wants_equal_grids_and_the_adapter_takes_any(gen):
    side = gen._bundle.default_size
    # As many tokens as the stored features have, but laid out otherwise.
    size = {"height": side // 2, "width": side * 2}
    with pytest.raises(InvalidRequest, match="features of 1x4, its neighbours 2x2"):
        gen(PROMPT, mode="slerp", **size)
    assert gen(PROMPT, mode="adapter", seed=1, **size).images[0].size == (side * 2, side // 2)


def test_neighbours_may_be_ids_neighbors_or_pairs_encoded_on_the_spot(gen):
    out = gen(PROMPT, seed=4, num_neighbors=2, output_type="np")
    by_neighbor = gen(PROMPT, seed=4, neighbors=out.neighbors[0], output_type="np")
    by_id = gen(PROMPT, seed=4, neighbors=[n.id for n in out.neighbors[0]], output_type="np")
    assert np.array_equal(out.images, by_id.images) and np.array_equal(out.images, by_neighbor.images)
    assert by_id.lam == out.lam
    pair = gen(PROMPT, seed=4, neighbors=[(CAPTIONS[3], picture(3))], output_type="np")
    stored = gen(PROMPT, seed=4, neighbors=[3], output_type="np")
    # The database keeps the feature in fp16; the pair is fresh.
    assert np.abs(pair.images - stored.images).max() < 1e-2 and pair.neighbors[0][0].caption == CAPTIONS[3]


def test_a_query_searches_in_the_prompts_place(gen):
    out = gen(PROMPT, seed=4, query="a green triangle")
    assert out.neighbors[0][0].caption == "a green triangle"
    key = gen._bundle.text.encode(gen._bundle.text.tokenize(["a photo of a cat"]).input_ids).key[0]
    assert gen(PROMPT, seed=4, query=key).neighbors[0][0].caption == "a photo of a cat"
    states = gen._bundle.text.encode(gen._bundle.text.tokenize([PROMPT]).input_ids).hidden_states
    embeds = gen(prompt_embeds=states, query="a green triangle", seed=4, output_type="np").images
    text = gen(PROMPT, query="a green triangle", seed=4, output_type="np").images
    assert np.abs(embeds - text).max() < 1e-5


def test_a_lexical_retriever_is_asked_with_words_and_lam_stays_the_cosine(folder):
    with Generator.from_pretrained(folder, device="cpu", retriever="bm25") as lexical:
        out = lexical("a cat", seed=1)
    with Generator.from_pretrained(folder, device="cpu", retriever="exact") as exact:
        same = exact("a cat", seed=1, neighbors=[out.neighbors[0][0].id])
    assert out.neighbors[0][0].caption == "a photo of a cat"
    assert out.neighbors[0][0].lam == pytest.approx(same.neighbors[0][0].lam, abs=1e-6)


def test_a_removal_takes_effect_with_the_next_call(folder, tmp_path):
    import shutil

    copy = shutil.copytree(folder / "database", tmp_path / "db")
    with Generator.from_pretrained(folder, database=copy, device="cpu") as gen:
        assert gen("a blue square", seed=1).neighbors[0][0].id == 1
        gen.database.remove(where={"source": "set-1"})
        assert gen("a blue square", seed=1).neighbors[0][0].source == "set-0"
        with pytest.raises(InvalidRequest, match="id 1"):
            gen("a blue square", neighbors=[1])


def test_a_database_of_another_model_is_refused_with_both_fingerprints(tiny, folder, tmp_path):
    other = tiny.make_bundle(tmp_path / "other", seed=1)
    with pytest.raises(DatabaseMismatch, match=r"\([0-9a-f]{8}, the model's is [0-9a-f]{8}\)"):
        Generator.from_pretrained(other, database=folder / "database", device="cpu")


def test_no_cosine_is_above_one(folder):
    database = Database.open(folder / "database")
    keys = database.keys(database.ids)
    for found in (keys, keys.numpy()):
        assert float(max(database.search(found, 1)[1].reshape(-1))) <= 1.0
    with Generator.from_pretrained(folder, device="cpu") as gen:
        for neighbors in (None, [0], [(CAPTIONS[0], picture(0))]):
            (neighbor,) = gen(CAPTIONS[0], seed=1, neighbors=neighbors).neighbors[0]
            assert 0.99 < neighbor.cosine <= 1.0 and 0.99 < neighbor.score <= 1.0


def test_without_a_database_and_with_one_put_in_later(folder):
    with Generator.from_pretrained(folder, database=False, device="cpu") as gen:
        assert gen(PROMPT, seed=1).mode == "none"
        with pytest.raises(InvalidRequest, match="needs a database"):
            gen(PROMPT, mode="adapter")
        gen.use_database(folder / "database")
        assert gen(PROMPT, seed=1).mode == "adapter"
        gen.use_database(None)
        assert gen(PROMPT, seed=1).mode == "none"


def test_a_database_without_an_adapter_is_used_by_slerp_which_is_said_once(folder, caplog):
    with Generator.from_pretrained(folder, adapter=False, device="cpu") as gen:
        assert gen(PROMPT, seed=1, mode="none").mode == "none" and not caplog.records
        assert gen.info["mode"] == "slerp" and "mode 'slerp'" in repr(gen)
        by_default = [gen(PROMPT, seed=1, output_type="uint8") for _ in range(2)][0]
        assert by_default.mode == "slerp" and by_default.neighbors[0]
        assert "no adapter: retrieved features are blended in by slerp with w = 0.8" in caplog.text
        assert len(caplog.records) == 1
        assert np.array_equal(by_default.images, gen(PROMPT, seed=1, mode="slerp", w=0.8, output_type="uint8").images)


def test_an_adapter_that_is_loaded_later_is_the_default(folder):
    with Generator.from_pretrained(folder, adapter=False, device="cpu") as gen:
        gen.load_adapter(folder)
        assert gen(PROMPT, seed=1).mode == "adapter"
