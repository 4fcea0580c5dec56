from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks import cpu_peers
from benchmarks.cpu_systems import SYSTEMS


def test_the_ratio_is_of_medians_and_its_interval_of_rounds():
    slow = [2.0, 2.1, 1.9, 2.0, 9.0]
    ratio, low, high = cpu_peers.ratio_of_medians(slow, [1.0, 1.0, 1.1, 0.9, 1.0])
    assert ratio == 2.0 and low <= 2.0 <= high and low > 1.5


def test_every_pair_is_of_known_systems_and_ours_comes_first():
    for pairs in cpu_peers.PAIRS.values():
        for ours, peer in pairs:
            assert ours.startswith("ragturbo") and not peer.startswith("ragturbo") and {ours, peer} <= set(SYSTEMS)


class Stub:
    """A process that takes a known time."""

    order: list[str] = []

    def __init__(self, system, model):
        self.system, self.closed = system, False

    def draw(self, seed):
        self.order.append(self.system)
        return 1.0 if self.system.startswith("ragturbo") else 3.0

    def latents(self, seed, file):
        return np.ones((4, 2, 2)) * (1.0 if self.system.startswith("ragturbo") else 1.01)

    def close(self):
        self.closed = True


def test_a_pair_takes_turns_in_both_orders_and_earlier_pairs_are_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cpu_peers, "Process", Stub)
    monkeypatch.setattr(Stub, "order", [])
    out = tmp_path / "peers.json"
    assert cpu_peers.main(["--model", "shapes", "--rounds", "2", "--pair", "0", "--out", str(out)]) == 0
    assert Stub.order == ["ragturbo", "diffusers", "diffusers", "ragturbo"]
    assert "ragturbo is 3.00 [3.00, 3.00] times as fast as diffusers; latents 9.9e-03 apart" in capsys.readouterr().out
    cpu_peers.main(["--model", "shapes", "--rounds", "1", "--pair", "1", "0", "--out", str(out)])
    rows = json.loads(out.read_text())["pairs"]
    assert [row["peer"] for row in rows] == ["diffusers + torch.compile", "diffusers"]


@pytest.mark.slow
def test_two_real_processes_draw_the_same_latents():
    found = cpu_peers.compare("ragturbo", "diffusers", "rehearsal", 2)
    assert found["latents_apart"] < 1e-4 and all(len(v) == 2 for v in found["seconds"].values())
    with pytest.raises(RuntimeError, match="ended with"):
        cpu_peers.Process("ragturbo", "no such model")
