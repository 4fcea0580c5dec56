"""A request is checked against itself and the model before anything runs."""

from __future__ import annotations

import asyncio
import inspect
import re
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ragturbo
from ragturbo import Generator
from ragturbo.engine import request as request_module
from ragturbo.engine.request import Request
from ragturbo.engine.result import Retrieved
from ragturbo.errors import InvalidRequest
from ragturbo.model.info import BundleInfo, Sampling

KEY_WIDTH, TEXT_WIDTH = 16, 32


def tokenize(texts: list[str]) -> SimpleNamespace:
    ids = torch.zeros(len(texts), 7, dtype=torch.int64)
    return SimpleNamespace(input_ids=ids, dropped=[0] * len(texts), unknown=[()] * len(texts))


def model(*, adapter: bool = True, distilled: bool = True, num_neighbors: int = 1) -> Any:
    """What a request needs to know of a Bundle."""
    return SimpleNamespace(
        adapter=object() if adapter else None,
        info=SimpleNamespace(distilled=distilled, num_neighbors=num_neighbors),
        sampling=Sampling.of(BundleInfo(distilled), {"num_train_timesteps": 1000}),
        vae=SimpleNamespace(factor=8, channels=4),
        text=SimpleNamespace(width=TEXT_WIDTH, key_dim=KEY_WIDTH, tokenize=tokenize),
        unet=SimpleNamespace(grid=lambda height, width: (height // 8, width // 8)),
        scheduler=SimpleNamespace(config=SimpleNamespace(num_train_timesteps=1000)),
        default_size=64,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )


class OneCell:
    """A database of features of 1x1, whose ids all exist."""

    grid = (1, 1)

    def holds(self, id: int) -> bool:
        return True

    def gather(self, ids: torch.Tensor, scores: torch.Tensor) -> Retrieved:
        shape = tuple(ids.shape)
        return Retrieved(ids, scores, torch.zeros(*shape, KEY_WIDTH), torch.zeros(*shape, 1, 2))

    def neighbor(self, id: int) -> int:
        return id


MODEL, DATABASE = model(), OneCell()
UNDISTILLED = model(distilled=False)


def make(prompt: Any = "a boat", of: Any = MODEL, database: Any = DATABASE, **options: Any) -> Request:
    def encode_pairs(captions: list[str], images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(len(captions), KEY_WIDTH), torch.zeros(len(captions), 1, 2)

    return Request.make(of, database, prompt, encode_pairs=encode_pairs, started=time.perf_counter(), **options)


REFUSED = [
    # (options, what the message must name)
    ({"prompt": ""}, "prompt is empty"),
    ({"prompt": ["a", " "]}, "prompt is empty"),
    ({"prompt": []}, "list of texts"),
    ({"prompt": 7}, "list of texts"),
    ({"prompt": None}, "either prompt or prompt_embeds"),
    ({"prompt_embeds": torch.zeros(1, 7, 32)}, "not both"),
    ({"mode": "magic"}, "'magic' is not one of"),
    ({"w": 0.5}, "w is the blend of mode='slerp'"),
    ({"mode": "slerp", "w": 1.5}, r"w=1.5 must be a number in \[0, 1\]"),
    ({"mode": "slerp", "w": float("nan")}, "w=nan"),
    ({"mode": "slerp", "lam": 0.5}, "lam is the adapter's strength"),
    ({"lam": -1.0}, "lam=-1.0"),
    ({"lam": 1e300}, "lam=1e\\+300"),
    ({"min_score": 1e300}, "min_score=1e\\+300"),
    ({"min_score": float("nan")}, "min_score=nan"),
    ({"min_score": "high"}, "min_score='high'"),
    ({"mode": "none", "num_neighbors": 2}, "num_neighbors has no effect"),
    ({"mode": "none", "min_score": 0.1}, "min_score has no effect"),
    ({"mode": "none", "query": "a cat"}, "query has no effect"),
    ({"mode": "lerp", "per": "token"}, "per is an option of mode='slerp'"),
    ({"num_neighbors": 0}, "num_neighbors=0"),
    ({"num_neighbors": 17}, "from 1 to 16"),
    ({"neighbors": [1, 2], "num_neighbors": 3}, "names 2"),
    ({"neighbors": []}, "non-empty list"),
    ({"neighbors": [[1], [2]]}, "2 lists for 1 prompts"),
    ({"compose": True, "neighbors": [1]}, "no effect with neighbors"),
    ({"compose": True, "query": "a cat"}, "no effect with query"),
    ({"compose": True, "mode": "none"}, "compose has no effect"),
    ({"compose": "yes"}, "compose='yes' must be True"),
    ({"compose": True, "num_neighbors": 5}, "5 neighbours for each of 4 phrases"),
    ({"compose": lambda prompt: "a cat"}, "must return a list of phrases"),
    ({"compose": lambda prompt: ["a cat", ""]}, "must return a list of phrases"),
    ({"num_images_per_prompt": 0}, "num_images_per_prompt=0"),
    ({"num_images_per_prompt": True}, "num_images_per_prompt=True"),
    ({"seed": -1}, "seed=-1"),
    ({"seed": 2**64}, "seed="),
    ({"seed": [1, 2]}, "2 seeds for 1 prompt of 1 image"),
    ({"seed": 1, "latents": torch.zeros(1, 4, 8, 8)}, "seed and latents each decide the noise"),
    ({"seed": 1, "generator": torch.Generator()}, "seed and generator"),
    ({"latents": torch.zeros(1, 3, 8, 8)}, r"latents must be a tensor \(1, 4, 8, 8\)"),
    ({"latents": torch.zeros(1, 4, 8, 8), "height": 128}, r"latents must be a tensor \(1, 4, 16, 8\)"),
    ({"latents": torch.full((1, 4, 8, 8), float("nan"))}, "NaN or infinity"),
    ({"generator": [torch.Generator(), torch.Generator()]}, "2 generators for 1 image"),
    ({"height": 65}, "height=65 must be a multiple of 8"),
    ({"num_inference_steps": 5}, "1 to 4"),
    ({"guidance_scale": 7.5}, "a distilled model"),
    ({"guidance_scale": 0.5}, "has no effect: use 0"),
    ({"negative_prompt": "ugly"}, "negative_prompt has no effect with guidance_scale=0"),
    ({"query": torch.zeros(16)}, "only zeros"),
    ({"query": torch.ones(15)}, r"query key must be \(16,\) or \(1, 16\)"),
    ({"query": ["a", "b"]}, "query lists 2 texts for 1 prompt"),
    ({"output_type": "bmp"}, "'bmp' is not one of"),
    ({"output_type": "np", "postprocess": lambda x: x}, "postprocess runs on the uint8 batch"),
    ({"output_type": ["pil"]}, "is not one of"),
    ({"output_type": "uint8", "postprocess": 3}, "postprocess=3 must be a function"),
    ({"timeout": 0}, "timeout=0"),
    ({"timeout": "soon"}, "timeout='soon'"),
    ({"timeout": float("nan")}, "timeout=nan"),
    ({"neighbors": [1], "min_score": 0.5}, "min_score has no effect with neighbors"),
    ({"mode": "adaptor"}, "did you mean 'adapter'"),
    ({"num_inference_steps": 2.0}, "num_inference_steps=2.0"),
    ({"seed": 1.5}, "seed=1.5"),
    ({"seed": "7"}, "seed='7'"),
    ({"width": "64"}, "width='64'"),
    ({"prompt": None, "prompt_embeds": [1], "mode": "none"}, r"prompt_embeds must be a tensor \(B, L, 32\)"),
    (
        {"prompt": None, "prompt_embeds": torch.full((1, 7, 32), torch.nan), "mode": "none"},
        "prompt_embeds must be finite",
    ),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[m for _, m in REFUSED])
def test_what_makes_no_sense_is_refused_with_the_value_and_the_reason(options, message):
    options = dict(options)
    with pytest.raises(InvalidRequest, match=message):
        make(options.pop("prompt", "a boat"), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "adapter"}, "needs an adapter"),
        ({"mode": "slerp"}, "needs a database"),
        ({"w": 0.5}, "w has no effect.*there is no database"),
    ],
)
def test_a_bare_model_says_what_it_lacks(options, message):
    with pytest.raises(InvalidRequest, match=message):
        make(of=model(adapter=False), database=None, **options)


