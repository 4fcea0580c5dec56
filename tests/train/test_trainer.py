"""The training loop, including the failures reported for public LADD trainers."""

from __future__ import annotations

import json
import logging

import pytest
import torch

from ragturbo.errors import InvalidRequest, NonFiniteOutput
from ragturbo.train import checkpoint
from ragturbo.train.losses import hinge_g

# What trains, and what does not


def test_only_adapter_decoder_lora_and_heads_move(make, batches, copies):
    trainer = make()
    frozen = {name: p for name, p in trainer.student.named_parameters() if not p.requires_grad}
    teacher = trainer.discriminator.backbone.unet.unet
    before = copies(frozen), copies(dict(teacher.named_parameters())), copies(trainer.masters.state())
    heads = copies(trainer.discriminator.heads.state_dict())
    for _ in range(2):
        trainer.update(batches(trainer))
    assert all(torch.equal(value, frozen[name]) for name, value in before[0].items())
    assert all(torch.equal(value, p) for (_, value), p in zip(before[1].items(), teacher.parameters(), strict=True))
    moved = {name for name, value in before[2].items() if not torch.equal(value, trainer.masters.state()[name])}
    # The first step moves what is zero; the second everything.
    assert moved == set(before[2])
    now = trainer.discriminator.heads.state_dict()
    # A hinge with every logit inside its margin pushes the last bias up as much as down.
    assert all(not torch.equal(v, heads[k]) for k, v in now.items() if not k.endswith("conv_out.bias"))
    assert {name.split(".")[0] for name in moved} == {"adapter", "unet"}
    assert all("up_blocks" in name and "lora_" in name for name in moved if name.startswith("unet"))


def test_the_encoder_stores_nothing_for_a_backward_pass(make, batches):
    trainer = make()
    batch = batches(trainer, 1)[0]
    state = trainer.student.hspace.encode
    seen = []
    trainer.student.hspace.encode = lambda *a, **k: seen.append(state(*a, **k)) or seen[-1]
    trainer.objective.estimate(batch, batch.noise)
    assert seen and not seen[0].h.requires_grad and not any(skip.requires_grad for skip in seen[0].skips)


def test_training_starts_at_the_student_itself(make, batches):
    trainer = make()
    batch = batches(trainer, 1)[0]
    ours = trainer.objective.estimate(batch, batch.noise)
    from ragturbo.model.bundle import Bundle
    from ragturbo.model.onestep import make_schedule

    plain = Bundle.load(trainer.config.model, device="cpu")
    schedule = make_schedule(plain.scheduler, 1, distilled=True)
    text = plain.text.encode(batch.input_ids).hidden_states
    x = batch.noise * schedule.init_sigma
    with torch.no_grad():
        out = plain.unet.unet(schedule.scale_input(x, 0), schedule.timesteps[0], text).sample
    torch.testing.assert_close(ours.detach(), schedule.x0(x, out, 0), atol=1e-4, rtol=1e-4)


# The reported failures


def test_a_later_checkpoint_differs_from_an_earlier_one(make):
    """Reported: saved checkpoints unchanged across steps."""
    trainer = make(loop__save_every=1, loop__max_steps=3, loop__keep=3)
    trainer.train()
    found = checkpoint.checkpoints(trainer.out / "checkpoints")
    assert [path.name for path in found] == ["step-000001", "step-000002", "step-000003"]
    states = [checkpoint.load(path)[0] for path in found]
    for earlier, later in zip(states, states[1:], strict=False):
        for kind in ("trainable", "ema", "heads", "optimizer_g", "optimizer_d"):
            same = [name for name, value in earlier[kind].items() if torch.equal(value, later[kind][name])]
            # The heads' last bias has no gradient while every logit is inside the hinge's margin.
            assert not [name for name in same if "conv_out.bias" not in name], (kind, same)
    last = trainer.masters.state()
    assert all(torch.equal(value, states[-1]["trainable"][name]) for name, value in last.items())


