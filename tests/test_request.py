"""A request is checked against itself and the model before anything runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ragturbo.errors import InvalidRequest
from ragturbo.request import Abilities, Plan, Request, resolve

CAN = Abilities(
    has_adapter=True,
    has_database=True,
    distilled=True,
    factor=8,
    multiple=8,
    default_size=64,
    latent_channels=4,
    text_width=32,
    key_width=16,
    max_steps=4,
)
BASE = replace(CAN, distilled=False, max_steps=1000)
BARE = replace(CAN, has_adapter=False, has_database=False)


def plan(prompt: Any = "a boat", can: Abilities = CAN, **options: Any) -> Plan:
    return resolve(Request.of(prompt, options), can)


REFUSED = [
    # (options, what the message must name)
    ({"prompt": ""}, "prompt is empty"),
    ({"prompt": ["a", " "]}, "prompt is empty"),
    ({"prompt": []}, "list of texts"),
    ({"prompt": 7}, "list of texts"),
    ({"prompt": None}, "either prompt or prompt_embeds"),
    ({"prompt_embeds": torch.zeros(1, 7, 32)}, "not both"),
    ({"mode": "magic"}, "'magic' is not one of"),
    ({"colour": "red"}, "unknown option 'colour'"),
    ({"w": 0.5}, "w is the blend of mode='slerp'"),
    ({"mode": "slerp", "w": 1.5}, r"w=1.5 must be in \[0, 1\]"),
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
    ({"mode": "lerp", "per": "token"}, "per= belongs to mode='slerp'"),
    ({"num_neighbors": 0}, "num_neighbors=0"),
    ({"num_neighbors": 17}, "more than the 16"),
    ({"neighbors": [1, 2], "num_neighbors": 3}, "names 2"),
    ({"neighbors": []}, "non-empty list"),
    ({"neighbors": [[1], [2]]}, "2 lists for 1 prompts"),
    ({"num_images_per_prompt": 0}, "num_images_per_prompt=0"),
    ({"num_images_per_prompt": True}, "num_images_per_prompt=True"),
    ({"seed": -1}, "seed=-1"),
    ({"seed": 2**64}, "seed="),
    ({"seed": [1, 2]}, "2 seeds for 1 prompts"),
    ({"seed": 1, "latents": torch.zeros(1, 4, 8, 8)}, "seed and latents each decide the noise"),
    ({"seed": 1, "generator": torch.Generator()}, "seed and generator"),
    ({"latents": torch.zeros(1, 3, 8, 8)}, r"latents must be \(1, 4, 8, 8\)"),
    ({"latents": torch.zeros(1, 4, 8, 8), "height": 128}, r"latents must be \(1, 4, 16, 8\)"),
    ({"latents": torch.full((1, 4, 8, 8), float("nan"))}, "NaN or infinity"),
    ({"generator": [torch.Generator(), torch.Generator()]}, "2 generators for 1 images"),
    ({"height": 65}, "height=65 must be a positive multiple of 8"),
    ({"num_inference_steps": 5}, "1 to 4"),
    ({"guidance_scale": 7.5}, "a distilled model"),
    ({"guidance_scale": 0.5}, "guides nothing"),
    ({"negative_prompt": "ugly"}, "negative_prompt has no effect without guidance"),
    ({"query": torch.zeros(16)}, "only zeros"),
    ({"query": torch.ones(15)}, r"query key must be \(1, 16\)"),
    ({"query": ["a", "b"]}, "2 queries for 1 prompts"),
    ({"output_type": "bmp"}, "'bmp' is not one of"),
    ({"output_type": "np", "postprocess": lambda x: x}, "postprocess sees the uint8 batch"),
    ({"timeout": 0}, "timeout=0"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[m for _, m in REFUSED])
def test_what_makes_no_sense_is_refused_with_the_value_and_the_reason(options, message):
    options = dict(options)
    with pytest.raises(InvalidRequest, match=message):
        plan(options.pop("prompt", "a boat"), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "adapter"}, "needs an adapter"),
        ({"mode": "slerp"}, "needs a database"),
        ({"w": 0.5}, "w has no effect.*no adapter or no database"),
    ],
)
def test_a_bare_model_says_what_it_lacks(options, message):
    with pytest.raises(InvalidRequest, match=message):
        plan(can=BARE, **options)


def test_embeddings_need_something_to_search_by():
    embeds = torch.zeros(2, 7, 32)
    with pytest.raises(InvalidRequest, match="carry no search key"):
        plan(None, prompt_embeds=embeds)
    with pytest.raises(InvalidRequest, match="carry no key"):
        plan(None, prompt_embeds=embeds, neighbors=[1])
    assert plan(None, prompt_embeds=embeds, mode="none").count == 2
    assert plan(None, prompt_embeds=embeds, query="a cat").query_texts == ["a cat", "a cat"]
    assert plan(None, prompt_embeds=embeds, neighbors=[1], lam=0.5).k == 1


def test_the_mode_follows_from_what_there_is():
    assert plan().mode == "adapter" and plan().k == 1
    assert plan(can=BARE).mode == "none"
    assert plan(can=replace(CAN, has_adapter=False)).mode == "none"
    assert plan(can=replace(CAN, has_database=False), neighbors=[("a cat", object())]).mode == "adapter"


def test_the_adapter_takes_the_neighbours_it_was_trained_with():
    can = replace(CAN, num_neighbors=4)
    assert plan(can=can).k == 4 and plan(can=can, num_neighbors=2).k == 2 and plan(can=can, mode="slerp").k == 1


def test_an_undistilled_model_takes_steps_guidance_and_a_negative_prompt():
    p = plan(["a", "b"], BASE, guidance_scale=7.5, num_inference_steps=50, negative_prompt="ugly")
    assert p.negative == ["ugly", "ugly"]
    assert plan(can=BASE, guidance_scale=7.5).negative == [""]
    with pytest.raises(InvalidRequest, match="1 to 1000"):
        plan(can=BASE, num_inference_steps=1001)


@given(
    prompts=st.integers(1, 4), per_prompt=st.integers(1, 3), seed=st.integers(0, 2**64 - 10), place=st.integers(0, 11)
)
def test_noise_is_a_function_of_the_seed_alone(prompts, per_prompt, seed, place):
    p = plan(["a boat"] * prompts, seed=[seed + i for i in range(prompts)], num_images_per_prompt=per_prompt)
    place %= p.count
    one = plan("something else", seed=p.seeds[place])
    assert torch.equal(one.latents[0], p.latents[place])
    expected = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(p.seeds[place]))
    assert torch.equal(expected[0], p.latents[place])


def test_seeds_count_up_within_a_prompt_and_start_again_with_the_next():
    assert plan(["a", "b"], seed=5, num_images_per_prompt=2).seeds == [5, 6, 5, 6]
    assert plan(["a", "b"], seed=[1, 9], num_images_per_prompt=2).seeds == [1, 2, 9, 10]
    assert plan("a", seed=[4, 2], num_images_per_prompt=2).seeds == [4, 2]
    drawn = plan(["a", "b"], num_images_per_prompt=2).seeds
    assert len(set(drawn)) == 4


def test_a_generator_draws_as_in_diffusers():
    from diffusers.utils.torch_utils import randn_tensor

    shape = (3, 4, 8, 8)
    one = plan(["a", "b", "c"], generator=torch.Generator().manual_seed(3)).latents
    assert torch.equal(one, randn_tensor(shape, generator=torch.Generator().manual_seed(3)))
    several = [torch.Generator().manual_seed(s) for s in (1, 2, 3)]
    again = [torch.Generator().manual_seed(s) for s in (1, 2, 3)]
    assert torch.equal(plan(["a", "b", "c"], generator=several).latents, randn_tensor(shape, generator=again))
