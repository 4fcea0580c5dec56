"""Tests that need a GPU: a replay equals the call bit for bit, follows new values and weights, and leaks no memory.

The model is small and random; budgets at real sizes are measured by `make gpu`.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from ragturbo import Generator
from ragturbo.config import GeneratorConfig
from ragturbo.engine.database import DatabaseGeneration
from ragturbo.engine.graph_engine import GraphEngine
from ragturbo.engine.recorder import Uncaptured
from ragturbo.errors import GenerationError
from ragturbo.model.bundle import Bundle
from ragturbo.model.fused_text import FusedText

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="captures CUDA graphs"),
]
PROMPTS = ("a red circle", "a blue cat")
FORMS = {
    "one graph": {"retriever": "exact", "host_bytes": 2**20},
    "ids to the host": {"retriever": "exact", "host_bytes": 4 * 512},
    "ids to the host, some rows hot": {"retriever": "exact", "host_bytes": 4 * 512, "device_bytes": 3 * 512},
    "three graphs": {"retriever": "bm25", "host_bytes": 2**20},
    "three graphs, keys and words": {"retriever": "hybrid", "host_bytes": 2**20},
}


@pytest.fixture(autouse=True)
def freed() -> Iterator[None]:
    """Engines are in reference cycles, and a graph holds driver memory that the garbage collector does not see."""
    yield
    gc.collect()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    print(f"{(total - free - torch.cuda.memory_reserved()) >> 20} MiB of the card are taken outside torch's allocator")


@pytest.fixture
def on_gpu(model_folder) -> Bundle:
    return Bundle.load(model_folder, device="cuda", dtype=torch.float16)


def engines(bundle: Bundle) -> tuple[GraphEngine, GraphEngine]:
    """The same networks and kernels, replayed and called."""
    return GraphEngine(bundle, GeneratorConfig()), GraphEngine(bundle, GeneratorConfig(), Uncaptured(bundle.device))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mode", ["none", "adapter", "slerp", "lerp"])
@pytest.mark.parametrize("steps", [1, 2])
def test_a_replay_is_the_call_bit_for_bit_for_ever_new_numbers(on_gpu, database, make_request, form, mode, steps):
    source = DatabaseGeneration(database, device="cuda", **FORMS[form])
    replayed, called = engines(on_gpu)
    for seed, prompts in enumerate([PROMPTS, ("a dog", "a green square"), PROMPTS]):
        batch = make_request(*prompts, seed=seed, num_inference_steps=steps, output_type="uint8")
        if mode != "none":
            batch = replace(batch, mode=mode, k=1, database=source)
        got, expected = replayed.run(batch), called.run(batch)
        assert torch.equal(got.uint8, expected.uint8) and torch.equal(got.ids, expected.ids)
        assert torch.equal(got.lam, expected.lam) and bool(got.ok.all())


@pytest.mark.parametrize("form", FORMS)
def test_a_search_by_phrase_replays_and_agrees_with_the_oracle(on_gpu, database, make_composed, form):
    """Prompts of two and three phrases, whose neighbours get phrase embeddings."""
    source = DatabaseGeneration(database, device="cuda", **FORMS[form])
    replayed, called = engines(on_gpu)
    prompts = ["a red circle left of a blue square", "a green cat above a yellow dog beside a red square"]
    for seed, some in enumerate([prompts, prompts[::-1]]):
        batch = make_composed(some, source, seed=seed)
        got, expected, oracle = replayed.run(batch), called.run(batch), replayed.reference.run(batch)
        assert torch.equal(got.latents, expected.latents) and torch.equal(got.ids, oracle.ids)
        assert float((got.latents - oracle.latents).norm() / oracle.latents.norm()) < 1e-2


def test_it_agrees_with_the_oracle_and_the_controls_do_not(on_gpu, database, make_request):
    source = DatabaseGeneration(database, "exact", device="cuda")
    engine = engines(on_gpu)[0]

    def error(a, b) -> float:
        return float((a.latents - b.latents).norm() / b.latents.norm())

    batch = make_request(*PROMPTS, mode="adapter", k=1, database=source)
    oracle = engine.reference.run(batch)
    assert error(engine.run(batch), oracle) < 1e-2
    assert error(engine.run(replace(batch, mode="none", k=0, database=None)), oracle) > 1e-3
    assert error(engine.run(make_request(*PROMPTS, seed=9, mode="adapter", k=1, database=source)), oracle) > 1e-1


def test_new_weights_take_effect_under_the_live_graph(on_gpu, database, make_request, new_adapter, tmp_path):
    source = DatabaseGeneration(database, "exact", device="cuda")
    replayed, called = engines(on_gpu)
    batch = make_request(*PROMPTS, mode="adapter", k=1, database=source)
    before = replayed.run(batch).latents
    graphs = list(replayed._recordings.values())
    new_adapter(tmp_path, seed=1)
    replayed.load_adapter(tmp_path)
    assert called.model.refresh()
    after = replayed.run(batch).latents
    assert list(replayed._recordings.values()) == graphs
    assert not torch.equal(before, after) and torch.equal(after, called.run(batch).latents)


def test_a_capture_that_fails_names_the_operation(on_gpu, make_request, monkeypatch):
    encode = FusedText.encode

    def syncing(self, input_ids):
        states = encode(self, input_ids)
        states.hidden_states.sum().item()
        return states

    monkeypatch.setattr(FusedText, "encode", syncing)
    with pytest.raises(GenerationError, match="cannot be captured in a CUDA graph"):
        engines(on_gpu)[0].run(make_request(*PROMPTS))


def test_after_a_capture_that_failed_and_without_any_recording_the_next_is_recorded(
    on_gpu, database, make_request, monkeypatch
):
    """The memory pool outlives its graphs, also while an error holds what a failed capture had made."""
    source = DatabaseGeneration(database, "exact", device="cuda")
    replayed, called = engines(on_gpu)
    batch = make_request(*PROMPTS, mode="adapter", k=1, database=source)
    expected = called.run(batch).latents
    assert torch.equal(replayed.run(batch).latents, expected)
    replayed._recordings.clear()
    assert torch.equal(replayed.run(batch).latents, expected)
    replayed._recordings.clear()
    decode = type(replayed.model.unet).decode

    def syncing(self, *arguments):
        out = decode(self, *arguments)
        out.sum().item()
        return out

    monkeypatch.setattr(type(replayed.model.unet), "decode", syncing)
    with pytest.raises(GenerationError, match="cannot be captured") as held:
        replayed.run(batch)
    monkeypatch.undo()
    assert torch.equal(replayed.run(batch).latents, expected) and held.value.__traceback__ is not None


def driver_bytes() -> int:
    """GPU memory of this process outside torch's allocator: context, modules, graphs."""
    pynvml = pytest.importorskip("pynvml")
    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    used = {p.pid: p.usedGpuMemory for p in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)}
    if (own := used.get(os.getpid())) is None:
        pytest.skip("the driver does not tell this process's memory: a container's process ids are not the driver's")
    return own - torch.cuda.memory_reserved()


