from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from triton.runtime.errors import PTXASError

from benchmarks import tune
from benchmarks.kernel_cases import CASES, Case
from ragturbo.errors import InvalidRequest
from ragturbo.kernels import scaled_residual, tiles
from ragturbo.kernels.launch import replaced

ROOT = Path(__file__).resolve().parents[2]
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
                # Neither a CompilationError nor a RuntimeError.
                raise PTXASError("out of registers")
            return out * 2 if block_in_use() == 64 else out

        return wrong_or_broken

    case = Case("scaled_residual", "small", "scaled_residual", make)
    cost = {16: 1e-6, 64: 1e-6, 128: 2e-6, 2048: 4e-6}
    row = tune.tune_case(case, torch.float32, device, lambda call: cost[block_in_use()], BLOCKS)
    assert row.tile == {"BLOCK": 128}


def test_a_gain_within_the_noise_changes_nothing(device):
    row = tune.tune_case(CASE, torch.float32, device, lambda call: 4e-6 - 1e-9 * (block_in_use() == 64), BLOCKS)
    assert row.tile == {} and row.seconds == row.default


def test_a_measurement_that_fails_leaves_the_other_candidates(device):
    def measure(calls):
        if block_in_use() == 16:
            raise RuntimeError("capture failed")
        return {64: 1e-6, 128: 2e-6, 2048: 4e-6}[block_in_use()]

    assert tune.tune_case(CASE, torch.float32, device, measure, BLOCKS).tile == {"BLOCK": 64}


def test_when_the_time_is_over_the_best_so_far_wins(device):
    timed = []

    def measure(calls):
        timed.append(block_in_use())
        return {2048: 4e-6, 16: 3e-6}[block_in_use()]

    def candidates():
        yield BLOCKS[0]
        timed.append("late")
        yield BLOCKS[1]

    class Clock:
        """0 until the second candidate comes."""

        monotonic = staticmethod(lambda: float("late" in timed))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tune, "time", Clock)
        row = tune.tune_case(CASE, torch.float32, device, measure, candidates(), until=1.0)
    assert timed == [2048, 16, "late"]
    assert row.tile == {"BLOCK": 16}


def test_what_weighs_most_in_an_image_is_tuned_first():
    order = [(case.op, case.label) for case, _ in tune.in_order((case, torch.float16) for case in CASES)]
    assert len(order) == len(CASES)
    for op, begin in tune.FIRST:
        assert any(case.op == op and case.label.startswith(begin) for case in CASES)
    ops = list(dict.fromkeys(op for op, _ in order))
    assert ops[:5] == ["linear", "project_attention", "cross_attention", "group_norm", "topk"]
    assert order.index(("group_norm", "VAE 128×512²")) < order.index(("linear", "b8 FF out, residual"))
    assert {case.op for case in CASES} >= set(tune.COLD)


def test_cases_that_share_a_tile_are_tuned_once():
    wanted = tune.distinct(tune.in_order((case, torch.float16) for case in CASES))
    labels = [case.label for case, _ in wanted if case.op in ("linear", "project_attention")]
    assert "b1 out, residual" in labels and "b1 proj_in" not in labels and "b1 proj_out, λ residual" not in labels
    assert "b1" in labels and "LayerNorm" not in labels


def test_a_kill_while_tiles_are_written_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "nvidia_h200.json"
    tune.write(path, [tune.Tuned("slerp", "N8", {"BLOCK": 1024}, 1e-6, 2e-6)], {"gpu": "NVIDIA H200"})
    before = path.read_bytes()
    write_text = type(path).write_text

    def killed(self, text, *args):
        write_text(self, text[: len(text) // 2], *args)
        raise KeyboardInterrupt

    monkeypatch.setattr(type(path), "write_text", killed)
    with pytest.raises(KeyboardInterrupt):
        tune.write(path, [tune.Tuned("slerp", "N9", {"BLOCK": 512}, 1e-6, 2e-6)], {"gpu": "NVIDIA H200"})
    assert path.read_bytes() == before


def test_a_run_that_is_out_of_time_keeps_what_it_has_and_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA Imaginary 9000")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr("ragturbo.machine.describe", dict)
    monkeypatch.setattr(tiles, "made_on", lambda context: {"gpu": "NVIDIA Imaginary 9000"})
    now = [0.0]
    monkeypatch.setattr(tune.time, "monotonic", lambda: now[0])

    def tune_case(case, dtype, device, measure, until):
        now[0] += 40
        assert until == 100
        return tune.Tuned(case.tiled, case.label, {"BM": 64}, 1e-6, 2e-6)

    monkeypatch.setattr(tune, "tune_case", tune_case)
    command = ["--out", str(tmp_path), "--seconds", "100", "--jobs", "0", "--op", "linear", "topk"]
    assert tune.main([*command, "--label", "b1 QKV", "b1 GEGLU", "1 queries"]) == 0
    assert tiles.read(tmp_path / "nvidia_imaginary_9000.json") == {
        "linear": {"b1 QKV": {"BM": 64}, "b1 GEGLU": {"BM": 64}},
        "topk": {"1 queries, k 1": {"BM": 64}},
    }
    assert "topk, 1 queries, k 4 and the rest are not tuned" in capsys.readouterr().out


READS = """
import torch
torch.cuda.get_device_name = lambda device=None: "NVIDIA Imaginary 9000"
from ragturbo.kernels import tiles
print(tiles.choose("linear", "M64", torch.device("cuda", 0), {"BM": 16, "BN": 32}))
"""


def test_a_process_started_later_reads_the_tiles_of_its_environments_folder(tmp_path):
    path = tmp_path / tiles.file_name("NVIDIA Imaginary 9000")
    tune.write(path, [tune.Tuned("linear", "M64", {"BM": 64}, 1e-6, 2e-6)], {"gpu": "NVIDIA Imaginary 9000"})
    environment = {**os.environ, "RAGTURBO_KERNEL_CONFIGS": str(tmp_path)}
    for folder, expected in ((tmp_path, "{'BM': 64, 'BN': 32}"), (tmp_path / "none", "{'BM': 16, 'BN': 32}")):
        environment["RAGTURBO_KERNEL_CONFIGS"] = str(folder)
        done = subprocess.run([sys.executable, "-c", READS], env=environment, capture_output=True, text=True)
        assert done.stdout.strip() == expected, done.stderr[-2000:]


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
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
import torch
from benchmarks import tune
from benchmarks.kernel_cases import CASES
if __name__ == "__main__":
    case = next(case for case in CASES if case.op == "scaled_residual")
    tune.CANDIDATES["scaled_residual"] = [{"BLOCK": 1024, "num_warps": 8}, {"BLOCK": "wrong"}]
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        [queued] = tune.compile_ahead(pool, [(case, torch.float16)], 90)
        print([future.result() for future in queued])
"""


def test_candidates_are_compiled_ahead_without_a_gpu_and_one_that_cannot_be_stops_nothing(tmp_path):
    (tmp_path / "ahead.py").write_text(AHEAD)
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run([sys.executable, str(tmp_path / "ahead.py")], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "[True, True, False]", done.stderr[-2000:]
    # What the timing process will find in place of a compilation.
    assert len(list((tmp_path / "cache").rglob("*.cubin"))) == 2


def test_without_a_gpu_the_command_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run([sys.executable, "-m", "benchmarks.tune"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 4 and "torch sees none" in done.stderr
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.tune", "--op", "x"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 2 and "known: " in done.stderr
