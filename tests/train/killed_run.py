"""Run trainers in forked children: one job per line of JSON on stdin; prints the exit codes of its processes.

Line: {"settings": …, "out": …, "world": 1|2, "port": …, "kill_after": seconds|null, "kill_at_sync": n|null}.
kill_after kills every child from outside; kill_at_sync makes the first kill itself at its n-th file sync, which is
within a save.
"""

import json
import logging
import os
import signal
import sys
import time
import traceback

import torch

import ragturbo.train.export  # noqa: F401
import ragturbo.train.ladd
from ragturbo.train import require
from ragturbo.train.config import from_dict

torch.set_num_threads(1)
for name in ("peft", "accelerate", "diffusers", "transformers"):
    require(name)
# Import lazily loaded classes now, so that the children need not.
for name in ("UNet2DConditionModel", "AutoencoderKL", "EulerDiscreteScheduler", "DDPMScheduler"):
    getattr(require("diffusers"), name)
for name in ("CLIPTextModel", "AutoTokenizer", "CLIPTokenizer"):
    getattr(require("transformers"), name)


def child(job, rank):
    if job["world"] > 1:
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(job["world"]), MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(job["port"]), ACCELERATE_USE_CPU="true",
        )  # fmt: skip
    if job.get("kill_at_sync") and rank == 0:
        count, sync = [0], os.fsync

        def counted(fd):
            count[0] += 1
            if count[0] == job["kill_at_sync"]:
                os.kill(os.getpid(), signal.SIGKILL)
            sync(fd)

        os.fsync = counted
    logging.disable(logging.CRITICAL)
    trainer = ragturbo.train.ladd.LADDTrainer(from_dict(job["settings"]), job["out"], device="cpu", resume=True)
    trainer.train()
    if job["world"] > 1:
        torch.distributed.destroy_process_group()


def run(job):
    pids = []
    for rank in range(job["world"]):
        pid = os.fork()
        if pid == 0:
            try:
                child(job, rank)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        pids.append(pid)
    deadline = None if job.get("kill_after") is None else time.monotonic() + job["kill_after"]
    codes = {}
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[pid] = os.waitstatus_to_exitcode(status)
        # If one process of two has ended, the other would wait for it.
        if (deadline and time.monotonic() > deadline) or any(code != 0 for code in codes.values()):
            for pid in pids:
                if pid not in codes:
                    os.kill(pid, signal.SIGKILL)
            deadline = None
        time.sleep(0.005)
    return [codes[pid] for pid in pids]


for line in sys.stdin:
    print(json.dumps(run(json.loads(line))), flush=True)
