"""The application on Ray Serve: a full replica, and two replicas of which one is killed under load."""

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
    pytest.skip("ray is not installed: pip install -e '.[ray]'", allow_module_level=True)

PATH = "/v1/images/generations"
EXAMPLE = Path(__file__).parents[2] / "examples" / "serving" / "ray_serve.yaml"
PROMPT = "a red circle left of a blue square"
ATTEMPTS = 6
CLIENTS = 4
SETTINGS: dict[str, Any] = {"device": "cpu", "timeout": 120, "options": {"batch_sizes": (1,), "log_prompts": False}}


def test_the_application_says_what_a_replica_needs():
    from ragturbo.serve.ray_app import build

    def deployment(**args: Any) -> Any:
        return build(args)._bound_deployment

    gpu = deployment(options={"batch_sizes": (1, 16), "max_queue": 40})
    assert gpu.ray_actor_options["num_gpus"] == 1 and gpu.max_queued_requests > 10 * 56
    # Far above the 56 that a replica holds, so that the replica refuses instead of Ray's router queueing.
    assert gpu.max_ongoing_requests > 10 * 56
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
    """Start Ray with its HTTP proxy and no application."""
    import ray
    from ray import serve

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # No usage reports, and no authentication token in the home directory: the cluster is local to this test.
    os.environ["RAY_USAGE_STATS_ENABLED"], os.environ["RAY_AUTH_MODE"] = "0", "disabled"
    # A machine that is busy with other tests starts processes slowly.
    os.environ["RAY_gcs_server_port_wait_time_s"] = os.environ["RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S"] = "240"
    for attempt in range(ATTEMPTS):
        try:
            ray.init(num_cpus=4, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False)
            break
        except Exception:
            # Ray gives its processes 30 s to start, which cannot be configured.
            ray.shutdown()
            if attempt == ATTEMPTS - 1:
                raise
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


def replicas() -> set[int]:
    """Return the process ids of all replicas."""
    found = set()
    for process in psutil.process_iter(["cmdline"]):
        title = " ".join(process.info["cmdline"] or [])
        if title.startswith("ray::ServeReplica"):
            found.add(process.pid)
    return found


def running() -> int:
    """Return the number of replicas that are warm and receive requests."""
    from ray import serve

    from ragturbo.serve.ray_app import NAME

    found = serve.status().applications["default"].deployments[NAME].replica_states
    return found.get("RUNNING", 0)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_replica_that_is_full_refuses_by_itself_and_draws_the_rest_right(cluster, gen, record_property):
    """Sixteen clients use one replica that holds three requests."""
    from ray import serve

    from ragturbo.serve.ray_app import build

    small = {**SETTINGS["options"], "max_queue": 2}
    # Mounted below a path, where API keys are required too.
    serve.run(
        build({**SETTINGS, "options": small, "api_keys": ("key",), "num_replicas": 1}),
        name="full",
        route_prefix="/full",
    )
    url, headers = f"{cluster}/full{PATH}", {"Authorization": "Bearer key"}
    right = [np.asarray(gen(PROMPT, seed=seed).images[0], int) for seed in range(6)]
    outcomes: Counter[str] = Counter()

    def client(first: int) -> None:
        for i in range(20):
            seed = (first + i) % len(right)
            answer = httpx.post(url, json={"prompt": PROMPT, "seed": seed}, headers=headers, timeout=120)
            if answer.status_code == 200:
                error = np.abs(pixels(answer.json()["data"][0]["b64_json"]) - right[seed]).max()
                outcomes["right" if error <= 2 else "wrong"] += 1
            else:
                ours = answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1
                ours = ours and answer.json()["error"]["code"] == "queue_full"
                outcomes["refused" if ours else str(answer.status_code)] += 1

    try:
        assert httpx.post(url, json={"prompt": PROMPT}, timeout=120).status_code == 401
        threads = [threading.Thread(target=client, args=(i,)) for i in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        serve.delete("full")
    record_property("counted", dict(outcomes))
    assert set(outcomes) == {"right", "refused"} and outcomes.total() == 320, outcomes


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_replica_killed_under_load_costs_no_wrong_answer_and_comes_back(cluster, gen, record_property):
    from ray import serve

    from ragturbo.serve.ray_app import build

    serve.run(build({**SETTINGS, "num_replicas": 2}))

    def ask(seed: int) -> tuple[int, str]:
        body = {"prompt": PROMPT, "seed": seed}
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
        here = gen(PROMPT, seed=seed).images[0]
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

    threads = [threading.Thread(target=client, args=(i,)) for i in range(CLIENTS)]
    for thread in threads:
        thread.start()
    try:
        time.sleep(3)
        victim = sorted(before)[0]
        os.kill(victim, signal.SIGKILL)
        end = time.monotonic() + 480
        # Ray's health checks notice and start another replica, which is counted once it is warm.
        while not (len(now := replicas()) == 2 and victim not in now and running() == 2):
            assert time.monotonic() < end, f"still {now}, {running()} running, {outcomes}"
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
    # Per client: one request in flight when the replica died, and one more before the router noticed.
    assert outcomes["failed"] <= 2 * CLIENTS, outcomes
    assert httpx.get(cluster + "/health/ready", timeout=60).json() == {"status": "ready"}
    answers = {ask(seed)[1] == right[seed] for seed in seeds}
    assert answers == {True}


def pixels(b64: str) -> np.ndarray:
    import io

    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64))), int)