def test_embeddings_need_something_to_search_by(monkeypatch):
    embeds = torch.zeros(2, 7, TEXT_WIDTH)
    with pytest.raises(InvalidRequest, match="carry no search key"):
        make(None, prompt_embeds=embeds)
    with pytest.raises(InvalidRequest, match="carry no key"):
        make(None, prompt_embeds=embeds, neighbors=[1])
    assert len(make(None, prompt_embeds=embeds, mode="none")) == 2
    assert make(None, prompt_embeds=embeds, query="a cat").texts == (("a cat",), ("a cat",))
    assert make(None, prompt_embeds=embeds, neighbors=[1], lam=0.5).k == 1


def test_the_mode_follows_from_what_there_is(monkeypatch):
    monkeypatch.setattr("ragturbo.engine.neighbors.pixels", lambda image, size: torch.zeros(3, size, size))
    assert make().mode == "adapter" and make().k == 1
    assert make(of=model(adapter=False), database=None).mode == "none"
    assert make(of=model(adapter=False)).mode == "slerp"
    assert make(database=None, neighbors=[("a cat", object())]).mode == "adapter"


def test_the_adapter_takes_the_neighbours_it_was_trained_with():
    of = model(num_neighbors=4)
    assert make(of=of).k == 4 and make(of=of, num_neighbors=2).k == 2 and make(of=of, mode="slerp").k == 1


