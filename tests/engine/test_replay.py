"""What is recorded must be right for every later request: operations replayed over the same memory, as a graph does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from submission import submit

from ragturbo.engine.database import DatabaseGeneration
from ragturbo.engine.executor import Executor
from ragturbo.engine.graph_segments import Segments
from ragturbo.errors import DeviceLost, GenerationError, OutOfDeviceMemory
from ragturbo.model.bundle import Bundle

PROMPTS = ("a red circle", "a blue cat")
FORMS = {
    "one graph": {"retriever": "exact"},
    "ids to the host": {"retriever": "exact", "host_bytes": 4 * 512},
    "ids to the host, some rows hot": {"retriever": "exact", "host_bytes": 4 * 512, "device_bytes": 3 * 512},
    "three graphs": {"retriever": "bm25"},
    "three graphs, keys and words": {"retriever": "hybrid"},
}


def equal(got, expected) -> bool:
    names = ("latents", "uint8", "ids", "scores", "lam", "cosine", "valid", "ok")
    pairs = [(getattr(got, name), getattr(expected, name)) for name in names]
    return all((a is b) or torch.equal(a.nan_to_num(-7.0), b.nan_to_num(-7.0)) for a, b in pairs)


def requests(make_request, **fields):
    """Every number of a request differs from the one before."""
    for i, prompts in enumerate([PROMPTS, ("a dog", "a green square"), ("a yellow cat", "a dog"), PROMPTS]):
        lam = torch.tensor([float("nan"), 0.2 * i]) if fields.get("mode") == "adapter" else torch.zeros(2)
        yield make_request(*prompts, seed=5 * i, lam=lam, w=torch.tensor([0.1 * i, 0.9]), **fields)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("mode", "k"), [("adapter", 2), ("slerp", 1)])
def test_a_replay_is_the_call_bit_for_bit_for_ever_new_numbers(
    database, graph_engine, replayed_engine, make_request, form, mode, k
):
    source = DatabaseGeneration(database, **FORMS[form])
    replayed, called = replayed_engine(), graph_engine()
    results = []
    for batch in requests(make_request, mode=mode, k=k, database=source):
        results.append(replayed.run(batch))
        assert equal(results[-1], called.run(batch))
    assert len(replayed.describe()["graphs"]) == 1
    assert not torch.equal(results[0].latents, results[1].latents)


@pytest.mark.parametrize(("kind", "steps"), [("uint8", 1), ("latent", 4)])
def test_without_retrieval_as_well(graph_engine, replayed_engine, make_request, kind, steps):
    replayed, called = replayed_engine(), graph_engine()
    for batch in requests(make_request, output_type=kind, num_inference_steps=steps):
        assert equal(replayed.run(batch), called.run(batch))


def test_a_number_read_from_the_host_would_be_stale(graph_engine, replayed_engine, make_request, monkeypatch):
    """A control for this file: a step that reads a value on the host repeats that of the first request."""
    encode = Segments.encode

    def stale(self: Segments) -> None:
        self.buffers.inputs.device["latents"].mul_(1 + float(self.buffers.inputs.host["latents"][0, 0, 0, 0]))
        encode(self)

    monkeypatch.setattr(Segments, "encode", stale)
    replayed, called = replayed_engine(), graph_engine()
    first, second = (make_request(*PROMPTS, seed=seed) for seed in (1, 2))
    assert equal(replayed.run(first), called.run(first))
    assert not equal(replayed.run(second), called.run(second))


def test_new_weights_and_another_database_take_effect_under_the_live_recording(
    model_folder,
    tmp_path,
    new_adapter,
    decoder_lora,
    write_database,
    source,
    graph_engine,
    replayed_engine,
    make_request,
):
    own = [Bundle.load(model_folder, device="cpu") for _ in range(2)]
    # Cached values of a prompt depend on the weights.
    replayed, called = replayed_engine(own[0], prompt_cache=8), graph_engine(own[1])
    other = DatabaseGeneration(write_database(tmp_path / "other", ["a dog on a boat", "a photo of a cat"], seed=5))
    seen = []
    for seed, place in enumerate([None, "adapter", "lora", "lora of other values"]):
        if place is not None:
            (tmp_path / place).mkdir()
            (new_adapter if place == "adapter" else decoder_lora)(tmp_path / place, seed)
            for engine in (replayed, called):
                engine.load_adapter(tmp_path / place)
        for at in (source, other):
            batch = make_request(*PROMPTS, mode="adapter", k=1, database=at)
            seen.append(replayed.run(batch))
            assert equal(seen[-1], called.run(batch))
    assert all(not torch.equal(a.latents, b.latents) for i, a in enumerate(seen) for b in seen[:i])


def test_remembered_prompts_give_the_same_bytes_under_one_recording_each(
    source, graph_engine, replayed_engine, make_request
):
    """Keys and values of all cross-attentions, on the device: recorded once for prompts that are known."""
    engine, plain = replayed_engine(prompt_cache=4), graph_engine()
    for seed, prompts in enumerate([PROMPTS, ("a dog", "a cat"), PROMPTS, ("a dog", "a cat"), PROMPTS[::-1]]):
        for fields in ({"mode": "adapter", "k": 1, "database": source}, {}):
            batch = make_request(*prompts, seed=seed, **fields)
            assert equal(engine.run(batch), plain.run(batch))
    ways = engine.describe()
    # Cached: the second mode of each new pair of prompts, then both modes of the earlier pairs.
    assert ways["prompts"] == {"held": 4, "hits": 8, "misses": 2} and len(ways["graphs"]) == 3


@pytest.mark.parametrize("mode", ["none", "adapter"])
def test_the_text_encoder_runs_while_the_other_numbers_are_written(database, replayed_engine, make_request, mode):
    engine, seen = replayed_engine(), []
    source = DatabaseGeneration(database, **FORMS["one graph"]) if mode == "adapter" else None
    first, second = (make_request(*PROMPTS, seed=s, mode=mode, k=int(mode != "none"), database=source) for s in (1, 2))
    engine.run(first)
    (recorded,) = engine._recordings.values()

    def before(label: str) -> None:
        seen.append(
            (label.split(": ")[-1], torch.equal(recorded.segments.buffers.inputs.host["latents"], second.latents))
        )

    engine.recorder.before = before
    engine.run(second)
    assert seen == [("text", False), ("image", True)]


def test_a_request_that_fails_half_way_is_waited_for(replayed_engine, make_request, monkeypatch):
    """The text encoder still reads the buffers, into which the next request writes."""
    engine, waits = replayed_engine(), []
    batch = make_request(*PROMPTS)
    engine.run(batch)
    monkeypatch.setattr(engine.recorder, "wait_for_main", lambda: waits.append("main"))
    with pytest.raises(RuntimeError):
        engine.run(replace(batch, w=None, latents=batch.latents.to("meta")))
    assert waits == ["main"]


def test_a_recording_that_fails_half_way_is_waited_for(replayed_engine, make_request, monkeypatch):
    """The text encoder's graph has been launched over buffers that are freed with the error."""
    engine, waits = replayed_engine(), []

    def broken(self: Segments) -> None:
        raise ValueError("an injected fault")

    monkeypatch.setattr(Segments, "generate", broken)
    monkeypatch.setattr(engine.recorder, "wait_for_main", lambda: waits.append("main"))
    with pytest.raises(ValueError, match="injected"):
        engine.run(make_request(*PROMPTS))
    assert waits == ["main"] and not engine.describe()["graphs"]