def test_the_average_follows_what_trains(make, batches, copies):
    """Reported: an EMA created and never updated."""
    trainer = make(loop__ema=0.5)
    start = copies(trainer.masters.state())
    trainer.update(batches(trainer))
    # The decay of the first update is (1 + 1) / (10 + 1).
    now, decay = trainer.masters.state(), 2 / 11
    for name, value in trainer.ema.values.items():
        torch.testing.assert_close(value, decay * start[name] + (1 - decay) * now[name])
    for n in range(40):
        trainer.ema.update(trainer.masters, 100 + n)
    assert all(torch.allclose(trainer.ema.values[name], now[name], atol=1e-6) for name in now)


def test_the_export_is_the_average_and_a_generator_loads_it(make, world):
    from ragturbo.model.bundle import Bundle

    trainer = make(loop__max_steps=2)
    folder = trainer.train()
    bundle = Bundle.load(world.model, device="cpu", adapter=folder)
    for name, value in bundle.adapter.state_dict().items():
        assert torch.equal(value, trainer.ema.values[f"adapter.{name}"])
    assert bundle.has_lora
    lora = {n: v for n, v in bundle.unet.unet.state_dict().items() if "lora_" in n}
    assert lora and all(torch.equal(value, trainer.ema.values[f"unet.{name}"]) for name, value in lora.items())


def test_a_whole_bundle_answers_with_what_was_trained(make):
    """The exported folder is a model with its own adapter, LoRA and database."""
    import ragturbo
    from ragturbo.model.info import BundleInfo

    trainer = make(loop__max_steps=1, student__num_neighbors=2)
    trainer.train()
    trainer.masters.load({k: v + 0.05 for k, v in trainer.masters.state().items()})
    trainer.ema.load(trainer.masters.state())
    folder = trainer.export(trainer.out / "bundle", whole=True)
    assert BundleInfo.read(folder).num_neighbors == 2
    with ragturbo.Generator.from_pretrained(folder, device="cpu", batch_sizes=(1,)) as gen:
        out = gen("a red circle", seed=1, output_type="latent", num_neighbors=2)
        assert out.mode == "adapter" and len(out.neighbors[0]) == 2
        other = gen("a red circle", seed=1, output_type="latent", neighbors=[9, 11])
        plain = gen("a red circle", seed=1, output_type="latent", mode="none")
    assert not torch.equal(out.images, other.images) and not torch.equal(out.images, plain.images)


def test_each_optimiser_has_its_own_options(make, batches, copies):
    """Reported: the discriminator's optimiser ignores its options."""
    options = {"lr": 3e-3, "betas": [0.0, 0.9], "weight_decay": 0.1, "eps": 1e-6}
    trainer = make(discriminator__optim=options, optim={"lr": 1e-4})
    d, g = trainer.optimizer_d.param_groups[0], trainer.optimizer_g.param_groups[0]
    assert (d["lr"], d["betas"], d["weight_decay"], d["eps"]) == (3e-3, (0.0, 0.9), 0.1, 1e-6)
    assert (g["lr"], g["betas"], g["weight_decay"], g["eps"]) == (1e-4, (0.9, 0.999), 0.0, 1e-8)
    heads, masters = set(trainer.discriminator.parameters()), set(trainer.masters.parameters.values())
    assert set(d["params"]) == heads and set(g["params"]) == masters and not heads & masters
    # At rate 0 the heads stay where they are; the student goes on.
    still = make(discriminator__optim={"lr": 0.0})
    before, student = copies(dict(still.discriminator.named_parameters())), copies(still.masters.state())
    still.update(batches(still))
    assert all(torch.equal(value, before[name]) for name, value in still.discriminator.named_parameters())
    assert any(not torch.equal(value, student[name]) for name, value in still.masters.state().items())


