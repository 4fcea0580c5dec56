"""`ragturbo serve` in its own process, from start to SIGTERM."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from ragturbo import Database
from ragturbo.model import source

MAIN = "from ragturbo.cli import main; main()"
# A model that never finishes loading, and a SIGHUP before the server has started.
STUCK = """
import os, signal, threading
import ragturbo.serve.server, ragturbo.serve.service
bind = ragturbo.serve.server.bind
def late(*where):
    os.kill(os.getpid(), signal.SIGHUP)
    return bind(*where)
ragturbo.serve.server.bind = late
ragturbo.serve.service.Service.load = lambda self: threading.Event().wait()
"""
PATH = "/v1/images/generations"
SECRET = "a unicorn nobody may read about"


@contextlib.contextmanager
def started(*arguments: object, code: str = MAIN, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Start the command and yield the process and its URL once it listens, long before it is ready."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, "serve", "--port", "0", *map(str, arguments)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if "listening on 127.0.0.1 port" in line:
                yield process, f"http://127.0.0.1:{line.split()[-1]}"
                break
        else:
            yield process, ""
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


@pytest.fixture(scope="module")
def database(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("db") / "database"
    shutil.copytree(Path(str(source.resolve("shapes"))) / "database", folder)
    return folder


def test_a_life_from_loading_to_sigterm(database, kit):
    with started(
        "--database", database, "--drain-delay", 2, "--timeout", 250, "--body-timeout", 250, RAGTURBO_API_KEYS="key"
    ) as (
        process,
        url,
    ):
        http = httpx.Client(base_url=url, timeout=300, headers={"Authorization": "Bearer key"})
        # While loading it is alive but not ready.
        assert http.get("/health/live").json() == {"status": "loading"}
        early = http.post(PATH, json={"prompt": SECRET})
        assert early.status_code == 503 and early.json()["error"]["code"] == "loading"
        assert int(early.headers["retry-after"]) >= 1
        kit.until(lambda: http.get("/health/ready").status_code == 200, "readiness", 300)
        body = {"prompt": SECRET, "mode": "slerp", "return_neighbors": True, "seed": 1}
        assert http.post(PATH, json=body).status_code == 200
        assert httpx.post(f"{url}{PATH}", json=body).status_code == 401

        generation = kit.metrics(url)["ragturbo_database_generation"]
        changed = Database.open(database)
        gone = http.post(PATH, json=body).json()["data"][0]["neighbors"][0]["id"]
        changed.remove([gone])
        process.send_signal(signal.SIGHUP)
        kit.until(lambda: kit.metrics(url)["ragturbo_database_generation"] > generation, "the next generation")
        assert gone not in [n["id"] for n in http.post(PATH, json=body).json()["data"][0]["neighbors"]]

        def several() -> int:
            return http.post(PATH, json=body | {"n": 10}).status_code

        def under_way() -> bool:
            return "ragturbo_in_flight 6.0" in http.get("/metrics").text

        with ThreadPoolExecutor(6) as threads:
            answers = [threads.submit(several) for _ in range(6)]
            kit.until(under_way, "six requests under way")
            process.send_signal(signal.SIGTERM)
            kit.until(lambda: http.get("/health/ready").json() == {"status": "draining"}, "readiness off")
        assert [answer.result() for answer in answers] == [200] * 6
        assert process.wait(120) == 0
        said = process.stderr.read()
    assert "unicorn" not in said and "draining" in said and "Traceback" not in said


def test_a_model_that_is_not_there_is_said_once_and_before_listening(tmp_path):
    command = [sys.executable, "-c", MAIN, "serve", "--port", "0", "--model", str(tmp_path / "nowhere")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 3 and done.stderr.count("there is no folder") == 1 and "listening" not in done.stderr


def test_a_model_that_cannot_be_loaded_ends_the_process_with_its_code(tiny_sd21, tmp_path):
    folder = shutil.copytree(tiny_sd21, tmp_path / "broken")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with started("--model", folder) as (process, _):
        assert process.wait(120) == 3
        assert "not a complete safetensors file" in process.stderr.read()


def test_sigterm_does_not_wait_for_a_model_that_loads_and_sighup_kills_nobody():
    with started("--drain-delay", 600, code=STUCK + MAIN) as (process, url):
        process.send_signal(signal.SIGHUP)
        assert httpx.get(f"{url}/health/live").json() == {"status": "loading"}
        assert httpx.get(f"{url}/v1/models").status_code == 200
        # The body is not parsed.
        assert httpx.post(f"{url}{PATH}", content=b"{").status_code == 503
        # What is not HTTP is answered in OpenAI's form too.
        assert httpx.request("WRONG", f"{url}{PATH}").json()["error"]["code"] == "invalid_http"
        process.send_signal(signal.SIGTERM)
        assert process.wait(300) == 0
        assert "Traceback" not in process.stderr.read()


@pytest.mark.parametrize(
    ("flags", "said"),
    [((), "None False"), (("--undistilled", "--lenient"), "False True"), (("--distilled",), "True False")],
)
def test_the_command_line_says_whether_the_model_is_distilled_and_the_server_lenient(flags, said):
    code = "import ragturbo.serve.server as s; s.serve = lambda config: print(config.distilled, config.lenient); "
    command = [sys.executable, "-c", code + MAIN, "serve", *flags]
    assert subprocess.run(command, capture_output=True, text=True, timeout=300).stdout.strip() == said


def test_a_port_that_is_taken_ends_the_process_before_anything_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with started("--port", taken.getsockname()[1], code=STUCK + MAIN) as (process, _):
            assert process.wait(300) == 2


@pytest.mark.slow
def test_the_load_generator_measures_a_real_server(tmp_path):
    """benchmarks/serve_load.py with one second per load writes a complete record."""
    script = Path(__file__).parents[2] / "benchmarks" / "serve_load.py"
    out = tmp_path / "serve.json"
    sizes = ["--seconds", "1", "--warm", "0.5", "--capacity-seconds", "1", "--pairs", "0", "--shares", "0.5", "3"]
    done = subprocess.run(
        [sys.executable, script, "--out", out, "--log", tmp_path / "log", *sizes],
        capture_output=True,
        text=True,
        timeout=500,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
    assert record["kind"] == "serve" and record["context"]["cores"] and record["capacity_images_per_s"] > 0
    assert [(load["share"], load["deadline_s"]) for load in record["loads"]] == [(0.5, 5.0), (3.0, 5.0), (3.0, 0.6)]
    assert record["metrics_short"]["ragturbo_in_flight"] == 0 and record["exit_code_after_sigterm"] == 0
    for load in record["loads"]:
        assert load["requests"] == load["accepted"] + load["rejected"] + sum(load["other"].values())
        over = load["rejected_over_20_ms"]
        assert load["rejected"] >= over["from_intended"] == len(over["each"]) >= over["from_sending"]
        assert load["accepted"] > 0 and load["memory_bytes"][0] > 0 and load["open_files"][0] > 0
