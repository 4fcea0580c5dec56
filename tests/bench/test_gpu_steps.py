"""The record of a GPU step: figures only of verified results, and every finished phase whatever fails later."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
import torch

from benchmarks import gpu_steps, large_database
from benchmarks.gpu_steps import STEPS, Scale, measure
from benchmarks.step_record import StepRecord
from ragturbo.bench import budgets
from ragturbo.bench.agreement import engine_mismatch
from ragturbo.bench.models import make_bundle
from ragturbo.config import GeneratorConfig
from ragturbo.engine.tables import DeviceKeys
from ragturbo.generate import Generator

# A process of its own that imports everything: too long for every run of the tests.
OWN_PROCESS = {"cold"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in OWN_PROCESS else n for n in STEPS]
)  # fmt: skip
def test_every_line_of_a_step_runs_at_tiny_sizes_and_its_file_is_what_it_returns(name, tmp_path):
    torch.set_num_threads(1)
    found = json.loads(json.dumps(measure(name, Scale(rehearse=True), tmp_path / "out.json"), default=str))
    assert set(found["measured"]) <= {budget.key for budget in budgets.BUDGETS} and found["measured"]
    assert not {"withheld", "unverified", "errors"} & set(found)
    assert all(value == value for value in found["measured"].values())
    # A rehearsal on a busy machine is noisy, and no GPU is queried.
    assert found["gpu_states"] == [] and all(flag.startswith("noise ") for flag in found["flags"])
    assert json.loads((tmp_path / "out.json").read_text()) == found
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


@pytest.mark.parametrize("name", ["image", "compiled peer", "parts", "added", "tail"])
def test_what_differs_from_its_reference_is_timed_and_kept_out_of_the_budgets(name, monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setattr("ragturbo.bench.agreement.relative_error", lambda ours, theirs: 0.5)
    monkeypatch.setattr(gpu_steps, "relative_error", lambda ours, theirs: 0.5)
    found = measure(name, Scale(rehearse=True))
    assert found["measured"] == {} and found["unverified"] and found["agreement"]
    assert all("5.0e-01" in found["unverified_because"][key] for key in found["unverified"])


def test_an_image_that_fell_back_has_no_figure(monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setattr(
        gpu_steps, "engine_mismatch", lambda info, engine, dtype: "3 batches ran in plain torch: no page lock"
    )
    found = measure("image", Scale(rehearse=True))
    assert found["measured"] == {} and "unverified" not in found and "plain torch" in found["withheld"]


def test_a_failed_peer_costs_the_comparison_and_not_the_time_of_ours(monkeypatch):
    torch.set_num_threads(1)

    def broken(bundle):
        raise RuntimeError("no such pipeline")

    monkeypatch.setattr(gpu_steps, "Diffusers", broken)
    found = measure("image", Scale(rehearse=True))
    assert found["unverified"]["image_p50_s"] > 0 and found["measured"] == {} and found["stages"]
    assert found["errors"]["comparison"] == "RuntimeError: no such pipeline" == found["errors"]["interleaved"]


def test_a_step_says_that_the_card_was_held_back_or_its_times_drifted(monkeypatch):
    states = iter([{"reasons": ["idle"]}, {"reasons": ["power cap"]}, None])
    monkeypatch.setattr("benchmarks.step_record.gpu_state", lambda: next(states))

    def work(scale, record):
        record.look()
        record.verify(None)
        record.save(figures={"unet_s": 1.0}, noise={"ours": 0.034, "theirs": 0.019})

    monkeypatch.setitem(STEPS, "parts", work)
    found = measure("parts", Scale())
    assert found["flags"] == ["throttled: power cap", "noise 3.4% (ours)"] and len(found["gpu_states"]) == 3


def test_a_step_that_is_killed_leaves_the_phases_that_were_done(tmp_path):
    out = tmp_path / "out.json"
    code = f"""
import time
from pathlib import Path
from benchmarks.step_record import StepRecord
record = StepRecord(Path({str(out)!r}), has_gpu=False)
record.verify(None)
with record.phase("first"):
    record.save(figures={{"unet_s": 0.003}}, details="of the first")