def test_the_g_step_leaves_no_gradient_in_d_and_no_mark_on_its_spectral_norm(make, grown, batches, copies):
    """Reported: D's gradients polluted by the G step."""
    trainer = grown(make())
    batch = batches(trainer, 1)[0]
    z = torch.randn(2, 4, 8, 8, requires_grad=True)
    text = trainer.objective.text(batch).hidden_states
    trainer.discriminator.train()
    before = copies(trainer.discriminator.state_dict())
    features = trainer.discriminator.backbone(z, torch.tensor([5, 900]), text)
    hinge_g(trainer.discriminator.judge(features)).backward()
    assert z.grad.abs().sum() > 0
    assert all(p.grad is None and p.requires_grad for p in trainer.discriminator.parameters())
    assert all(torch.equal(value, before[name]) for name, value in trainer.discriminator.state_dict().items())
    assert trainer.discriminator.training
    teacher = trainer.discriminator.backbone.unet.unet
    assert all(p.grad is None for p in teacher.parameters())


def test_d_learns_from_its_own_loss_alone(make, grown, batches, gradients):
    """The gradient in the heads is Eq. 6's whatever the weights of G's losses."""
    _, with_g = gradients(grown(make(loss__adversarial=1.0)), batches(make()))
    _, without = gradients(grown(make(loss__adversarial=0.0, loss__alpha=0.0)), batches(make()))
    assert with_g and all(torch.equal(value, without[name]) for name, value in with_g.items())


def test_a_batch_of_one_is_a_batch_like_any_other(make, monkeypatch, grown, batches):
    """Reported: collapse at batch size 1. Nothing here depends on the other samples of a batch: four micro-batches of
    one have the gradient of one of four."""
    draws = torch.Generator().manual_seed(3)
    fixed = {name: torch.rand(4, generator=draws) for name in "is"}
    eps = torch.randn(2, 4, 4, 8, 8, generator=draws)

    class Draws:
        """torch's random functions, with the same numbers for a sample however it is batched."""

        start = 0

        def randint(self, low, high, size, **_):
            which = "i" if high == 1 else "s"
            return (fixed[which][self.start : self.start + size[0]] * high).long()

        def randn(self, shape, **_):
            self.count += 1
            return eps[self.count - 1][self.start : self.start + shape[0]]

        def rand(self, size, **_):
            return torch.ones(size)

    sizes, results = (4, 1), []
    for size in sizes:
        trainer = grown(make(loop__micro_batch=size, student__retrieval_dropout=0.2))
        parts, given = batches(trainer), Draws()
        for name in ("randint", "randn", "rand"):
            monkeypatch.setattr(torch, name, getattr(given, name))
        trainer.student.train()
        # eval: each power iteration in train mode would change D between the micro-batches.
        trainer.discriminator.eval()
        for m, batch in enumerate(parts):
            given.start, given.count = m * size, 0
            trainer.objective.backward(batch, None, trainer.accumulation)
            trainer.masters.accumulate()
        monkeypatch.undo()
        d = {name: p.grad.clone() for name, p in trainer.discriminator.named_parameters()}
        results.append(({name: p.grad.clone() for name, p in trainer.masters.parameters.items()}, d))
    for whole, split in zip(*results, strict=True):
        for name in whole:
            torch.testing.assert_close(split[name], whole[name], atol=2e-5, rtol=2e-3)


def test_batches_of_one_train_without_collapse(make, batches):
    trainer = make(loop__batch=1, loop__micro_batch=1, loop__max_steps=12, optim__lr=2e-3)
    other = batches(make(loop__batch=4, loop__micro_batch=4), 1)[0]
    with torch.no_grad():
        before = trainer.objective.estimate(other, other.noise).std(0).mean()
    trainer.train()
    with torch.no_grad():
        after = trainer.objective.estimate(other, other.noise).std(0).mean()
    assert trainer.skipped == 0 and after > 0.5 * before


