"""Samples whose student prompt is not the teacher's, and training an encoder together with its adapter."""

from __future__ import annotations

import pytest
import torch

import ragturbo
from ragturbo.errors import DatabaseMismatch, InvalidRequest
from ragturbo.train.data import pairs_name
from ragturbo.train.neighbors import write_neighbors
from ragturbo.train.relabel import relabel
from ragturbo.train.shards import Plan, Shards, write_shard


@pytest.fixture(scope="module")
def named(world, tmp_path_factory):
    """The teacher's samples under other prompts, with text states, and encoded pairs as their neighbours."""
    from ragturbo.model.bundle import Bundle

    root = tmp_path_factory.mktemp("names")
    source = Shards(world.data)
    prompts = [f"a photo of dog {i}" if i % 5 else None for i in range(len(source))]
    folder = root / "named"
    relabel(world.data, prompts, folder, model=str(world.model), device="cpu")
    shards = Shards(folder)

    text = Bundle.load(str(world.model), device="cpu").text
    pairs = root / "pairs"
    Plan("encoded", 8, 8, {"test": True}).write_or_check(pairs)
    ids = text.tokenize([f"a dog {i}" for i in range(8)]).input_ids
    latents = torch.randn(8, *source.read(0, "latents").shape, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        states = text.encode(ids)
    fields = {"latents": latents, "input_ids": ids.int(), "text": states.hidden_states, "key": states.key}
    write_shard(pairs, 0, fields, [{"caption": f"a dog {i}"} for i in range(8)])
    rows = torch.stack([torch.arange(len(shards)) % 8, torch.full((len(shards),), -1)], 1)
    lam = torch.where(rows >= 0, 1.0, torch.nan)
    write_neighbors(shards, rows, lam, pairs_name(Shards(pairs)))
    return folder, pairs


@pytest.fixture
def joint(make, named):
    folder, pairs = named

    def trainer(**changes):
        settings = {
            "mode": "joint", "data__sources": [{"path": str(folder)}], "data__pairs": str(pairs),
            "student__lora": {"rank": 0}, "student__num_neighbors": 2,
        }  # fmt: skip
        return make(**{**settings, **changes})

    return trainer


def test_relabelled_samples_keep_noise_and_latents_and_both_prompts(world, named):
    source, shards = Shards(world.data), Shards(named[0])
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
    from ragturbo.retrieval.database import Database
    from ragturbo.train.neighbors import NeighborSearch

    database = Database.open(world.database, retriever="hybrid")
    captions = [record.caption for record in database.records(database.ids, thumbnails=False)]
    text = Bundle.load(str(world.model), device="cpu").text
    prompts = ["two boats beside a zib", "a yellow cat"]
    keys = text.encode(text.tokenize(prompts).input_ids).key.detach()
    ids, lam = NeighborSearch(database, 1)(keys, [{"caption": prompt} for prompt in prompts])
    assert "boat" in captions[int(ids[0, 0])] and captions[int(ids[1, 0])] != "a yellow cat"
    assert torch.isfinite(lam).all() and (lam <= 1).all() and (lam > 0).all()


def test_the_student_reads_its_own_prompt_and_d_the_teachers(joint, batches):
    trainer = joint()
    batch = batches(trainer, 1)[0]
    own, shown = trainer.objective.text(batch).hidden_states, trainer.objective.teacher_text(batch)
    assert not torch.equal(own, shown)
    assert torch.equal(shown, trainer.bundle.text.encode(batch.teacher_ids).hidden_states)


def test_joint_training_moves_encoder_decoder_and_adapter(joint, grown, batches, copies):
    trainer = grown(joint())
    before = copies(trainer.masters.state())
    trainer.update(batches(trainer))
    after = trainer.masters.state()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    for part in ("unet.down_blocks", "unet.mid_block", "unet.up_blocks", "adapter."):
        assert any(name.startswith(part) for name in moved), part


def test_neighbours_of_joint_training_are_encoded_with_the_current_weights(joint, batches):
    trainer = joint()
    batch = batches(trainer, 1)[0]
    text = trainer.objective.text(batch)
    h_retr, lam, valid = trainer.objective.retrieved(batch, text.key, torch.zeros(len(batch), dtype=torch.bool))
    assert valid.tolist() == [[True, False]] * len(batch) and torch.equal(lam, valid.float())
    own = trainer.student.hspace.retrieval_features(batch.pair_latents[:, 0], batch.pair_text[:, 0])
    torch.testing.assert_close(h_retr[:, 0], own, atol=1e-5, rtol=1e-5)
    assert h_retr.requires_grad and not h_retr[:, 1].any()


def test_a_joint_run_exports_a_model_with_its_adapter(joint, world):
    trainer = joint(loop__max_steps=2, loss__reconstruct=1.0)
    folder = trainer.train()
    with ragturbo.Generator.from_pretrained(folder, database=False, device="cpu") as gen:
        assert gen.info["adapter"] == "transformer" and gen.info["database"] is None
    with pytest.raises(DatabaseMismatch):
        ragturbo.Generator.from_pretrained(folder, database=world.database, device="cpu")


def test_a_dry_run_counts_what_joint_training_adds(world, named):
    from ragturbo.train.estimate import estimate

    joint = {"mode": "joint", "data__pairs": str(named[1]), "student__lora": {"rank": 0}}
    plain, more = (estimate(world.config(**joint, loss__hspace=weight)) for weight in (0.0, 1.0))
    assert plain["flops_per_sample"]["neighbours' features, forward"] > 0
    assert more["flops_per_sample"]["total"] > plain["flops_per_sample"]["total"]


def test_a_token_of_h_is_read_as_the_latents_under_it(joint):
    """The inverse of cutting latents into patches: channel, row and column stay where they are."""
    student = joint(loss__reconstruct=1.0).student
    side, patch, channels = 4, 2, 4
    latents = torch.randn(1, channels, side * patch, side * patch)
    patches = latents.view(1, channels, side, patch, side, patch).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    width = student.reconstruction.in_features
    with torch.no_grad():
        student.reconstruction.weight.copy_(torch.eye(channels * patch**2, width))
        student.reconstruction.bias.zero_()
        h = torch.nn.functional.pad(patches, (0, width - patches.shape[-1]))
        assert torch.equal(student.reconstruct(h), latents)


def test_regression_on_h_is_zero_where_both_prompts_are_the_same(make, named, world, batches):
    """An untrained adapter leaves h as it is, and so the error is that of the prompt alone."""
    folder, _ = named
    settings = {"loss__hspace": 1.0, "student__lora": {"rank": 0}, "student__adapter": "transformer"}
    plain = make(**settings)
    stats = plain.objective.backward(batches(plain, 1)[0], plain.generator(0))
    assert float(stats["hspace"]) < 1e-10
    from ragturbo.train.data import database_name

    shards, database = Shards(folder), plain.data.database
    copy = plain.out / "copy"
    import shutil

    shutil.copytree(folder, copy)
    shutil.rmtree(copy / "neighbors")
    ids = torch.zeros(len(shards), 1, dtype=torch.int64)
    write_neighbors(Shards(copy), ids, torch.ones(len(shards), 1), database_name(database))
    other = make(data__sources=[{"path": str(copy)}], **settings)
    stats = other.objective.backward(batches(other, 1)[0], other.generator(0))
    assert float(stats["hspace"]) > 1e-4
    unet = {name for name, p in other.student.named_parameters() if p.grad is not None and name.startswith("unet.")}
    assert not unet, "the regression on h trains the adapter alone"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "joint", "student__lora": {"rank": 0}}, "needs data.pairs"),
        ({"mode": "joint"}, "set student.lora.rank=0"),
        ({"loss__reconstruct": 1.0}, "for mode=joint"),
        ({"mode": "student", "student__adapter": "none", "student__lora": {"rank": 0}, "loss__hspace": 1.0}, "adapter"),
    ],
)
def test_settings_of_joint_training_are_refused_elsewhere(world, changes, message):
    with pytest.raises(InvalidRequest, match=message):
        world.config(**changes)