@pytest.mark.parametrize("mode", ["none", "adapter"])
def test_a_recording_takes_less_than_a_gigabyte_that_torch_does_not_count(on_gpu, database, make_request, mode):
    """On the first run on a GPU one process had 105 GB of it, which JAX had reserved (tests/retrieval/test_bm25.py)."""
    source = DatabaseGeneration(database, "exact", device="cuda") if mode == "adapter" else None
    batch = make_request(*PROMPTS, mode=mode, k=int(mode == "adapter"), database=source, output_type="uint8")
    replayed, called = engines(on_gpu)
    # Modules and libraries are loaded by calls.
    called.run(batch)
    torch.cuda.synchronize()
    before = driver_bytes()
    replayed.run(batch)
    assert driver_bytes() - before < 2**30


def test_remembered_prompts_give_the_same_bytes(on_gpu, database, make_request):
    source = DatabaseGeneration(database, "exact", device="cuda")
    remembering = GraphEngine(on_gpu, GeneratorConfig(prompt_cache=4))
    plain = engines(on_gpu)[0]
    for seed, prompts in enumerate([PROMPTS, ("a dog", "a cat"), PROMPTS, ("a dog", "a cat"), PROMPTS]):
        batch = make_request(*prompts, seed=seed, mode="adapter", k=1, database=source)
        assert torch.equal(remembering.run(batch).latents, plain.run(batch).latents)
    assert remembering.describe()["prompts"]["hits"] == 3


def test_without_capture_the_graph_engine_gives_the_same_bytes(model_folder, database_folder):
    images = []
    for capture in (True, False):
        with Generator.from_pretrained(
            model_folder, device="cuda", database=database_folder, engine="graph", capture=capture, batch_sizes=(1,)
        ) as gen:
            assert gen.info["engine"] == "graph"
            images.append(gen("a red circle", seed=3, output_type="uint8").images)
    assert np.array_equal(*images)


def test_memory_is_flat_over_many_requests(on_gpu, database, make_request, long_count):
    """As many requests as 40 s hold: with several test processes on one GPU a replay may take 20 ms."""
    source = DatabaseGeneration(database, "exact", device="cuda")
    engine = engines(on_gpu)[0]
    batches = [make_request(*PROMPTS[:n], mode=m, k=k, database=source if k else None)
               for n in (1, 2) for m, k in (("adapter", 1), ("none", 0))]  # fmt: skip

    def memory() -> tuple[int, int]:
        # Memory held by reference cycles is not a leak.
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()

    # The first turn records and the second replays for the first time, with the results of another batch around.
    for batch in 2 * batches:
        engine.run(batch)
    before, until = memory(), time.monotonic() + 40
    for i in range(long_count(10_000)):
        engine.run(batches[i % len(batches)])
        if i % 100 == 99:
            assert memory() == before, f"after {i + 1} requests"
            if time.monotonic() > until:
                break
    assert memory() == before


def test_stages_inside_a_graph_are_timed_and_search_and_gather_lie_beside_the_encoder(on_gpu, database, make_request):
    source = DatabaseGeneration(database, "exact", device="cuda")
    engine = engines(on_gpu)[0]
    batch = make_request(*PROMPTS, mode="adapter", k=1, database=source, output_type="uint8")
    timings = [engine.run(batch).timings for _ in range(20)][-1]
    stages = {"copy", "text", "search", "gather", "encode", "adapter", "decode", "vae"}
    assert set(timings) == stages | {"fill", "launch", "wait", "result"}
    assert all(seconds > 0 for seconds in timings.values())