def test_a_head_at_its_starting_loss_is_reported_by_name(make, caplog):
    """Heads that stay at a hinge loss of 2 give no signal."""
    trainer = make(loop__max_steps=3, loop__dead_after=2, discriminator__optim={"lr": 0.0})
    with torch.no_grad():
        for head in trainer.discriminator.heads.values():
            head.conv_out.weight.zero_()
            head.conv_out.bias.zero_()
    with caplog.at_level(logging.WARNING, "ragturbo"):
        trainer.train()
    lines = [json.loads(line) for line in (trainer.out / "stats.jsonl").read_text().splitlines()]
    assert [line["dead_heads"] for line in lines] == [[], ["down_0", "down_1", "mid"], ["down_0", "down_1", "mid"]]
    assert sum("mid is still at its starting loss" in r.message for r in caplog.records) == 1


# NaN


def test_a_step_with_nan_is_skipped_and_counted(make, batches, copies):
    trainer = make()
    before = copies(trainer.masters.state()), copies(dict(trainer.discriminator.named_parameters()))
    average = copies(trainer.ema.values)
    bad = batches(trainer)
    bad[0].z0[0, 0, 0, 0] = float("nan")
    trainer.update(bad)
    assert (trainer.step, trainer.updates, trainer.skipped) == (1, 0, 1)
    assert all(torch.equal(value, before[0][name]) for name, value in trainer.masters.state().items())
    assert all(torch.equal(value, before[1][name]) for name, value in trainer.discriminator.named_parameters())
    assert all(torch.equal(value, average[name]) for name, value in trainer.ema.values.items())
    trainer.update(batches(trainer))
    assert (trainer.updates, trainer.skipped, trainer.skipped_in_a_row) == (1, 1, 0)
    assert all(torch.isfinite(value).all() for value in trainer.masters.state().values())


def test_a_run_of_nan_ends_with_an_error_and_not_in_silence(make, batches):
    trainer = make(loop__max_skipped=2)
    with pytest.raises(NonFiniteOutput, match="2 steps in a row"):
        for _ in range(2):
            bad = batches(trainer)
            bad[0].z0.fill_(float("inf"))
            trainer.update(bad)


# Samples that are not trained on


def test_held_out_pairs_tell_a_retrieving_students_loss_with_and_without_its_neighbours(make, world, grown):
    trainer = grown(make(data__held_out=str(world.data), loop__log_every=1, loop__held_out_every=2))
    batch = trainer.held_out.data.batch(range(6))
    measured = trainer.held_out.measure(trainer.objective.estimate, 2, trainer.device)
    for name, retrieve in (("held_out", True), ("held_out_alone", False)):
        trainer.held_out.count = 6
        with torch.no_grad():
            z0_hat = trainer.objective.estimate(batch, batch.noise, retrieve=retrieve)
        expected = torch.nn.functional.smooth_l1_loss(z0_hat, batch.z0).item()
        assert trainer.held_out.measure(trainer.objective.estimate, 2, trainer.device)[name] == pytest.approx(
            expected, rel=1e-5
        )
    assert measured["held_out"] != measured["held_out_alone"]
    trainer.train()
    rows = [json.loads(line) for line in (trainer.out / "stats.jsonl").read_text().splitlines()]
    assert ["held_out" in row for row in rows] == [False, True, False, True]


def test_measuring_changes_nothing_of_what_is_trained(make, world):
    watched, plain = make(data__held_out=str(world.data), loop__held_out_every=1), make()
    for trainer in (watched, plain):
        trainer.train()
    theirs = plain.masters.state()
    assert all(torch.equal(value, theirs[name]) for name, value in watched.masters.state().items())


def test_held_out_pictures_without_noise_are_refused(make, world):
    with pytest.raises(InvalidRequest, match="ragturbo data teacher"):
        make(data__held_out=str(world.real))
    with pytest.raises(InvalidRequest, match="held_out_every=3 is not a multiple"):
        make(data__held_out=str(world.data), loop__log_every=2, loop__held_out_every=3)