SPLIT = ("text", "encoder", "rows", "decoder")
STEPS = {"one graph": ("text", "image"), "ids to the host": SPLIT, "three graphs": SPLIT}


@pytest.fixture(params=[(form, step) for form, steps in STEPS.items() for step in steps], ids=" ".join)
def faulty(request, database, replayed_engine) -> Iterator[tuple[Executor, DatabaseGeneration, list[BaseException]]]:
    """An engine in which a replay of one graph raises what is in the list."""
    form, step = request.param
    engine, faults = replayed_engine(), []

    def before(label: str) -> None:
        if faults and label.endswith(step):
            raise faults.pop()

    engine.recorder.before = before
    executor = Executor(engine, batch_sizes=(1, 2), max_queue=16)
    yield executor, DatabaseGeneration(database, **FORMS[form]), faults
    executor.close()


FAULTS = [
    (RuntimeError("an injected fault"), GenerationError),
    (torch.OutOfMemoryError("an injected fault"), OutOfDeviceMemory),
]


def test_a_fault_inside_a_graph_is_one_requests_and_the_next_is_right(faulty, make_request, rng, long_count):
    executor, source, faults = faulty
    batches = [make_request(p, seed=i, mode="adapter", k=1, database=source) for i, p in enumerate(PROMPTS)]
    expected = [submit(executor, b).result(60) for b in batches]
    for i in range(long_count(20)):
        fault, typed = FAULTS[rng.integers(len(FAULTS))]
        faults.append(fault)
        with pytest.raises(typed, match="injected"):
            submit(executor, batches[i % 2]).result(60)
        assert not faults and executor.healthy
        assert equal(submit(executor, batches[1 - i % 2]).result(60), expected[1 - i % 2])


def test_a_device_lost_inside_a_graph_ends_the_executor(faulty, make_request):
    executor, source, faults = faulty
    batch = make_request("a dog", mode="adapter", k=1, database=source)
    submit(executor, batch).result(60)
    faults.append(RuntimeError("CUDA error: an illegal memory access was encountered"))
    for _ in range(2):
        with pytest.raises(DeviceLost, match="restart"):
            submit(executor, batch).result(60)
    assert not executor.healthy


def test_rows_are_held_until_the_batch_has_ended_also_after_an_error(database, replayed_engine, make_request):
    source, engine = DatabaseGeneration(database, **FORMS["ids to the host"]), replayed_engine()
    batch = make_request(*PROMPTS, mode="adapter", k=1, database=source)
    engine.run(batch)

    def before(label: str) -> None:
        if label.endswith("decoder"):
            raise ValueError("an injected fault")

    engine.recorder.before = before
    for seed in range(6):
        with pytest.raises(ValueError, match="injected"):
            engine.run(replace(batch, latents=batch.latents + seed))
    engine.recorder.before = lambda label: None
    # With four slots, six leases that were not released would leave none.
    assert bool(engine.run(batch).ok.all())
