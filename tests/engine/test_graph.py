"""The graph engine against the oracle, its steps called rather than captured: buffers, forms of retrieval, new weights.

What only a GPU can show (that a replay equals the call bit for bit) is in tests/engine/test_gpu.py.
"""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch

from ragturbo.config import GeneratorConfig
from ragturbo.engine.build import make_engine
from ragturbo.engine.database import DatabaseGeneration
from ragturbo.engine.fast_model import FastModel
from ragturbo.engine.graph_engine import MAX_RECORDINGS, GraphEngine
from ragturbo.engine.recorder import Uncaptured
from ragturbo.engine.result import Retrieved
from ragturbo.errors import InvalidRequest
from ragturbo.model.bundle import Bundle

PROMPTS = ("a red circle", "a blue cat")


@pytest.fixture(params=["as on a GPU", "packed for a CPU"])
def graph_engine(request, bundle):
    """Both ways in which segments are called: the one whose operations a GPU records, and the one for CPUs."""

    def make(of: Bundle = bundle, **options: object) -> GraphEngine:
        recorder = None if request.param == "packed for a CPU" else Uncaptured()
        return GraphEngine(of, GeneratorConfig(**options), recorder)  # type: ignore[arg-type]

    return make


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def agree(got, expected, bar: float = 1e-5) -> None:
    assert relative(got.latents, expected.latents) < bar
    assert torch.equal(got.ids, expected.ids) and torch.equal(got.valid, expected.valid)
    assert torch.allclose(got.lam, expected.lam, atol=1e-6)
    assert torch.allclose(got.scores, expected.scores, atol=2e-3, equal_nan=True)
    assert bool(got.ok.all())


@pytest.mark.parametrize(("kind", "steps"), [("uint8", 1), ("pt", 1), ("latent", 1), ("latent", 2), ("latent", 4)])
def test_without_retrieval_it_is_the_oracle(reference, graph_engine, make_request, kind, steps):
    batch = make_request(*PROMPTS, output_type=kind, num_inference_steps=steps)
    got, expected = graph_engine().run(batch), reference.run(batch)
    if kind == "uint8":
        assert int((got.uint8.int() - expected.uint8.int()).abs().max()) <= 1
    elif kind == "pt":
        assert float((got.image - expected.image).abs().max()) < 1e-5
    else:
        assert relative(got.latents, expected.latents) < 1e-5
        # The control: another prompt is another image.
        other = reference.run(make_request("a dog", "a dog", output_type=kind, num_inference_steps=steps))
        assert relative(got.latents, other.latents) > 1e-4


FORMS = {
    "one graph": {"retriever": "auto"},
    # Four rows in memory for twenty on the disk.
    "ids to the host": {"retriever": "exact", "host_bytes": 4 * 512},
    "ids to the host, some rows hot": {"retriever": "exact", "host_bytes": 4 * 512, "device_bytes": 3 * 512},
    "three graphs": {"retriever": "bm25"},
    "three graphs, keys and words": {"retriever": "hybrid"},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("mode", "k", "steps"), [("adapter", 1, 1), ("adapter", 3, 2), ("slerp", 1, 1), ("slerp", 2, 1), ("lerp", 1, 1)]
)
def test_every_form_of_retrieval_is_the_oracle(database, reference, graph_engine, make_request, form, mode, k, steps):
    source, engine = DatabaseGeneration(database, **FORMS[form]), graph_engine()
    k = min(k, 2) if form.startswith("ids") else k
    batch = make_request(*PROMPTS, mode=mode, k=k, database=source, num_inference_steps=steps)
    got, expected = engine.run(batch), reference.run(batch)
    agree(got, expected)
    assert engine.describe()["retrieval"] == form.split(",")[0]
    # The controls: no retrieval, and another noise.
    assert relative(got.latents, reference.run(replace(batch, mode="none", k=0)).latents) > 1e-4
    other = make_request(*PROMPTS, seed=9, mode=mode, k=k, database=source)
    assert relative(got.latents, reference.run(other).latents) > 1e-2


