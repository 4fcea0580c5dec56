"""Run a step as a process with a time limit, log its output, and kill its children."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

# Characters of a step's output that are logged: the head as it comes, and the tail at the end.
LOG_HEAD, LOG_TAIL = 150_000, 50_000
# Beginnings of the output lines that are also printed.
_SHOWN = ("FAILED", "ERROR", "E   ", "first light:", "gpu:")
MOST_SHOWN = 60
# Seconds to wait for a killed process.
UNKILLABLE = 10.0


@dataclass(frozen=True)
class Step:
    """
    Args:
        box: time limit in seconds.
        result: the JSON file or folder that the step updates while it runs.
        needs: programs or modules without which the step is skipped.
    """

    name: str
    command: list[str]
    box: float
    result: Path | None = None
    needs: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)


def run(
    step: Step, seconds: float, log: IO[str], *, cwd: Path, poll: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Run a step for at most its time limit and `seconds`.

    Args:
        log: receives the output.
        poll: called every second while the step runs.

    Returns:
        "outcome" ("done", "failed with N", "killed by signal N", "out of time" or "skipped: reason"), "wall_s", "box_s"
        and, if the step did not succeed, the end of its output as "tail".
    """
    for need in step.needs:
        if shutil.which(need) is None and (not need.isidentifier() or importlib.util.find_spec(need) is None):
            return {"outcome": f"skipped: {need} is not installed"}
    box = min(step.box, seconds)
    if box < min(5.0, step.box):
        return {"outcome": "skipped: the run's time is used up"}
    start = time.monotonic()
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **step.environment}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(cwd), os.environ.get("PYTHONPATH")]))
    log.write(f"\n===== {step.name}\n")
    process = subprocess.Popen(
        step.command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=cwd, env=environment,
        start_new_session=True, text=True, errors="replace",
    )  # fmt: skip
    tail: deque[str] = deque()
    reader = threading.Thread(target=_read, args=(process.stdout, log, tail), daemon=True)
    reader.start()
    code: int | None = None
    try:
        while code is None and time.monotonic() - start < box:
            try:
                code = process.wait(min(1.0, max(0.01, box - (time.monotonic() - start))))
            except subprocess.TimeoutExpired:
                poll()
    finally:
        # Also after success, when children may be left, and on an interrupt, which does not reach the step's session.
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    try:
        process.wait(UNKILLABLE)
    except subprocess.TimeoutExpired:
        # For example in a driver call that does not return.
        log.write(f"\n[{step.name} was killed {UNKILLABLE:.0f} s ago and has not ended]\n")
    # A grandchild in another process group may keep the pipe open.
    reader.join(5.0)
    found: dict[str, Any] = {"outcome": _outcome(code), "wall_s": round(time.monotonic() - start, 2), "box_s": box}
    if code != 0:
        found["tail"] = "".join(tail)[-4000:]
    return found


def _outcome(code: int | None) -> str:
    if code is None:
        return "out of time"
    return "done" if code == 0 else f"failed with {code}" if code > 0 else f"killed by signal {-code}"


def _read(pipe: IO[str], log: IO[str], tail: deque[str]) -> None:
    written = shown = kept = 0
    for line in pipe:
        tail.append(line)
        kept += len(line)
        while kept > LOG_TAIL and len(tail) > 1:
            kept -= len(tail.popleft())
        if written < LOG_HEAD:
            log.write(line)
            log.flush()
        written += len(line)
        if line.startswith(_SHOWN) and shown < MOST_SHOWN:
            sys.stdout.write(line[:300].rstrip() + "\n")
            sys.stdout.flush()
            shown += 1
    if written > LOG_HEAD:
        log.write(f"\n[… of {written} characters the last:]\n" + "".join(tail))
        log.flush()
