"""`ragturbo profile` over a small real model: stages in table and trace, and commands that repeat the run."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from ragturbo import Generator
from ragturbo.bench import profile as profiling
from ragturbo.bench.models import make_bundle, make_database
from ragturbo.cli import app
from ragturbo.errors import InvalidRequest
from ragturbo.model.bundle import Bundle


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return make_bundle("rehearsal", "cpu", torch.float32).save(tmp_path_factory.mktemp("profile") / "model")


@pytest.fixture(scope="module")
def database_folder(model_folder):
    bundle = Bundle.load(model_folder, device="cpu", dtype=torch.float32)
    make_database(bundle, model_folder.parent / "db", 16)
    return model_folder.parent / "db"


STAGES = {"text", "encode", "adapter", "decode", "vae", "copy"}


def test_a_profile_has_every_stage_in_its_table_and_its_trace(model_folder, database_folder, tmp_path):
    trace = tmp_path / "sub" / "trace.json"
    arguments = ["profile", "--model", str(model_folder), "--database", str(database_folder), "--device", "cpu"]
    result = CliRunner().invoke(app, [*arguments, "--out", str(trace), "--requests", "1", "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout[result.stdout.index("{") :])
    medians = report["median_seconds"]
    assert STAGES | {"check", "tokenize", "search", "gather", "queue", "answer", "total"} == set(medians)
    # Stages follow each other on a CPU: together they are no more than the whole.
    assert sum(seconds for stage, seconds in medians.items() if stage != "total") <= medians["total"]
    names = [event["name"] for event in json.loads(trace.read_text())["traceEvents"]]
    assert set(names) >= STAGES


def test_a_trace_tells_what_lay_beside_the_main_stream(tmp_path):
    def kernel(name: str, start: float, duration: float, stream: int) -> dict[str, object]:
        return {"cat": "kernel", "name": name, "ts": start, "dur": duration, "args": {"stream": stream}}

    events = [
        kernel("text", 0, 10, 7), kernel("conv", 10, 20, 7), kernel("conv", 35, 15, 7),
        # From 25 to 30 beside the first convolution, then alone, and from 35 to 40 beside the second.
        kernel("topk", 25, 7, 9), kernel("gather_rows", 32, 8, 9),
        {"cat": "cpu_op", "name": "aten::conv2d", "ts": 0, "dur": 100},
    ]  # fmt: skip
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": events}))
    found = profiling.summary(path)
    assert found["main stream"] == 7
    main, other = found["streams"][7], found["streams"][9]
    assert (main["operations"], main["busy_us"], main["idle_us"]) == (3, 45, 5)
    assert main["costliest"][0] == {"name": "conv", "calls": 2, "us": 35}
    assert (other["busy_us"], other["beside_main_us"]) == (15, 10)
    path.write_text(json.dumps({"traceEvents": events[-1:]}))
    assert profiling.summary(path) == {}


def test_the_commands_repeat_the_run_and_record_single_kernels():
    commands = profiling.commands(["--model", "my model", "--steps", "2"])
    for line in commands.values():
        assert "ragturbo profile --model 'my model' --steps 2 --range" in line
    assert "--cuda-graph-trace=node" in commands["nsys"] and "--capture-range=cudaProfilerApi" in commands["nsys"]
    for given in (["--requests", "9", "--steps", "2"], ["--requests=9", "--steps", "2"]):
        assert profiling.commands(given)["ncu"].endswith("ragturbo profile --steps 2 --range --requests 1")
    assert "--profile-from-start=off" in commands["ncu"] and "--graph-profiling=node" in commands["ncu"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has ranges")
def test_ranges_need_a_gpu(model_folder):
    result = CliRunner().invoke(app, ["profile", "--model", str(model_folder), "--range"])
    assert isinstance(result.exception, InvalidRequest)


def test_an_output_that_cannot_be_written_is_refused_before_anything_runs(tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(Generator, "from_pretrained", refuse)
    (tmp_path / "a.png").touch()
    for out, words in ((tmp_path, "is a folder; give a file"), (tmp_path / "a.png" / "t.json", "is a file, not a fol")):
        result = CliRunner().invoke(app, ["profile", "--out", str(out)])
        assert isinstance(result.exception, InvalidRequest) and words in str(result.exception)
    for more in ("--steps 9", "--steps 9 --distilled"):
        result = CliRunner().invoke(app, ["profile", *more.split()])
        assert "takes 1 to 4" in str(result.exception)
    result = CliRunner().invoke(app, ["profile", "--steps", "9", "--undistilled"])
    assert "a model was loaded" in str(result.exception)