@pytest.mark.parametrize("form", FORMS)
def test_a_requests_numbers_are_read_from_memory(database, reference, graph_engine, make_request, form):
    """One recording serves every λ, w, min_score, seed, prompt."""
    source, engine = DatabaseGeneration(database, **FORMS[form]), graph_engine()
    for i, (lam, floor) in enumerate([(float("nan"), -float("inf")), (0.3, -float("inf")), (float("nan"), 1e9)]):
        batch = make_request(
            f"a {('red', 'green', 'blue')[i]} dog", "a square", seed=i, mode="adapter", k=2, database=source,
            lam=torch.full((2,), lam), min_score=torch.full((2,), floor),
        )  # fmt: skip
        agree(engine.run(batch), reference.run(batch))
    assert len(engine.describe()["graphs"]) == 1


def test_lambda_zero_is_no_retrieval_bit_for_bit(source, graph_engine, make_request):
    engine = graph_engine()
    with_zero = engine.run(make_request(*PROMPTS, mode="adapter", k=1, database=source, lam=torch.zeros(2)))
    without = engine.run(make_request(*PROMPTS))
    assert torch.equal(with_zero.latents, without.latents)


@pytest.mark.parametrize("query", ["ids", "key", "none"])
def test_another_text_or_key_to_search_by(bundle, source, reference, graph_engine, make_request, query):
    engine = graph_engine()
    batch = make_request(*PROMPTS, mode="adapter", k=2, database=source)
    tokens = bundle.text.tokenize(["a yellow dog", "a green square"]).input_ids
    if query == "ids":
        batch = replace(batch, query_ids=tokens[:, None])
    else:
        with torch.inference_mode():
            states = bundle.text.encode(tokens)
        batch = replace(batch, query_key=states.key) if query == "key" else replace(
            batch, input_ids=None, text=states.hidden_states, mode="none", k=0, database=None
        )  # fmt: skip
    agree(engine.run(batch), reference.run(batch))


def test_neighbours_given_with_the_request(bundle, source, reference, graph_engine, make_request):
    engine = graph_engine()
    ids = torch.tensor([[3, 7], [5, -1]])
    found = source.gather(ids, torch.tensor([[0.9, 0.8], [0.7, float("nan")]]))
    batch = make_request(*PROMPTS, mode="adapter", k=2, retrieved=found)
    agree(engine.run(batch), reference.run(batch))
    # One other neighbour must change its own row, and no other.
    other = Retrieved(ids, found.scores, found.keys, found.h_retr.clone())
    other.h_retr[0, 0] = source.gather(torch.tensor([[11]]), torch.tensor([[0.9]])).h_retr[0, 0]
    a, b = engine.run(batch).latents, engine.run(replace(batch, retrieved=other)).latents
    assert relative(a[0], b[0]) > 1e-3 and torch.equal(a[1], b[1])


def test_results_do_not_change_while_the_buffers_are_used_again(source, graph_engine, make_request):
    engine = graph_engine()
    held = engine.run(make_request(*PROMPTS, mode="adapter", k=1, database=source, output_type="uint8"))
    before = {n: getattr(held, n).clone() for n in ("uint8", "ids", "scores", "lam", "cosine", "valid", "ok")}
    for seed in range(1, 6):
        engine.run(make_request("a dog", "a cat", seed=seed, mode="adapter", k=1, database=source, output_type="uint8"))
    assert all(torch.equal(getattr(held, n), value) for n, value in before.items())


@pytest.mark.parametrize("form", [*FORMS, "given"])
def test_a_request_leaves_no_tensor_behind(database, graph_engine, make_request, form):
    source = DatabaseGeneration(database, **FORMS.get(form, {}))
    given = source.gather(torch.tensor([[3], [5]]), torch.ones(2, 1)) if form == "given" else None
    engine, batch = graph_engine(), make_request(*PROMPTS, mode="adapter", k=1, database=source, retrieved=given)

    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    for _ in range(2):
        engine.run(batch)
    before = alive()
    for _ in range(3):
        engine.run(batch)
    assert alive() == before


