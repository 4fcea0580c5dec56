"""Counting without computing: FLOPs against torch's own counter, bytes and launches against what is known."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import check_counts
from benchmarks.counts import Counts, count, stage_counts
from ragturbo.bench.models import make_bundle


@pytest.fixture(scope="module")
def stages() -> dict[str, Counts]:
    return stage_counts("rehearsal", torch.float32)


def test_flops_are_those_of_torchs_counter_on_the_real_modules(stages):
    bundle = make_bundle("rehearsal", "cpu", torch.float32)
    text = torch.randn(1, 77, 32)
    latents, timestep = torch.randn(1, 4, 16, 16), torch.tensor([999.0])
    state = bundle.unet.encode(latents, timestep, text)

    def counted_by_torch(run: Callable[[], Any]) -> int:
        # Its counter does not know the attention kernel of every CPU; products it always knows.
        with sdpa_kernel(SDPBackend.MATH), torch.no_grad(), FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops()

    assert stages["encode"].total_flops == counted_by_torch(lambda: bundle.unet.encode(latents, timestep, text))
    assert stages["decode"].total_flops == counted_by_torch(lambda: bundle.unet.decode(state))
    assert stages["vae"].total_flops == counted_by_torch(lambda: bundle.vae.decode(latents))
    ids = bundle.text.tokenize(["a red fox"]).input_ids
    assert stages["text"].total_flops == counted_by_torch(lambda: bundle.text.text_encoder(input_ids=ids))


def test_twice_the_batch_is_twice_the_work_and_the_same_launches(stages):
    double = stage_counts("rehearsal", torch.float32, batch=2)
    for name in ("encode", "decode", "vae"):
        assert double[name].total_flops == pytest.approx(2 * stages[name].total_flops, rel=0.01)
        assert double[name].launches == stages[name].launches


def test_half_the_precision_is_half_the_bytes(stages):
    half = stage_counts("rehearsal", torch.float16)
    # The timestep and what is made of it stay fp32.
    assert half["vae"].least_bytes == pytest.approx(stages["vae"].least_bytes / 2, rel=0.01)
    assert half["encode"].least_bytes == pytest.approx(stages["encode"].least_bytes / 2, rel=0.01)


def test_the_least_a_layer_moves_is_its_weights_its_input_and_its_output():
    layer, x = nn.Linear(64, 32, bias=False), torch.randn(8, 64)
    found = count(lambda: torch.relu(layer(x)).relu())
    assert found.least_bytes == 4 * (64 * 32 + 8 * 64 + 8 * 32)
    assert found.launches == 3 and found.flops == {"float32": 2 * 8 * 64 * 32}
    # Each op by itself reads what the one before it wrote: four more passes over the output.
    assert found.eager_bytes == found.least_bytes + 4 * 4 * 8 * 32


def test_views_and_empty_memory_cost_nothing():
    x = torch.randn(4, 6)
    found = count(lambda: x.t().reshape(3, 8)[1:].unsqueeze(0) if x.is_contiguous() else torch.empty(3))
    assert found.launches <= 1 and found.total_flops == 0
    assert count(lambda: torch.empty(100)).launches == 0


def test_a_count_that_moved_is_named_with_its_change():
    now = {"stages": {"vae": {"launches": 110, "least_bytes": 5}}}
    committed = {"stages": {"vae": {"launches": 100, "least_bytes": 5}, "text": {"launches": 1}}}
    found = list(check_counts.differences(now, committed))
    assert found == [
        "stages/vae/launches: 110, committed 100 (+10.00%)",
        "stages/text: None, committed {'launches': 1}",
    ]
    assert list(check_counts.differences(now, now)) == []


def test_inference_mode_changes_no_count(stages):
    """In inference mode linear and conv2d are decomposed below the counter, which would count nothing."""
    stage_counts.cache_clear()
    layer, x = nn.Linear(64, 32, bias=False), torch.randn(8, 64)
    with torch.inference_mode():
        inside = stage_counts("rehearsal", torch.float32)
        by_hand = count(lambda: layer(x))
    assert inside == stages
    assert by_hand.flops == {"float32": 2 * 8 * 64 * 32} and by_hand.launches == 1
    committed = json.loads(check_counts.FILE.read_text())["stages"]["text"]
    with torch.inference_mode():
        assert stage_counts("sd21", torch.float16)["text"].to_dict() == committed


def test_the_committed_counts_are_those_of_the_code(tmp_path, capsys):
    assert check_counts.main([]) == 0
    changed = json.loads(check_counts.FILE.read_text())
    changed["stages"]["vae"]["launches"] += 1
    (tmp_path / "counts.json").write_text(json.dumps(changed))
    assert check_counts.main([], tmp_path / "counts.json") == 1
    assert "stages/vae/launches" in capsys.readouterr().out
