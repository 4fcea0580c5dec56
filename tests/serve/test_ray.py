"""The same application on Ray Serve: two replicas on CPUs, one of them killed under load."""

from __future__ import annotations

import base64
import importlib.util
import os
import signal
import socket
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest

from ragturbo.errors import InvalidRequest

if importlib.util.find_spec("ray") is None:
    pytest.skip("ray is not installed: pip install 'ragturbo[ray]'", allow_module_level=True)

PATH = "/v1/images/generations"
EXAMPLE = Path(__file__).parents[2] / "examples" / "serving" / "ray_serve.yaml"
ATTEMPTS = 6
SETTINGS: dict[str, Any] = {"device": "cpu", "timeout": 120, "options": {"batch_sizes": (1,), "log_prompts": False}}


def test_the_application_says_what_a_replica_needs():
    from ragturbo.serve.ray_app import build

    def deployment(**args: Any) -> Any:
        return build(args)._bound_deployment

    gpu = deployment(options={"batch_sizes": (1, 16), "max_queue": 40})
    assert gpu.ray_actor_options["num_gpus"] == 1 and gpu.max_ongoing_requests == 56
    assert gpu._deployment_config.autoscaling_config.target_ongoing_requests == 16
    fixed = deployment(**SETTINGS, num_replicas=2)
    assert "num_gpus" not in fixed.ray_actor_options and fixed.num_replicas == 2
    with pytest.raises(InvalidRequest, match="unknown setting 'colour'"):
        build({"colour": 1})


def test_the_config_file_is_one_that_ray_takes():
    import yaml
    from ray.serve.schema import ServeDeploySchema

    from ragturbo.serve.ray_app import NAME, build

    config = yaml.safe_load(EXAMPLE.read_text("utf-8"))
    [application] = ServeDeploySchema(**config).applications
    assert application.import_path == "ragturbo.serve.ray_app:build"
    assert [d.name for d in application.deployments] == [NAME]
    build(application.args)


@pytest.fixture(scope="module")
def cluster():
    """Two replicas behind Ray's proxy."""
    import ray
    from ray import serve

    from ragturbo.serve.ray_app import build

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Nothing is told to anybody, and no token is left in somebody's home: the cluster is of this machine and this test.
    os.environ["RAY_USAGE_STATS_ENABLED"], os.environ["RAY_AUTH_MODE"] = "0", "disabled"
    # A machine that is busy with other tests is slow to start processes, not broken.
    os.environ["RAY_gcs_server_port_wait_time_s"] = os.environ["RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S"] = "240"
    for attempt in range(ATTEMPTS):
        try:
            ray.init(num_cpus=4, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False)
            break
        except Exception:
            # Ray gives its own processes 30 s to be up, and nobody can change that.
            ray.shutdown()
            if attempt == ATTEMPTS - 1:
                raise
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(build({**SETTINGS, "num_replicas": 2}))
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


def replicas() -> set[int]:
    """Processes of ours, or of daemons we started, that are replicas."""
    found = set()
    for process in psutil.process_iter(["cmdline"]):
        title = " ".join(process.info["cmdline"] or [])
        if title.startswith("ray::ServeReplica"):
            found.add(process.pid)
    return found


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_replica_killed_under_load_costs_no_wrong_answer_and_comes_back(cluster, gen, record_property):
    def ask(seed: int) -> tuple[int, str]:
        body = {"prompt": "a red circle left of a blue square", "seed": seed}
        try:
            answer = httpx.post(cluster + PATH, json=body, timeout=120)
        except httpx.TransportError as error:
            return 0, type(error).__name__
        return answer.status_code, answer.json()["data"][0]["b64_json"] if answer.status_code == 200 else answer.text

    seeds = range(6)
    right = {}
    for seed in seeds:
        status, right[seed] = ask(seed)
        assert status == 200
        here = gen("a red circle left of a blue square", seed=seed).images[0]
        assert np.abs(pixels(right[seed]) - np.asarray(here, int)).max() <= 2
    before = replicas()
    assert len(before) == 2
    outcomes: Counter[str] = Counter()
    stop = threading.Event()

    def client(first: int) -> None:
        seed = first
        while not stop.is_set():
            seed = (seed + 1) % len(seeds)
            status, said = ask(seed)
            outcomes["right" if status == 200 and said == right[seed] else "wrong" if status == 200 else "failed"] += 1

    threads = [threading.Thread(target=client, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    try:
        time.sleep(3)
        victim = sorted(before)[0]
        os.kill(victim, signal.SIGKILL)
        end = time.monotonic() + 480
        # Nobody is told: Ray's own health checks find out and start another, which warms up before it is counted in.
        while not (len(now := replicas()) == 2 and victim not in now):
            assert time.monotonic() < end, f"still {now}, {outcomes}"
            time.sleep(0.5)
        at_return = outcomes["right"]
        while outcomes["right"] < at_return + 20:
            assert time.monotonic() < end, outcomes
            time.sleep(0.5)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    record_property("counted", dict(outcomes))
    assert outcomes["wrong"] == 0 and outcomes["right"] > 20, outcomes
    # What the dead one had in hand, and what was sent to it before it was missed.
    assert outcomes["failed"] < outcomes["right"], outcomes
    assert httpx.get(cluster + "/health/ready", timeout=60).json() == {"status": "ready"}
    answers = {ask(seed)[1] == right[seed] for seed in seeds}
    assert answers == {True}


def pixels(b64: str) -> np.ndarray:
    import io

    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64))), int)