def test_where_steps_are_launched_the_hosts_own_parts_are_told(graph_engine, make_request):
    engine, batch = graph_engine(), make_request(*PROMPTS)
    parts = {"fill", "launch", "wait", "result"}
    assert not parts & set(engine.run(batch).timings)
    (recorded,) = engine._recordings.values()
    recorded._launches = True
    timings = engine.run(batch).timings
    assert all(timings[name] > 0 for name in parts)
    # All steps are called within it.
    assert timings["launch"] > timings["decode"]


def test_a_new_adapter_takes_effect_in_the_memory_that_was_recorded(
    model_folder, tmp_path, new_adapter, source, graph_engine, make_request
):
    bundle = Bundle.load(model_folder, device="cpu")
    engine = graph_engine(bundle)
    batch = make_request(*PROMPTS, mode="adapter", k=1, database=source)
    before = engine.run(batch).latents
    places = [p.data_ptr() for p in engine.model.adapter.parameters()]
    recorded = list(engine._recordings.values())
    new_adapter(tmp_path, seed=1)
    engine.load_adapter(tmp_path)
    assert places == [p.data_ptr() for p in engine.model.adapter.parameters()]
    assert all(a is b for a, b in zip(recorded, engine._recordings.values(), strict=True))
    after = engine.run(batch)
    agree(after, engine.reference.run(batch))
    assert relative(after.latents, before) > 1e-3


def test_an_adapter_with_more_or_no_phrase_embeddings_records_anew(
    model_folder, tmp_path, new_adapter, source, graph_engine, make_composed
):
    engine = graph_engine(Bundle.load(model_folder, device="cpu"))
    batch = make_composed(["a red circle left of a blue square"] * 2, source)
    engine.run(batch)
    for phrases in (0, 2, 0):
        new_adapter(tmp_path / str(phrases), seed=phrases, phrases=phrases)
        engine.load_adapter(tmp_path / str(phrases))
        agree(engine.run(batch), engine.reference.run(batch))


def test_a_lora_on_other_layers_records_anew_and_one_on_the_same_layers_does_not(
    model_folder, tmp_path, decoder_lora, graph_engine, make_request
):
    bundle = Bundle.load(model_folder, device="cpu")
    engine, batch = graph_engine(bundle), make_request(*PROMPTS)
    results = [engine.run(batch).latents]
    for seed, kept in ((1, False), (2, True)):
        decoder_lora(tmp_path / str(seed), seed)
        recorded = list(engine._recordings.values())
        engine.load_adapter(tmp_path / str(seed))
        assert (list(engine._recordings.values()) == recorded) is kept
        results.append(engine.run(batch).latents)
        assert relative(results[-1], engine.reference.run(batch).latents) < 1e-5
    assert relative(results[1], results[0]) > 1e-3 and relative(results[2], results[1]) > 1e-3


def test_a_swapped_database_is_other_numbers_for_the_same_recording(
    write_database, tmp_path, source, reference, graph_engine, make_request
):
    other = DatabaseGeneration(write_database(tmp_path / "other", ["a dog on a boat", "a photo of a cat"], seed=5))
    engine = graph_engine()
    for turn in (source, other, source, other):
        batch = make_request(*PROMPTS, mode="adapter", k=1, database=turn)
        agree(engine.run(batch), reference.run(batch))
    assert len(engine.describe()["graphs"]) == 1


@pytest.mark.parametrize("form", ["one graph", "ids to the host"])
def test_removed_and_appended_pairs(write_database, tmp_path, reference, graph_engine, make_request, form):
    database = write_database(tmp_path / "db")
    engine, source = graph_engine(), DatabaseGeneration(database, **FORMS[form])

    def run(k: int = 1):
        batch = make_request(*PROMPTS, mode="adapter", k=k, database=source)
        got = engine.run(batch)
        agree(got, reference.run(batch))
        return got.ids

    first = run()
    rows = engine._tables.rows
    database.remove([int(first[0, 0])])
    source = source.current()
    second = run()
    assert int(second[0, 0]) != int(first[0, 0]) and int(second[1, 0]) == int(first[1, 0])
    assert engine._tables.rows is rows


