"""The gradients of a step, and every kind of training run."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from ragturbo.errors import InvalidRequest


def test_regression_is_only_on_samples_with_a_noise_of_their_own(make, world, grown, batches, gradients):
    """A real image has no noise at t = T: Eqs. 8-9 on it are ill-posed."""
    paired = make()
    real = make(data__sources=[{"path": str(world.real)}], loss__adversarial=0.0)
    assert all(bool(b.paired.all()) for b in batches(paired)) and not any(bool(b.paired.any()) for b in batches(real))
    g, d = gradients(grown(real), batches(real))
    assert all(not value.any() for value in g.values()) and any(value.any() for value in d.values())


def test_one_shared_pass_of_the_fakes_has_the_gradients_of_two(make, grown, batches, gradients):
    parts = batches(make())
    for misaligned in (False, True):
        one = gradients(grown(make(discriminator__misaligned=misaligned)), parts)
        settings = {"discriminator__misaligned": misaligned, "discriminator__shared_fake": False}
        two = gradients(grown(make(**settings)), parts)
        for a, b in zip(one, two, strict=True):
            for name in a:
                torch.testing.assert_close(a[name], b[name], atol=2e-5, rtol=2e-3)


def test_a_misaligned_pair_with_the_same_prompt_counts_for_nothing(make, batches):
    trainer = make(discriminator__misaligned=True)
    batch = batches(trainer, 1)[0]
    batch.input_ids[1] = batch.input_ids[0]
    assert trainer.objective.fake_weight(batch).tolist() == [[1, 1, 0, 0]] * 3
    with pytest.raises(InvalidRequest, match="micro-batch, which has 1 here"):
        make(discriminator__misaligned=True, loop__micro_batch=1)


def test_a_wrong_prompt_is_a_fake_only_to_heads_that_read_it(make, batches, gradients):
    """To a head whose stage does not depend on the prompt, a misaligned pair is a real image labelled fake."""
    trainer = make(discriminator__misaligned=True)
    assert trainer.discriminator.backbone.reads_text == [True, True, True]
    trainer.discriminator.backbone.reads_text = [False, False, True]
    batch = batches(trainer, 1)[0]
    assert trainer.objective.fake_weight(batch).tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]]
    _, with_wrong = gradients(trainer, [batch])
    _, without = gradients(make(), [batch])
    same = {name for name in without if torch.allclose(with_wrong[name], without[name], atol=1e-6)}
    assert {name for name in without if "heads.mid" not in name} <= same
    assert not {name for name in without if name.startswith("heads.mid") and name.endswith("original")} & same


def test_with_images_alone_as_real_a_teachers_latents_are_none(make, world, gradients):
    """A student soon resembles the latents it is trained on, and heads that take these as real learn nothing."""
    sources = [{"path": str(world.data)}, {"path": str(world.real)}]
    trainer = make(data__sources=sources, discriminator__real="images", loop__micro_batch=4)
    batch = next(b for b in (trainer.load_batch(range(n, n + 4)) for n in range(0, 64, 4)) if 0 < b.paired.sum() < 4)
    _, d = gradients(trainer, [batch])
    other = dataclasses.replace(batch, z0=torch.where(batch.paired.view(-1, 1, 1, 1), -batch.z0, batch.z0))
    # At t = T the student sees only noise, so other latents in paired samples do not change the input of D.
    same, all_real = (gradients(make(data__sources=sources, discriminator__real=real, loop__micro_batch=4), [other])[1]
                      for real in ("images", "all"))  # fmt: skip
    weights = [name for name in d if "original" in name]
    assert all(torch.allclose(d[name], same[name], atol=1e-6) for name in weights)
    assert not any(torch.allclose(d[name], all_real[name], atol=1e-6) for name in weights)
    with pytest.raises(InvalidRequest, match="no source of data.sources has images"):
        make(discriminator__real="images")


def test_r1_smooths_the_heads_and_reaches_nothing_else(make, grown, batches, gradients):
    parts = batches(make())
    g0, d0 = gradients(grown(make()), parts)
    g1, d1 = gradients(grown(make(discriminator__r1=1.0)), parts)
    assert all(torch.equal(g0[name], g1[name]) for name in g0)
    assert any(not torch.allclose(d0[name], d1[name]) for name in d0)


@pytest.mark.parametrize(
    "changes",
    [
        {"loop__precision": "bf16"},
        {"loop__gradient_checkpointing": True},
        {"student__steps": 4},
        {"student__adapter": "attention", "student__num_neighbors": 2},
        {"student__adapter": "none"},
        {"student__lora": {"rank": 0}},
        {"student__neighbors": "random", "student__lam": 0.5},
        {"teacher": "self"},
        {"loss": {"beta": 1.0, "lpips_weights": "random"}},
        {"discriminator__stages": ["mid"]},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_every_way_to_train_moves_what_it_should_and_stays_finite(make, changes, copies):
    trainer = make(loop__max_steps=2, loop__sample_every=2, loop__batch=2, **changes)
    start = copies(trainer.masters.state())
    folder = trainer.train()
    assert trainer.skipped == 0 and trainer.updates == 2
    assert all(not torch.equal(value, start[name]) for name, value in trainer.masters.state().items())
    assert (trainer.out / "samples" / "000002.png").stat().st_size > 0
    adapter = changes.get("student__adapter") != "none"
    assert (folder / "adapter.safetensors").is_file() == adapter
    assert (folder / "decoder_lora").is_dir() == ("student__lora" not in changes)


def test_checkpointing_recomputes_and_changes_nothing(make, grown, batches, gradients):
    parts = batches(make())
    plain, saved = gradients(grown(make()), parts), gradients(grown(make(loop__gradient_checkpointing=True)), parts)
    for a, b in zip(plain, saved, strict=True):
        for name in a:
            torch.testing.assert_close(a[name], b[name])


def test_a_whole_student_trains_and_exports_as_a_model_of_its_own(make):
    from ragturbo.model.bundle import Bundle

    trainer = make(mode="student", student={"adapter": "none", "lora": {"rank": 0}}, loop__max_steps=2)
    assert set(trainer.masters.parameters) == {f"unet.{n}" for n, _ in trainer.student.unet.named_parameters()}
    folder = trainer.train()
    bundle = Bundle.load(folder, device="cpu")
    assert bundle.info.distilled and bundle.scheduler.config.timestep_spacing == "trailing"
    for name, value in bundle.unet.unet.state_dict().items():
        torch.testing.assert_close(value, trainer.ema.values[f"unet.{name}"])


def test_a_named_teacher_is_its_undistilled_unet(make, world, tiny_sd21):
    from ragturbo.errors import ModelError

    own, named, itself = (make(teacher=teacher) for teacher in (None, str(world.model), "self"))
    z, s, text = torch.randn(1, 4, 8, 8), torch.tensor([500]), torch.randn(1, 16, 32)
    with torch.no_grad():
        a, b, c = (trainer.discriminator.backbone(z, s, text) for trainer in (own, named, itself))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not any(torch.equal(x, y) for x, y in zip(a, c, strict=True))
    with pytest.raises(ModelError, match="is distilled"):
        make(teacher=str(tiny_sd21))


def test_retrieval_dropout_leaves_the_dropped_samples_to_the_plain_student(make, grown, batches):
    trainer = grown(make())
    batch = batches(trainer, 1)[0]
    key = trainer.objective.text(batch).key
    _, lam, valid, _ = trainer.objective.retrieved(batch, key, torch.tensor([True, False]))
    assert lam[0] == 0 and lam[1] > 0 and valid.tolist() == [[False], [True]]
    cosine = (key[1] @ batch.retr_keys[1, 0]).clamp(0, 1)
    torch.testing.assert_close(lam[1, 0], cosine)


def test_stats_say_what_each_head_does(make):
    trainer = make(loop__max_steps=2)
    trainer.train()
    lines = [json.loads(line) for line in (trainer.out / "stats.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert set(lines[0]["d_heads"]) == set(lines[0]["d_accuracy"]) == {"down_0", "down_1", "mid"}
    assert lines[1]["d"] == pytest.approx(sum(lines[1]["d_heads"].values()), rel=1e-5)
    assert all(0 <= value <= 1 for line in lines for value in line["d_accuracy"].values())


def test_tensorboard_holds_what_stats_hold(make):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = make(loop__max_steps=2, loop__tensorboard=True)
    trainer.train()
    board = EventAccumulator(str(trainer.out / "tensorboard")).Reload()
    lines = [json.loads(line) for line in (trainer.out / "stats.jsonl").read_text().splitlines()]
    for tag, values in (
        ("distill", [x["distill"] for x in lines]),
        ("d_heads/mid", [x["d_heads"]["mid"] for x in lines]),
    ):
        assert [event.step for event in board.Scalars(tag)] == [1, 2]
        assert [event.value for event in board.Scalars(tag)] == pytest.approx(values, rel=1e-6)


# Minutes of C++ on a CPU.
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_compiled_step_has_the_gradients_of_a_plain_one(make, batches, grown, gradients):
    parts = batches(make())
    plain, compiled = (gradients(grown(make(loop__compile=on)), parts) for on in (False, True))
    for a, b in zip(plain, compiled, strict=True):
        for name in a:
            torch.testing.assert_close(b[name], a[name], atol=1e-4, rtol=1e-2)
