from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from ragturbo.errors import InvalidRequest
from ragturbo.kernels import scaled_residual, tiles, tune
from ragturbo.kernels.cases import CASES, Case
from ragturbo.kernels.launch import replaced

BLOCKS = [{"BLOCK": 16}, {"BLOCK": 64}, {"BLOCK": 128}]


def make(device, dtype):
    h, delta = torch.ones(2, 3, 40, device=device, dtype=dtype), torch.ones(2, 3, 40, device=device, dtype=dtype)
    return lambda: scaled_residual.forward(h, delta, torch.ones(2, device=device))


CASE = Case("scaled_residual", "small", "scaled_residual", make)


def block_in_use():
    return tiles.choose("scaled_residual", "", torch.device("cpu"), {"BLOCK": 2048})["BLOCK"]


def test_the_fastest_candidate_wins_and_is_what_the_launcher_then_uses(device, tmp_path, monkeypatch):
    cost = {16: 3e-6, 64: 1e-6, 128: 2e-6, 2048: 4e-6}
    row = tune.tune_case(CASE, torch.float32, device, lambda call: cost[block_in_use()], BLOCKS)
    assert row == tune.Tuned("scaled_residual", "N120 torch.float32", {"BLOCK": 64}, 1e-6, 4e-6)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA Imaginary 9000")
    path = tmp_path / tiles.file_name("NVIDIA Imaginary 9000")
    tune.write(path, [row], {"gpu": "NVIDIA Imaginary 9000"})
    tune.write(path, [tune.Tuned("slerp", "N8", {"BLOCK": 1024}, 1e-6, 2e-6)], {"gpu": "NVIDIA Imaginary 9000"})
    assert path.name == "nvidia_imaginary_9000.json"
    assert json.loads(path.read_text())["microseconds"]["scaled_residual"]["N120 torch.float32"] == {
        "tuned": 1.0, "default": 4.0,
    }  # fmt: skip
    monkeypatch.setattr(tiles, "_OVERRIDE", str(tmp_path))
    tiles._measured.cache_clear()
    gpu, default = torch.device("cuda", 0), {"BLOCK": 2048, "num_warps": 4}
    chosen = tiles.choose("scaled_residual", "N120 torch.float32", gpu, default)
    assert chosen == {"BLOCK": 64, "num_warps": 4}
    assert tiles.choose("scaled_residual", "N121 torch.float32", gpu, default) == default
    assert tiles.choose("slerp", "N8", gpu, default)["BLOCK"] == 1024
    tiles._measured.cache_clear()


def test_a_candidate_that_fails_or_gives_another_result_is_out(device):
    def make(device, dtype):
        call = CASE.make(device, dtype)

        def wrong_or_broken():
            out = call()
            if block_in_use() == 16:
                raise RuntimeError("out of resources")
            return out * 2 if block_in_use() == 64 else out

        return wrong_or_broken

    case = Case("scaled_residual", "small", "scaled_residual", make)
    cost = {16: 1e-6, 64: 1e-6, 128: 2e-6, 2048: 4e-6}
    row = tune.tune_case(case, torch.float32, device, lambda call: cost[block_in_use()], BLOCKS)
    assert row.tile == {"BLOCK": 128}


def test_a_gain_within_the_noise_changes_nothing(device):
    row = tune.tune_case(CASE, torch.float32, device, lambda call: 4e-6 - 1e-9 * (block_in_use() == 64), BLOCKS)
    assert row.tile == {} and row.seconds == row.default


def test_every_case_has_candidates_and_they_are_tiles_of_its_kernel():
    for case in CASES:
        # Nothing is launched: on tensors without memory there is nothing to launch on.
        with tiles.recorded() as asked, replaced(lambda *launch: None):
            case.make("meta", torch.float16)()
        assert case.tiled in {kernel for kernel, _ in asked}, case
        assert tune.CANDIDATES[case.tiled], case


def test_a_file_of_tiles_that_is_none_is_refused_by_name(tmp_path):
    path = tmp_path / "nvidia_h200.json"
    wrong = {
        "{": "not JSON", "[]": "no tiles", '{"tiles": {"linear": 4}}': "'linear'",
        '{"tiles": {"slerp": {"N8": {"BLOCK": "big"}}}}': "'N8'", '{"tiles": {"slerp": {"N8": {"BLOCK": 0}}}}': "'N8'",
    }  # fmt: skip
    for text, reason in wrong.items():
        path.write_text(text)
        with pytest.raises(InvalidRequest, match=f"nvidia_h200.json.*{reason}"):
            tiles.read(path)
    tune.write(tmp_path / "new.json", [tune.Tuned("slerp", "N8", {"BLOCK": 1024}, 1e-6, 2e-6)], {"gpu": "NVIDIA H200"})
    for path in (tmp_path / "new.json", *tiles.INSTALLED.glob("*.json")):
        assert set(tiles.read(path)) <= set(tune.CANDIDATES)


def test_a_dry_run_counts_the_candidates_on_any_machine(capsys):
    assert tune.main(["--dry-run", "--op", "linear", "cross_attention", "--label", "b1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"linear, b1 FF out, residual, torch.float16: {len(tune.CANDIDATES['linear'])} candidates" in lines
    assert any(tile.get("SPLITS") == 8 for tile in tune.CANDIDATES["linear"])
    assert {line.split(",")[0] for line in lines} == {"linear", "cross_attention"}


AHEAD = """
import torch
from ragturbo.kernels import tune
from ragturbo.kernels.cases import CASES
if __name__ == "__main__":
    case = next(case for case in CASES if case.op == "scaled_residual")
    tune.CANDIDATES["scaled_residual"] = [{"BLOCK": 512}, {"BLOCK": 1024, "num_warps": 8}, {"BLOCK": "wrong"}]
    print(tune.compile_ahead([(case, torch.float16)], 90, 1))
"""


def test_candidates_are_compiled_ahead_without_a_gpu_and_one_that_cannot_be_stops_nothing(tmp_path):
    (tmp_path / "ahead.py").write_text(AHEAD)
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, str(tmp_path / "ahead.py")], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "2", done.stderr[-2000:]
    # What the timing process will find in place of a compilation.
    assert len(list((tmp_path / "cache").rglob("*.cubin"))) == 2


def test_without_a_gpu_the_command_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run(
        [sys.executable, "-m", "ragturbo.kernels.tune"], capture_output=True, text=True, env={**os.environ}
    )
    assert done.returncode == 4 and "torch sees none" in done.stderr
    done = subprocess.run([sys.executable, "-m", "ragturbo.kernels.tune", "--op", "x"], capture_output=True, text=True)
    assert done.returncode == 2 and "known: " in done.stderr