record.save(more=1)
time.sleep(600)
"""
    process = subprocess.Popen([sys.executable, "-c", code])
    until = time.monotonic() + 120
    while time.monotonic() < until and not (out.is_file() and "more" in out.read_text()):
        time.sleep(0.05)
    process.kill()
    process.wait()
    found = json.loads(out.read_text())
    assert found["measured"] == {"unet_s": 0.003} and found["details"] == "of the first" and "first" in found["phases"]


def test_a_figure_is_unverified_until_its_comparison_has_been_made():
    record = StepRecord(has_gpu=False)
    record.save(figures={"unet_s": 3e-3, "adapter_s": 1e-4})
    assert record.to_dict()["measured"] == {} and set(record.to_dict()["unverified"]) == {"unet_s", "adapter_s"}
    record.verify(None, ["unet_s"])
    record.verify("error 2.1e-03", ["adapter_s"])
    found = record.to_dict()
    assert found["measured"] == {"unet_s": 3e-3} and found["unverified"] == {"adapter_s": 1e-4}
    assert found["unverified_because"] == {"adapter_s": "error 2.1e-03"}
    record.withhold("another engine")
    record.withhold(None)
    assert record.to_dict()["measured"] == {} and record.to_dict()["withheld"] == "another engine"


def test_what_did_not_run_as_asked_is_named():
    info = {"engine": "graph", "ways": {"plain batches": {}, "vae dtype": "float16"}}
    assert engine_mismatch(info, "graph", torch.float16) is None
    assert "'reference' ran" in str(engine_mismatch({**info, "engine": "reference"}, "graph", torch.float16))
    assert engine_mismatch({**info, "engine": "reference"}, "auto", torch.float16) is None
    fallen = {**info, "ways": {"plain batches": {"no page lock": 4}, "vae dtype": "float16"}}
    assert "4 batches ran in plain torch: no page lock" in str(engine_mismatch(fallen, "graph", torch.float16))
    upcast = {**info, "ways": {"plain batches": {}, "vae dtype": "float32"}}
    assert (
        "float32" in str(engine_mismatch(upcast, "graph", torch.float16))
        and engine_mismatch(upcast, "graph", torch.float32) is None
    )


def test_padded_keys_are_searched_and_never_found(tmp_path):
    torch.set_num_threads(1)
    bundle = make_bundle("rehearsal", "cpu", torch.float32)
    words = [f"a boat number {i}" for i in range(20)]
    own = large_database.prompt_keys(bundle, words)
    database = large_database.write(bundle, tmp_path / "db", 100, workers=2, own=own)
    keys = DeviceKeys(database.snapshot, torch.device("cpu"))
    large_database.pad_keys(keys, 5000)
    assert keys.count == 5000 == len(keys.searched) == len(keys.stored) and keys.searched.dtype == torch.float16
    scores = torch.from_numpy(own) @ keys.searched.float().T
    best = scores.argmax(1)
    # Every prompt has a row of its own; what was added has ordinary scores, all of them far below.
    assert len(set(best.tolist())) == len(words) and int(best.max()) < 100
    assert float(scores[:, 100:].abs().max()) < 0.1 < 0.9 < float(scores.max(1).values.min())
    assert bool((scores[:, 100:] != 0).all())


def test_an_engine_over_padded_keys_makes_the_same_images(tmp_path):
    torch.set_num_threads(1)
    bundle, words = make_bundle("rehearsal", "cpu", torch.float32), ["a boat", "a cat", "two horses"]
    database = large_database.write(
        bundle, tmp_path / "db", 100, workers=2, own=large_database.prompt_keys(bundle, words)
    )
    config = GeneratorConfig(
        engine="graph", capture=False, retriever="exact", batch_sizes=(1,), host_cache=100 * database.geometry.stride
    )
    with Generator(bundle, database=database, config=config) as gen:

        def made():
            outs = [gen(word, seed=0, mode="adapter", output_type="latent") for word in words]
            return [out.neighbors[0][0].id for out in outs], torch.cat([out.images for out in outs])

        ids, latents = made()
        gen.call(lambda: large_database.pad_keys(gen._engine._tables.keys, 3000))
        ids_padded, latents_padded = made()
        assert len(set(ids)) == 3 and ids == ids_padded and torch.equal(latents, latents_padded)
        assert gen.info["ways"]["keys on the device, bytes"] == 3000 * 2 * database.geometry.key_dim
        assert gen.info["ways"]["retrieval"] == "one graph"
