"""One step of a longer run as a process of its own: a time box, a log written as it comes, all children ended."""

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

# Of one step's output: the head goes into the log as it comes, of what exceeds it the tail follows at the end.
LOG_HEAD, LOG_TAIL = 150_000, 50_000
# The lines of a step's output that are shown while it runs.
_SHOWN = ("FAILED", "ERROR", "E   ", "first light:", "gpu:")
MOST_SHOWN = 60
# Seconds that a killed process is waited for.
UNKILLABLE = 10.0


@dataclass(frozen=True)
class Step:
    name: str
    command: list[str]
    box: float
    """Seconds after which it is ended."""
    result: Path | None = None
    """JSON it leaves, complete or not, at any time while it runs."""
    needs: tuple[str, ...] = ()
    """Programs or modules without which it is skipped."""
    environment: dict[str, str] = field(default_factory=dict)


def run(
    step: Step, seconds: float, log: IO[str], *, cwd: Path, poll: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Runs a step for at most its box and `seconds`; what it prints goes to `log`. poll: called every second meanwhile.

    Returns outcome ("done", "failed with N", "killed by signal N", "out of time", "skipped: why"), wall_s, box_s and,
    of a step that did not finish, the last lines of its output as tail.
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
        # Also after a step that ended: children that it left would run beside the next one. And where this process is
        # interrupted: the step has a session of its own, which Ctrl-C does not reach.
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    try:
        process.wait(UNKILLABLE)
    except subprocess.TimeoutExpired:
        # Inside a driver call that does not return: the other steps do not wait for it.
        log.write(f"\n[{step.name} was killed {UNKILLABLE:.0f} s ago and has not ended]\n")
    # A grandchild that left the process group may hold the pipe open for ever.
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