def test_an_undistilled_model_takes_steps_guidance_and_a_negative_prompt(monkeypatch):
    seen: list[list[str]] = []
    monkeypatch.setattr(UNDISTILLED.text, "tokenize", lambda texts: seen.append(list(texts)) or tokenize(texts))
    make(["a", "b"], UNDISTILLED, guidance_scale=7.5, num_inference_steps=50, negative_prompt="ugly")
    make(of=UNDISTILLED, guidance_scale=7.5)
    assert seen == [["a", "b"], ["ugly", "ugly"], ["a boat"], [""]]
    with pytest.raises(InvalidRequest, match="1 to 1000"):
        make(of=UNDISTILLED, num_inference_steps=1001)


@given(prompts=st.integers(1, 4), repeats=st.integers(1, 3), seed=st.integers(0, 2**64 - 10), place=st.integers(0, 11))
def test_noise_is_a_function_of_the_seed_alone(prompts, repeats, seed, place):
    request = make(
        ["a boat"] * prompts, seed=[seed + i for i in range(prompts)], num_images_per_prompt=repeats, mode="none"
    )
    place %= len(request)
    one = make("something else", seed=request.seeds[place])
    assert torch.equal(one.latents[0], request.latents[place])
    expected = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(request.seeds[place]))
    assert torch.equal(expected[0], request.latents[place])


def test_seeds_count_up_within_a_prompt_and_start_again_with_the_next():
    assert make(["a", "b"], seed=5, num_images_per_prompt=2).seeds == (5, 6, 5, 6)
    assert make(["a", "b"], seed=[1, 9], num_images_per_prompt=2).seeds == (1, 2, 9, 10)
    assert make("a", seed=[4, 2], num_images_per_prompt=2).seeds == (4, 2)
    drawn = make(["a", "b"], num_images_per_prompt=2).seeds
    assert len(set(drawn)) == 4


def test_a_generator_draws_as_in_diffusers():
    from diffusers.utils.torch_utils import randn_tensor

    shape = (3, 4, 8, 8)
    one = make(["a", "b", "c"], generator=torch.Generator().manual_seed(3)).latents
    assert torch.equal(one, randn_tensor(shape, generator=torch.Generator().manual_seed(3)))
    several = [torch.Generator().manual_seed(s) for s in (1, 2, 3)]
    again = [torch.Generator().manual_seed(s) for s in (1, 2, 3)]
    assert torch.equal(make(["a", "b", "c"], generator=several).latents, randn_tensor(shape, generator=again))


def test_phrases_are_padded_to_a_power_of_two_so_that_requests_batch_up():
    texts = [f"{' and '.join(f'a w{i}' for i in range(n))}" for n in range(1, 7)]
    widths = [make(text, compose=True).queries for text in texts]
    assert widths == [1, 2, 4, 4, 4, 4]
    three = make(texts[2], compose=True, num_images_per_prompt=2)
    assert three.texts == (("a w0", "a w1", "a w2", ""),) * 2
    assert three.query_ids.shape[:2] == (2, 4) and three.searched.tolist() == [[True, True, True, False]] * 2
    assert make(texts[2], compose=True).key == make(texts[3], compose=True).key != make(texts[1], compose=True).key
    six = make(texts[5], compose=True)
    assert six.texts == (("a w0", "a w1", "a w2", "a w3, a w4, a w5"),)
    assert [(note.text, note.joined) for note in six.notes] == [(texts[5], 3)] and not three.notes


def test_prompts_of_several_phrase_counts_go_together():
    request = make(["a cat", "a dog and a cat", "the left"], compose=True)
    assert request.texts == (("a cat", ""), ("a dog", "a cat"), ("the left", ""))
    assert request.searched.tolist() == [[True, False], [True, True], [True, False]]


