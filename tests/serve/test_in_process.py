"""A Generator inside another service: asyncio, threads, pre-fork servers."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from ragturbo.errors import DeadlineExceeded, Overloaded

PROMPT = "a red circle left of a blue square"


def test_many_futures_of_files_finish_at_once(gen, kit):
    """Finishing a future encodes its images. If one small pool did both, they would deadlock."""
    with kit.occupied(gen):
        futures = [gen.submit(PROMPT, seed=i, num_images_per_prompt=2, output_type="png") for i in range(8)]
    assert all(len(future.result(60).images) == 2 for future in futures)


def test_a_task_cancelled_while_its_prompt_is_read_leaves_nothing_in_the_queue(gen, kit, monkeypatch):
    entered, leave, submit = threading.Event(), threading.Event(), gen._submit

    def slowly(*arguments, **options):
        entered.set()
        assert leave.wait(60)
        return submit(*arguments, **options)

    async def run() -> None:
        task = asyncio.ensure_future(gen.agenerate(PROMPT))
        await asyncio.to_thread(entered.wait, 60)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        # The thread that tokenises cannot be stopped: the request is cancelled once it is queued.
        leave.set()
        await asyncio.to_thread(kit.until, lambda: gen.stats()["cancelled"] > cancelled, "a cancellation")

    with kit.occupied(gen):
        cancelled = gen.stats()["cancelled"]
        monkeypatch.setattr(gen, "_submit", slowly)
        asyncio.run(run())
        assert gen.stats()["waiting"] == 0


def test_a_timeout_is_kept_while_the_device_is_busy_with_something_else(gen, kit):
    async def run() -> None:
        with pytest.raises(DeadlineExceeded, match="timeout=0.1"):
            await gen.agenerate(PROMPT, timeout=0.1)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(gen.agenerate(PROMPT), 0.1)
        # Neither occupies the queue any more.
        await asyncio.to_thread(kit.until, lambda: gen.stats()["waiting"] == 0, "an empty queue")

    with kit.occupied(gen):
        asyncio.run(run())


def test_tasks_cancelled_at_random_disturb_no_other(gen, rng):
    outcomes = []

    async def one(i: int, patience: float) -> None:
        try:
            out = await asyncio.wait_for(gen.agenerate(PROMPT, seed=i, output_type="png"), patience)
            outcomes.append(out.seeds == [i] and len(out.images) == 1)
        except asyncio.TimeoutError:
            outcomes.append(None)

    async def run() -> None:
        for i in range(12):
            # Rounds of eight, the size of the queue; half of them time out.
            await asyncio.gather(*(one(8 * i + j, 60 if j % 2 else 0.3 * rng.random()) for j in range(8)))

    asyncio.run(run())
    assert len(outcomes) == 96 and False not in outcomes and outcomes.count(True) >= 48
    assert gen.stats()["waiting"] == 0 and gen.healthy


def test_threads_share_one_generator_and_its_queue_is_the_limit(gen, kit):
    same = gen([PROMPT] * 8, seed=5, output_type="uint8").images

    with ThreadPoolExecutor(16) as threads:
        with kit.occupied(gen):
            calls = [threads.submit(gen, PROMPT, seed=5 + i, output_type="uint8") for i in range(8)]
            kit.until(lambda: gen.stats()["waiting"] == 8, "eight in the queue")
            with pytest.raises(Overloaded) as refused:
                gen(PROMPT)
            assert refused.value.reason == "queue_full"
        outputs = [call.result(60) for call in calls]
    # All eight ran in the bucket of eight, so they have the same bytes as one call with eight prompts.
    assert {out.bucket for out in outputs} == {8}
    assert len({out.images.tobytes() for out in outputs}) == 8 and len(same) == 8
    again = gen([PROMPT] * 8, seed=list(range(5, 13)), output_type="uint8").images
    assert all((out.images[0] == row).all() for out, row in zip(outputs, again, strict=True))


def test_a_queue_too_long_for_a_deadline_refuses_at_once(gen, kit):
    for i in range(9):
        gen([PROMPT] * 8, seed=i)
    pace = gen.expected_wait(8)
    assert pace > 0
    with kit.occupied(gen):
        waiting = [gen.submit([PROMPT] * 8, seed=i) for i in range(4)]
        assert gen.expected_wait(8) > 4 * pace
        with pytest.raises(Overloaded) as refused:
            gen(PROMPT, timeout=2 * pace)
        assert refused.value.reason == "deadline" and refused.value.retry_after > 0
        patient = gen.submit(PROMPT, timeout=300)
    assert all(future.result(60).images for future in [*waiting, patient])
    # With an empty queue a request is accepted regardless of the pace.
    gen.check_room(8, timeout=1e-9)


# What gunicorn does: bind, import, fork, then load.
PREFORK = """
import os, signal, socket, sys
import uvicorn
import ragturbo.model.bundle, ragturbo.engine.build
from ragturbo.serve.app import create_app
from ragturbo.serve.config import ServeConfig

listening = socket.socket(fileno=int(sys.argv[1]))
workers = []
for _ in range(2):
    pid = os.fork()
    if pid == 0:
        app = create_app(ServeConfig(model=sys.argv[2], options={"batch_sizes": (1,)}), background=False)
        app.add_api_route("/pid", lambda: os.getpid())
        uvicorn.Server(uvicorn.Config(app, log_config=None)).run([listening])
        os._exit(0)
    workers.append(pid)
signal.signal(signal.SIGTERM, lambda *_: [os.kill(pid, signal.SIGTERM) for pid in workers])
for pid in workers:
    os.waitpid(pid, 0)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_pre_fork_server_loads_one_generator_a_worker(tiny_sd21):
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        command = [sys.executable, "-W", "ignore", "-c", PREFORK, str(listening.fileno()), str(tiny_sd21)]
        parent = subprocess.Popen(command, pass_fds=[listening.fileno()])
        try:
            images, pids = set(), set()
            for _ in range(200):
                # A new connection for each request, accepted by either worker.
                pids.add(httpx.get(f"{url}/pid", timeout=300).json())
                answer = httpx.post(f"{url}/v1/images/generations", json={"prompt": "a dog", "seed": 1}, timeout=300)
                images.add(answer.json()["data"][0]["b64_json"])
                if len(pids) == 2:
                    break
        finally:
            parent.terminate()
            parent.wait(120)
    assert len(pids) == 2 and len(images) == 1
