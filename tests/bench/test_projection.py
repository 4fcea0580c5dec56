"""A projection depends only on counts, a datasheet and measured efficiencies."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.counts import Counts
from benchmarks.projection import GPUS, Datasheet, floor, fractions, held_out, known, project, project_stage, to_l40s

GPU = Datasheet(fp16=100e12, tf32=50e12, fp32=10e12, bytes_per_s=1e12)


def counts(flops: int = 10**12, nbytes: int = 10**6, launches: int = 10, dtype: str = "float16") -> Counts:
    return Counts(flops={dtype: flops}, eager_bytes=nbytes, launches=launches)


def test_each_dtype_runs_at_its_own_rate():
    assert floor(counts(), GPU, tf32=True) == pytest.approx(0.01)
    assert floor(counts(dtype="float32"), GPU, tf32=True) == pytest.approx(0.02)
    assert floor(counts(dtype="float32"), GPU, tf32=False) == pytest.approx(0.1)
    assert floor(counts(nbytes=10**12), GPU, tf32=True) == pytest.approx(1.0)


@given(st.integers(1, 10**5), st.floats(1e-7, 1e-4), st.floats(0.05, 1.0), st.integers(1, 50))
def test_a_stage_takes_the_longer_of_host_and_device(launches, launch_s, fraction, evaluations):
    found = project_stage(
        counts(launches=launches), GPU, fraction=fraction, launch_s=launch_s, tf32=True, evaluations=evaluations
    )
    host, device = launches * launch_s * evaluations, 0.01 / fraction * evaluations
    assert found.seconds == pytest.approx(max(host, device))
    assert found.bound_by == ("host" if found.host > found.device else "device")


def test_fractions_measured_here_carry_over():
    reached = fractions({"vae": 0.02, "unknown": 1.0}, {"vae": counts()}, GPU, tf32=True)
    assert reached == {"vae": pytest.approx(0.5)}
    kinds = {"turbo": {"counts": {"vae": counts()}, "evaluations": 4, "measured": {"search": 0.001}}}
    rows = project(kinds, "L40S", reached=reached, launch_s=0.0, tf32=True)
    # The VAE runs once, whatever the steps; a host stage is taken as it was measured.
    assert rows["turbo"]["stages"]["vae"] == pytest.approx(1e12 / GPUS["L40S"].fp16 / 0.5)
    assert rows["turbo"]["seconds"] == pytest.approx(rows["turbo"]["stages"]["vae"] + 0.001)


def test_the_papers_latencies_are_no_input(monkeypatch):
    """The projection does not depend on the paper's figures."""
    from ragturbo.bench import paper

    kinds = {"ours": {"counts": {"vae": counts()}, "evaluations": 1}}
    before = project(kinds, "L40S", reached={}, launch_s=1e-6, tf32=True)
    monkeypatch.setitem(paper.paper()["figures"], "latency.ours", {"value": 1.0, "unit": "ms", "place": ""})
    assert project(kinds, "L40S", reached={}, launch_s=1e-6, tf32=True) == before


def test_held_out_figures_come_with_their_error():
    for row in held_out({"vae": counts(), "adapter": counts()}, {"vae": 0.5}):
        assert row["error"] == pytest.approx(row["projected_s"] / row["published_s"] - 1)
        assert row["gpu"] in GPUS


@pytest.mark.parametrize("name, short", [("NVIDIA H200", "H200"), ("NVIDIA L40S", "L40S"), ("NVIDIA A100-SXM4-80GB",
    "A100"), ("NVIDIA GeForce RTX 4090", "RTX 4090"), ("Tesla T4", None)])  # fmt: skip
def test_a_driver_s_name_finds_its_datasheet_or_none(name, short):
    assert known(name) == short


@pytest.mark.skipif(torch.cuda.is_available(), reason="measures the GPU")
def test_without_a_gpu_the_projection_is_a_lower_bound_with_the_breakdowns_host_stages():
    stages = {"search": 0.25, "tokenize": 0.5, "text": 9.0}
    found = to_l40s({"profiles": {"paper": {"ours": {"stages": stages}}}}, "rehearsal")
    assert "lower bound" in found["basis"] and not found["fractions"]
    rows = found["rows"]
    assert rows["ours"]["stages"]["search"] == 0.25 and "search" not in rows["turbo"]["stages"]
    assert rows["turbo"]["stages"]["tokenize"] == 0.5 and rows["ours"]["stages"]["text"] < 1
    assert rows["ours"]["seconds"] > rows["turbo"]["seconds"] and "adapter" not in rows["lcm"]["stages"]