def test_a_prompt_of_one_phrase_is_searched_as_a_whole():
    plain = make("a picture of a cat")
    for compose in (True, lambda prompt: [], lambda prompt: ["cat"]):
        request = make("a picture of a cat", compose=compose)
        assert request.query_ids is None and request.texts == plain.texts and request.key == plain.key


def test_a_function_of_ones_own_cuts_the_prompt():
    assert make("cat/dog", compose=lambda prompt: prompt.split("/")).texts == (("cat", "dog"),)


def test_the_default_composes_where_it_has_an_effect():
    text = "a dog and a cat"
    assert make(text, compose_by_default=True).queries == 2 and make(text).queries == 1
    assert make(text, compose_by_default=True, compose=False).queries == 1
    for options in ({"mode": "none"}, {"neighbors": [1]}, {"query": "a cat"}, {"query": torch.ones(KEY_WIDTH)}):
        assert make(text, compose_by_default=True, **options).queries == 1


def test_every_row_field_is_sliced_and_joined():
    """A row field that `slice` or `join` forgot would give a request another one's rows."""
    composed = make(["a cat and a dog", "a cat", "a cat, a dog and a boat"], compose=True)
    again = Request.join([composed.slice(i, i + 1) for i in range(3)], 4)
    for name in ("query_ids", "searched"):
        value = getattr(composed, name)
        assert torch.equal(getattr(again, name), torch.cat([value, value[-1:]]))
    assert again.texts == (*composed.texts, composed.texts[-1])
    request = make(["a", "b", "c"], query=torch.eye(3, KEY_WIDTH), neighbors=[1, 2], seed=[1, 2, 3])
    parts = [request.slice(i, i + 1) for i in range(3)]
    again = Request.join(parts, 4)
    for name, value in vars(request).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(getattr(again, name).nan_to_num(7), torch.cat([value, value[-1:]]).nan_to_num(7)), name
    assert again.seeds == (1, 2, 3, 3) and again.texts == (("a",), ("b",), ("c",), ("c",))
    assert again.retrieved is not None and again.retrieved.h_retr.shape[0] == 4
    rows = re.findall(r'"(\w+)"', inspect.getsource(request_module).split("_OPTIONAL_ROWS =")[1].split("def ")[0])
    tensors = {name for name, kind in Request.__annotations__.items() if "Tensor" in kind}
    assert tensors == set(rows) - {"seeds", "texts"}


def test_slices_and_joined_requests_have_futures_of_their_own():
    request = make(["a", "b"], timeout=5.0)
    first, both = request.slice(0, 1), Request.join([request, request], 4)
    assert len({id(r.future) for r in (request, first, both)}) == 3
    assert first.timeout == both.timeout == 5.0 and request.pieces == ()


PUBLIC = (Generator.__call__, Generator.submit, Generator.agenerate, ragturbo.generate)


@pytest.mark.parametrize("function", PUBLIC, ids=lambda f: f.__qualname__)
def test_every_way_to_call_has_the_options_by_name_type_and_default(function):
    """What completion, help() and type checkers show; the defaults are those of the request."""
    made = inspect.signature(Request.make).parameters
    own = inspect.signature(function).parameters
    own_ones = ("encode_pairs", "started", "compose_by_default")
    options = [name for name, p in made.items() if p.kind is p.KEYWORD_ONLY and name not in own_ones]
    assert not any(p.kind is p.VAR_KEYWORD for p in own.values())
    for name in options:
        assert (own[name].default, own[name].annotation) == (made[name].default, made[name].annotation), name


# (function, name, what the message must say)
UNKNOWN = [
    (ragturbo.generate, "colour", "generate has no argument 'colour'; it takes prompt, model"),
    (ragturbo.generate, "sed", "did you mean seed"),
    (ragturbo.generate, "torch_dtype", "here it is dtype"),
    (Generator.__call__, "torch_dtype", "it is dtype of Generator.from_pretrained"),
    (Generator.__call__, "scheduler", "it is one of Generator.from_pretrained"),
    (Generator.submit, "guidance", "here it is guidance_scale"),
    (Generator.agenerate, "callback_on_step_end", "without callbacks"),
    (Generator.from_pretrained, "safety_checker", "postprocess="),
    (Generator.from_pretrained, "device_map", "kept on one device"),
    (Generator.from_pretrained, "num_inference_steps", "it is one of Generator.__call__"),
    (Generator.from_pretrained, "databse", "did you mean database"),
]


