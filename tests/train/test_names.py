"""Samples whose student prompt is not the one that the teacher drew, and neighbours found by name."""

from __future__ import annotations

import shutil

import pytest
import torch

from ragturbo.errors import InvalidRequest
from ragturbo.model.info import BundleInfo
from ragturbo.retrieval.database import Database
from ragturbo.train.data import database_name
from ragturbo.train.neighbors import NeighborSearch, write_neighbors
from ragturbo.train.relabel import relabel
from ragturbo.train.shards import Shards


@pytest.fixture(scope="module")
def named(world, tmp_path_factory):
    """The teacher's samples under other prompts, each with row i % 8 of the database as its neighbour."""
    source = Shards(world.data)
    prompts = [f"a photo of dog {i}" if i % 5 else None for i in range(len(source))]
    folder = tmp_path_factory.mktemp("names") / "named"
    relabel(world.data, prompts, folder, model=str(world.model), device="cpu")
    shards = Shards(folder)
    rows = torch.stack([torch.arange(len(shards)) % 8, torch.full((len(shards),), -1)], 1)
    name = database_name(Database.open(world.database))
    write_neighbors(shards, rows, torch.where(rows >= 0, 0.75, torch.nan), name)
    return folder


@pytest.fixture
def make_named(make, named):
    def trainer(**changes):
        settings = {
            "data__sources": [{"path": str(named)}], "student__lora": {"rank": 0}, "student__num_neighbors": 2,
            "loss__hspace": 1.0,
        }  # fmt: skip
        return make(**{**settings, **changes})

    return trainer


def test_relabelled_samples_keep_noise_and_latents_and_both_prompts(world, named):
    source, shards = Shards(world.data), Shards(named)
    kept = [i for i in range(len(source)) if i % 5]
    assert len(shards) == len(kept)
    for new, old in list(enumerate(kept))[:12]:
        for field in ("latents", "noise"):
            assert torch.equal(shards.read(new, field), source.read(old, field))
        assert torch.equal(shards.read(new, "teacher_ids"), source.read(old, "input_ids"))
    record = shards.records(0)[0]
    assert record["caption"] == "a photo of dog 1" and record["teacher_caption"] == source.records(0)[1]["caption"]


def test_relabelling_refuses_images_and_a_wrong_number_of_prompts(world, tmp_path):
    with pytest.raises(InvalidRequest, match="2 prompts for the"):
        relabel(world.data, ["a", "b"], tmp_path / "a", model=str(world.model), device="cpu")
    with pytest.raises(InvalidRequest, match="holds no teacher latents"):
        relabel(world.real, ["a"], tmp_path / "b", model=str(world.model), device="cpu")


def test_hybrid_neighbours_of_a_sample_share_its_rare_word(world, named, tmp_path):
    from ragturbo.model.bundle import Bundle

    database = Database.open(world.database, retriever="hybrid")
    captions = [record.caption for record in database.records(database.ids, thumbnails=False)]
    text = Bundle.load(str(world.model), device="cpu").text
    prompts = ["two boats beside a zib", "a yellow cat"]
    keys = text.encode(text.tokenize(prompts).input_ids).key.detach()
    ids, lam = NeighborSearch(database, 1)(keys, [{"caption": prompt} for prompt in prompts])
    assert "boat" in captions[int(ids[0, 0])] and captions[int(ids[1, 0])] != "a yellow cat"
    assert torch.isfinite(lam).all() and (lam <= 1).all() and (lam > 0).all()


def test_the_student_reads_its_own_prompt_and_d_the_teachers(make_named, batches):
    trainer = make_named()
    batch = batches(trainer, 1)[0]
    own, shown = trainer.objective.text(batch).hidden_states, trainer.objective.teacher_text(batch)
    assert not torch.equal(own, shown)
    assert torch.equal(shown, trainer.bundle.text.encode(batch.teacher_ids).hidden_states)


def test_given_neighbours_keep_their_own_lambda(make_named, batches):
    trainer = make_named()
    batch = batches(trainer, 1)[0]
    text = trainer.objective.text(batch)
    found = trainer.objective.retrieved(batch, text.key, torch.zeros(len(batch), dtype=torch.bool))
    assert found.valid.tolist() == [[True, False]] * len(batch)
    assert torch.equal(found.lam, 0.75 * found.valid.float()) and found.phrases is None


def test_neighbours_by_phrase_train_the_adapters_phrase_embeddings(make_named, named, world, grown, batches, tmp_path):
    """The first neighbour is of the prompt's second phrase; its first has none."""
    shards = Shards(shutil.copytree(named, tmp_path / "named"))
    shutil.rmtree(shards.folder / "neighbors")
    rows = torch.stack([torch.full((len(shards),), -1), torch.arange(len(shards)) % 8], 1)
    lam = torch.tensor([0.0, 0.75]).expand(rows.shape)
    write_neighbors(shards, rows, lam, database_name(Database.open(world.database)))
    trainer = grown(make_named(data__sources=[{"path": str(shards.folder)}], student__phrases=2))
    batch = batches(trainer, 1)[0]
    drop = torch.zeros(len(batch), dtype=torch.bool)
    found = trainer.objective.retrieved(batch, trainer.objective.text(batch).key, drop)
    assert found.phrases.all() and found.valid.tolist() == [[False, True]] * len(batch)
    before = trainer.masters.state()["adapter.phrase"].clone()
    trainer.update(batches(trainer))
    after = trainer.masters.state()["adapter.phrase"]
    assert torch.equal(after[0], before[0]) and not torch.equal(after[1], before[1])

    folder = trainer.export(tmp_path / "bundle", whole=True)
    info = BundleInfo.read(folder)
    assert info.compose is True and info.num_neighbors == 1


def test_phrases_without_neighbours_by_phrase_are_refused(make, make_named):
    with pytest.raises(InvalidRequest, match="each phrase has one neighbour"):
        make_named(student__phrases=3)
    with pytest.raises(InvalidRequest, match="neighbours that belong to phrases"):
        make_named(student__phrases=2, student__neighbors="random")
    # Those of `ragturbo data neighbors` are of whole prompts.
    with pytest.raises(InvalidRequest, match="are of whole prompts"):
        make(student__phrases=1)


def test_regression_on_h_is_zero_where_both_prompts_are_the_same(make, make_named, batches):
    """An untrained adapter leaves h as it is, so that the error is that of the prompt alone."""
    plain = make(loss__hspace=1.0, student__lora={"rank": 0})
    stats = plain.objective.backward(batches(plain, 1)[0], plain.generator(0))
    assert float(stats["hspace"]) < 1e-10
    other = make_named()
    stats = other.objective.backward(batches(other, 1)[0], other.generator(0))
    assert float(stats["hspace"]) > 1e-4


def test_regression_on_h_alone_trains_the_adapter_alone(make_named, grown, batches, copies):
    silent = {"loss__adversarial": 0.0, "loss__alpha": 0.0}
    trainer = grown(make_named(**silent))
    before = copies(trainer.masters.state())
    trainer.update(batches(trainer))
    after = trainer.masters.state()
    assert all(name.startswith("adapter.") for name in before)
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_regression_on_h_needs_an_adapter(world):
    with pytest.raises(InvalidRequest, match="trains the adapter"):
        world.config(mode="student", student__adapter="none", student__lora={"rank": 0}, loss__hspace=1.0)
