"""The recipe of the embedded model, at sizes that run in seconds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file

from ragturbo import Generator
from ragturbo.model.bundle import Bundle

WEIGHTS = "diffusion_pytorch_model.safetensors"


def test_training_scenes_glimpse_rare_kinds_a_few_times_and_never_again(recipe):
    from ragturbo.evaluate.world import RARE

    s, scene = recipe["settings"].Settings(), recipe["data"].training_scene
    seen = [kind for i in range(2000) for kind in scene(i, s).meaning.kinds if kind in RARE]
    assert {kind: seen.count(kind) for kind in RARE} == dict.fromkeys(RARE, s.rare_glimpses)
    assert all(scene(i, s).meaning.split == "train" for i in range(200))


def test_every_word_of_the_world_is_one_token(recipe, tmp_path):
    from ragturbo.evaluate.world import vocabulary

    tokenizer = recipe["networks"].make_tokenizer(tmp_path, recipe["settings"].Settings())
    ids = [tokenizer(word)["input_ids"] for word in vocabulary()]
    assert all(len(row) == 3 for row in ids) and len({row[1] for row in ids}) == len(ids)
    assert (tmp_path / "vocab.json").exists() and (tmp_path / "merges.txt").exists()


def test_a_stopped_run_resumes_to_the_same_weights(recipe, tmp_path):
    loop = recipe["loop"]

    def train(work: Path, stops: list[int]) -> torch.Tensor:
        work.mkdir()
        for stop in stops:
            torch.manual_seed(0)
            model = torch.nn.Linear(3, 3)
            mean, optimizer = loop.Average(model), torch.optim.AdamW(model.parameters(), lr=0.1)

            def update(step, generator, model=model, mean=mean, optimizer=optimizer):
                loss = (model(torch.randn(4, 3, generator=generator)) - 1).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                mean.update(model, step)
                return {"loss": loss.item()}

            loop.run("run", work, update, {"model": model, "mean": mean, "optimizer": optimizer}, steps=stop, seed=5)
        return torch.cat([p.flatten() for p in [*model.parameters(), *mean.parameters()]])

    whole = train(tmp_path / "whole", [70])
    assert torch.equal(whole, train(tmp_path / "parts", [1, 33, 70]))
    rows = [json.loads(line) for line in (tmp_path / "parts" / "run.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 70


def test_an_average_follows_its_module(recipe):
    module = torch.nn.Linear(2, 2)
    mean = recipe["loop"].Average(module, 0.9)
    with torch.no_grad():
        module.weight.add_(1)
    before = mean.module.weight.clone()
    mean.update(module, 10**6)
    assert torch.allclose(mean.module.weight, before + 0.1, atol=1e-6)


def test_whitening_changes_the_latents_and_not_the_pictures(recipe, rng):
    torch.manual_seed(1)
    vae = recipe["networks"].make_vae(recipe["settings"].Settings()).eval()
    images = rng.integers(0, 255, (48, 64, 64, 3), dtype=np.uint8)
    x = recipe["data"].to_float(images)
    with torch.no_grad():
        before = vae.decode(vae.encode(x).latent_dist.mean).sample
        recipe["stage_vae"].whiten(vae, images)
        latents = vae.encode(x).latent_dist.mean
        after = vae.decode(latents).sample
    cells = latents.permute(1, 0, 2, 3).flatten(1)
    assert torch.allclose(before, after, atol=1e-4)
    assert torch.allclose(torch.cov(cells), torch.eye(4), atol=1e-3) and cells.mean(1).abs().max() < 1e-3


class _Gaussian(torch.nn.Module):
    """The exact v where latents are normal with mean `where` and deviation `spread`; guidance has no effect."""

    def __init__(self, levels: tuple[torch.Tensor, torch.Tensor], where: float, spread: float) -> None:
        super().__init__()
        self.alpha, self.sigma = levels
        self.where, self.spread = where, spread

    def forward(self, x: torch.Tensor, t: torch.Tensor, states: torch.Tensor):
        a, b = self.alpha[t].double(), self.sigma[t].double()
        gain = a * self.spread**2 / (a**2 * self.spread**2 + b**2)
        x0 = self.where + gain * (x.double() - a * self.where)
        eps = (x - a * x0) / b
        return type("Out", (), {"sample": (a * eps - b * x0).float()})()


def test_the_teachers_sampler_reaches_the_latents_the_exact_flow_leads_to(recipe):
    sampling = recipe["sampling"]
    alpha, sigma = sampling.noise_levels()
    unet = _Gaussian((alpha, sigma), 0.7, 0.4)
    noise = sampling.noise_of(range(64))
    empty = torch.zeros(1, 2, 3)

    def made(x: torch.Tensor, **how: int) -> torch.Tensor:
        return sampling.teacher_latents(unet, x, empty.expand(64, -1, -1), empty, guidance=3.0, **how)

    exact = 0.7 + 0.4 * noise
    misses = [float((made(noise, steps=steps) - exact).abs().mean()) for steps in (25, 200)]
    assert misses[1] < 0.02 and misses[1] < misses[0] / 4
    # From a point half way on the same flow: its marginal there has mean αm and deviation √(α²s² + σ²).
    a, b = alpha[499], sigma[499]
    halfway = a * 0.7 + (a**2 * 0.4**2 + b**2).sqrt() * noise
    assert float((made(halfway, steps=200, start=499) - exact).abs().mean()) < 0.02


def test_a_consistency_model_that_knows_the_picture_ends_at_it(recipe):
    sampling = recipe["sampling"]
    alpha, sigma = sampling.noise_levels()
    picture, seen = torch.full((2, 4, 16, 16), 0.3), []

    def unet(x: torch.Tensor, t: torch.Tensor, states: torch.Tensor):
        seen.append(int(t[0]))
        a, b = alpha[t[0]], sigma[t[0]]
        # v of x = αx₀ + σε for this picture.
        return SimpleNamespace(sample=(a * (x - a * picture) / b - b * picture))

    noise = sampling.noise_of(range(2))
    made = sampling.consistency_latents(unet, noise, torch.zeros(2, 1, 1), steps=4, seed=0)
    assert seen == [999, 749, 499, 249]
    torch.testing.assert_close(made, picture, atol=1e-4, rtol=0)


def test_a_completed_tokenizer_keeps_every_token_and_knows_every_letter(recipe, tmp_path):
    networks, s = recipe["networks"], recipe["settings"].Settings()
    before = networks.make_tokenizer(tmp_path, s)
    words = before.get_vocab()
    after = networks.complete_tokenizer(tmp_path, s)
    assert {word: after.get_vocab()[word] for word in words} == words
    text = "the quick brown fox jumps over a lazy dog vexed by zib"
    assert after.unk_token_id not in after(text)["input_ids"]


def test_every_name_of_the_training_data_has_a_lesson_of_its_kind(recipe):
    """Names never stand for the kinds kept for the evaluation, and no two samples share a name."""
    from ragturbo.evaluate.names import UNNAMED, named
    from ragturbo.evaluate.world import parse, sample_scene

    captions = [sample_scene(i, "train").caption for i in range(300)]
    made = [recipe["stage_names"]._name(caption, 1, i) for i, caption in enumerate(captions)]
    nouns = [noun for one in made if one for noun in named(one[1])]
    assert not UNNAMED & {noun.kind for noun in nouns}
    assert len({noun.name for noun in nouns}) > 0.98 * len(nouns)
    for one, caption in zip(made, captions, strict=True):
        if one is not None:
            prompt, meaning = one
            assert meaning.canonical == parse(caption).canonical
            # The nouns are in the prompt's order, as the phrases of a search are.
            places = [prompt.index(str(noun.name or f"{noun.colour} {noun.shape}")) for noun in meaning.nouns]
            assert places == sorted(places)


def test_a_caption_without_a_relation_gets_one_for_the_target(recipe):
    from ragturbo.evaluate.world import parse

    placed = recipe["stage_align"]._placed
    for caption, wanted in (
        ("a red circle and two blue stars with a white background",
         "a red circle to the left of two blue stars with a white background"),
        ("a red circle with a blue star with a white background",
         "a red circle to the left of a blue star with a white background"),
        ("a red circle under a blue star", "a red circle under a blue star"),
        ("a red circle with a white background", "a red circle with a white background"),
    ):  # fmt: skip
        assert placed(caption, parse(caption)) == wanted


def test_a_pictures_noise_is_a_function_of_its_seed(recipe):
    noise_of = recipe["sampling"].noise_of
    assert torch.equal(noise_of(range(3, 6))[1], noise_of(range(4, 5))[0])


def test_captions_that_name_the_same_kinds_are_not_each_others_negatives(recipe):
    contrast = recipe["stage_text"].contrast
    keys = torch.eye(4)[[0, 0, 1]]
    scale = torch.tensor(20.0)
    assert contrast(keys, keys, scale, torch.tensor([7, 7, 8])) < 1e-3 < contrast(keys, keys, scale)


def test_every_noise_level_weighs_alike_whatever_its_loss(recipe):
    levels = recipe["loop"].Levels(count=4, pace=0.5)
    t = torch.arange(0, 1000, 10)
    losses = torch.tensor([0.1, 0.2, 0.4, 0.8])[t * 4 // 1000]
    for _ in range(3):
        shares = (levels.weights(t, losses) * losses).reshape(4, -1).sum(1)
    torch.testing.assert_close(shares, shares.mean().expand(4))
    # A batch that misses a level leaves it as it was, and one bad loss does not take over.
    seen = levels.seen.clone()
    levels.weights(t[:25], losses[:25] * 100)
    assert torch.equal(levels.seen[1:], seen[1:]) and levels.seen[0] < 100 * seen[0]


def test_a_teacher_goes_on_from_the_adopted_one_and_a_consistency_model_from_it(recipe, tmp_path):
    s = replace(recipe["settings"].Settings(), scenes=4, teacher_batch=4, teacher_steps=1, student_batch=4, lcm_steps=1)
    recipe["stage_adopt"].adopt(tmp_path, s)
    recipe["data"].draw(tmp_path, recipe["networks"].tokenizer_in(tmp_path / "tokenizer", s), s)
    recipe["data"].encode(tmp_path, AutoencoderKL.from_pretrained(tmp_path / "vae", torch_dtype=torch.float32), s)
    with torch.compiler.set_stance("force_eager"):
        recipe["stage_teacher"].train_teacher(tmp_path, s)
    start, taught = (load_file(tmp_path / name / WEIGHTS) for name in ("teacher_start", "teacher_unet"))
    moved = [float((start[name].float() - taught[name]).abs().max()) for name in start]
    # One step of the warm-up moves every weight by its rate, a hundredth of the peak, and the average by less.
    assert 0 < max(moved) < 0.02 * s.teacher_rate
    recipe["stage_lcm"].distil_lcm(tmp_path, s)
    distilled = load_file(tmp_path / "lcm_unet" / WEIGHTS)
    assert 0 < max(float((taught[name] - distilled[name]).abs().max()) for name in taught) < 0.02 * s.lcm_rate
    for stage in ("teacher", "lcm"):
        assert json.loads((tmp_path / f"{stage}.jsonl").read_text())["step"] == 1


def test_student_and_adapter_are_trained_by_the_librarys_trainer_from_the_librarys_data(recipe, tmp_path):
    """Pairs, true pictures, latent LPIPS and two steps of `ragturbo.train`, resumed; names and a step in H-space;
    then a bundle, and another adapter trained on it."""
    torch.manual_seed(2)
    s = replace(
        recipe["settings"].Settings(), scenes=6, pairs=3, pair_steps=1, real=2, lpips_steps=1, student_steps=1,
        student_batch=4, database_pairs=4, ordinary_pairs=2, align_steps=1, align_batch=4,
        align_named=2, align_lessons=4, arm_steps=1,
    )  # fmt: skip
    recipe["stage_adopt"].adopt(tmp_path, s)
    recipe["data"].draw(tmp_path, recipe["networks"].tokenizer_in(tmp_path / "tokenizer", s), s)
    teacher = recipe["networks"].make_unet(s)
    teacher.save_pretrained(tmp_path / "teacher_unet")
    student = recipe["stage_student"]
    student.make_pairs(tmp_path, s)
    for steps in (1, 2):
        student.distil_student(tmp_path, replace(s, student_steps=steps))
        assert json.loads((tmp_path / "student.jsonl").read_text())["step"] == steps
    recipe["stage_align"].name_pairs(tmp_path, s)
    with torch.compiler.set_stance("force_eager"):
        recipe["stage_align"].align(tmp_path, s)
    recipe["stage_bundle"].write_bundle(tmp_path, s)
    bundle = Bundle.load(tmp_path / "bundle", device="cpu", teacher=True)
    assert bundle.info.distilled and bundle.info.provenance["stages"]["student"]["step"] == 2
    before = teacher.half().float().state_dict()
    assert sum(not torch.equal(before[name], value) for name, value in bundle.unet.unet.state_dict().items()) > 100
    recipe["stage_bundle"].build_database(tmp_path, s)
    recipe["stage_adapter"].add_adapter(tmp_path, s)
    with Generator.from_pretrained(tmp_path / "bundle", device="cpu") as generator:
        assert generator.info["adapter"] == "transformer" and not generator.info["decoder_lora"]
        assert generator("a red circle", seed=1).lam[0] > 0
        assert generator.info["retriever"] == "hybrid" and generator.info["compose"]
    stages = json.loads((tmp_path / "bundle" / "ragturbo.json").read_text())["provenance"]["stages"]
    assert stages["align"]["step"] == 1
    recipe["stage_adapter"].prepare_arms(tmp_path, s)
    with torch.compiler.set_stance("force_eager"):
        arm = recipe["stage_adapter"].train_arm(tmp_path, s, "adapter", 1)
    with Generator.from_pretrained(tmp_path / "bundle", adapter=arm, device="cpu") as generator:
        assert generator("a red circle", seed=1).lam[0] > 0


def test_the_embedded_parts_can_be_adopted_where_only_the_unets_are_to_be_trained_again(recipe, tmp_path):
    adopt, s = recipe["stage_adopt"], recipe["settings"].Settings()
    adopt.adopt(tmp_path, s)
    vocabulary = (tmp_path / "tokenizer" / "vocab.json").read_bytes()
    # The drawing stage numbers words as the adopted encoder knows them.
    recipe["networks"].tokenizer_in(tmp_path / "tokenizer", s)
    assert (tmp_path / "tokenizer" / "vocab.json").read_bytes() == vocabulary
    texts = recipe["sampling"].TextStates(tmp_path)
    assert texts.states(["a red circle"]).dtype == torch.float32
    assert json.loads((tmp_path / "text.jsonl").read_text())["step"] > 0