@pytest.mark.parametrize(("function", "name", "message"), UNKNOWN, ids=[f"{f.__name__}-{n}" for f, n, _ in UNKNOWN])
def test_an_unknown_option_names_the_nearest_one_or_what_diffusers_calls_it(function, name, message):
    """It is a TypeError, as of any Python function, and raised before anything is loaded."""
    with pytest.raises(TypeError, match=re.escape(message)) as raised:
        called = function(*[None] * (function is not ragturbo.generate), **{name: 1})
        asyncio.run(called)
    assert raised.value.option == name


@pytest.mark.parametrize("value", [np.int64(3), np.array([3])[0], torch.tensor(3)], ids=["int64", "item", "tensor"])
def test_whole_numbers_of_numpy_and_torch_are_whole_numbers(value):
    request = make(seed=value, num_neighbors=value, num_images_per_prompt=value, num_inference_steps=value)
    assert request.seeds == (3, 4, 5) and request.k == 3 and request.num_inference_steps == 3
    assert make(["a", "b"], seed=np.arange(2), lam=np.float32(0.5), min_score=np.float64(0.1)).seeds == (0, 1)
    assert make(["a", "b"], mode="slerp", w=np.array([0.25, 0.5])).w.tolist() == [0.25, 0.5]


@pytest.mark.parametrize(
    "options",
    [
        {"latents": torch.zeros(1, 4, 8, 8)},
        {"seed": [7]},
        {"lam": [0.5]},
        {"query": ["a cat"]},
        {"query": torch.ones(1, KEY_WIDTH)},
    ],
    ids=lambda options: next(iter(options)),
)
def test_one_value_in_a_list_is_not_spread_over_two_prompts(options):
    with pytest.raises(InvalidRequest, match="2 prompts|2 images|must be") as raised:
        make(["a", "b"], **options)
    assert raised.value.option == next(iter(options))
    single = {name: value[0] if name != "latents" else torch.zeros(2, 4, 8, 8) for name, value in options.items()}
    assert len(make(["a", "b"], **single)) == 2


def test_one_negative_prompt_in_a_list_is_not_spread_over_two_prompts():
    with pytest.raises(InvalidRequest, match="negative_prompt lists 1 text for 2 prompts"):
        make(["a", "b"], UNDISTILLED, negative_prompt=["ugly"])
    with pytest.raises(InvalidRequest, match=r"negative_prompt_embeds must be a tensor \(2, L, 32\)"):
        make(["a", "b"], UNDISTILLED, negative_prompt_embeds=torch.zeros(1, 7, TEXT_WIDTH))
    assert make(["a", "b"], UNDISTILLED, negative_prompt="ugly").negative_ids.shape[0] == 2


def test_steps_and_guidance_are_the_models_own_if_the_call_does_not_say():
    assert (make().num_inference_steps, make().guidance_scale) == (1, 0.0)
    plain = make(of=UNDISTILLED)
    assert (plain.num_inference_steps, plain.guidance_scale) == (50, 7.5) and plain.guided
    own = make(of=UNDISTILLED, num_inference_steps=20, guidance_scale=0)
    assert (own.num_inference_steps, own.guidance_scale, own.guided) == (20, 0.0, False)


def test_too_many_steps_say_why_the_model_counts_as_distilled_and_how_to_say_otherwise():
    with pytest.raises(InvalidRequest, match="1 to 4 .*because its ragturbo.json says so; distilled=False"):
        make(num_inference_steps=20)


BAD_CALLS = [options for options, _ in REFUSED if not {"latents", "generator", "prompt_embeds"} & set(options)]


def test_a_mistake_in_a_first_call_is_reported_before_the_model_loads(monkeypatch):
    """What is wrong whatever the model: more than half of all mistakes here."""

    def load(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("loading")

    monkeypatch.setattr(Generator, "from_pretrained", load)
    seen = {"checked": 0, "loading": 0}
    for options in BAD_CALLS:
        with pytest.raises((InvalidRequest, RuntimeError)) as raised:
            ragturbo.generate(**{"prompt": "a boat", **options})
        seen["loading" if type(raised.value) is RuntimeError else "checked"] += 1
    assert seen["checked"] > seen["loading"]


def test_completion_shows_what_the_package_offers():
    assert dir(ragturbo) == ["Database", "Generator", "Neighbor", "Output", "__version__", "errors", "generate"]