def test_a_centred_database_is_searched_centred(write_database, tmp_path, reference, graph_engine, make_request):
    database = write_database(tmp_path / "db")
    manifest = database.snapshot.manifest
    object.__setattr__(manifest, "centred", True)
    source = DatabaseGeneration(database, "exact")
    batch = make_request(*PROMPTS, mode="adapter", k=2, database=source)
    agree(graph_engine().run(batch), reference.run(batch))


def test_remembered_prompts_give_the_same_bytes_and_are_bounded(source, graph_engine, reference, make_request):
    plain, engine = graph_engine(), graph_engine(prompt_cache=3)
    for seed, prompts in enumerate([PROMPTS, PROMPTS, PROMPTS[::-1], ("a dog", "a cat"), PROMPTS]):
        batch = make_request(*prompts, seed=seed, mode="adapter", k=1, database=source)
        assert torch.equal(engine.run(batch).latents, plain.run(batch).latents)
    counts = engine.describe()["prompts"]
    assert counts == {"held": 3, "hits": 2, "misses": 3}


def test_what_graphs_cannot_run_is_refused_by_name_and_runs_in_the_reference_under_auto(
    bundle, graph_engine, reference, make_request
):
    tokens = bundle.text.tokenize(["", ""]).input_ids
    guided = make_request(*PROMPTS, guidance_scale=3.0, negative_ids=tokens)
    engine = graph_engine()
    assert torch.equal(engine.run(guided).latents, reference.run(guided).latents)
    assert list(engine.describe()["plain batches"].values()) == [1]
    with pytest.raises(InvalidRequest, match="engine='graph': guidance"):
        graph_engine(engine="graph").run(guided)


def test_recordings_are_bounded(graph_engine, make_request):
    engine = graph_engine()
    for rows in range(1, 3):
        for side in range(4, 40, 2):
            latents = torch.zeros(rows, 4, side, 4)
            engine.run(make_request(*PROMPTS[:rows], latents=latents))
    assert len(engine.describe()["graphs"]) == MAX_RECORDINGS


def test_a_decoder_that_overflows_moves_to_fp32_and_says_so(model_folder, graph_engine, make_request, caplog):
    bundle = Bundle.load(model_folder, device="cpu", dtype=torch.float16)
    with torch.no_grad():
        bundle.vae.module.decoder.conv_in.weight.mul_(3e4)
    batch = make_request(*PROMPTS, output_type="uint8")
    engine = graph_engine(bundle)
    result = engine.run(batch)
    assert bool(result.ok.all()) and engine.describe()["vae dtype"] == "float32"
    assert "float32 from now on" in caplog.text
    assert bundle.vae.dtype == torch.float16
    # A model that fits stays where it is.
    fits = graph_engine(Bundle.load(model_folder, device="cpu", dtype=torch.float16))
    assert bool(fits.run(batch).ok.all()) and fits.describe()["vae dtype"] == "float16"


def test_the_table_of_replacements_is_whole_and_the_bundle_is_untouched(model_folder):
    bundle = Bundle.load(model_folder, device="cpu")
    before = {n: p.clone() for n, p in bundle.unet.unet.named_parameters()}
    kinds = [type(m).__name__ for m in bundle.unet.unet.modules()]
    model = FastModel(bundle)
    table = {row.path: row for row in model.replaced}
    for path, module in bundle.unet.unet.named_modules():
        if type(module).__name__ in ("ResnetBlock2D", "Transformer2DModel"):
            assert table[path].was == type(module).__name__
    assert kinds == [type(m).__name__ for m in bundle.unet.unet.modules()]
    assert all(torch.equal(before[n], p) for n, p in bundle.unet.unet.named_parameters())


def test_a_cpu_has_no_cuda_graphs_and_no_kernel_by_name(bundle):
    with pytest.raises(InvalidRequest, match="needs a CUDA device"):
        make_engine(bundle, GeneratorConfig(engine="graph"))
    with pytest.raises(InvalidRequest, match="attention='xformers'"):
        FastModel(bundle, attention="xformers")
