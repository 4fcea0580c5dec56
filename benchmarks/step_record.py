"""The results of a GPU step, written after every phase so that a killed process keeps the finished phases."""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ragturbo.machine import NOISE_LIMIT, gpu_state, throttled

NOT_COMPARED = "not compared with a reference"


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write atomically: a reader sees the old or the new file."""
    part = path.with_name(f"{path.name}.{os.getpid()}")
    part.write_text(json.dumps(record, default=str), "utf-8")
    os.replace(part, path)


class StepRecord:
    """Figures by budget key, and whether they are verified.

    A figure is "measured" after `verify` was called without a reason, and "unverified" before or if the comparison
    failed: it is then stored with the reason, and no budget uses it. After `withhold` there are no figures, because
    something other than the requested engine ran.
    """

    def __init__(self, out: Path | None = None, *, has_gpu: bool = True) -> None:
        self._out, self._has_gpu = out, has_gpu
        self._figures: dict[str, float] = {}
        self._doubts: dict[str, str | None] = {}
        self._doubt: str | None = NOT_COMPARED
        self._withheld: str | None = None
        self._states: list[Any] = []
        self._flags: list[str] = []
        self._noise: dict[str, float] = {}
        self._phases: dict[str, float] = {}
        self._errors: dict[str, str] = {}
        self._details: dict[str, Any] = {}

    def look(self) -> None:
        """Record the GPU's clocks and throttling; call it between measurements."""
        if self._has_gpu:
            self._states.append(gpu_state())

    def verify(self, why: str | None, keys: Sequence[str] = ()) -> None:
        """Set the result of the comparison with the reference.

        Args:
            why: what is wrong, or None if the results agree.
            keys: the budgets it applies to; by default all that have none of their own.
        """
        if keys:
            self._doubts |= dict.fromkeys(keys, why)
        else:
            self._doubt = why

    def withhold(self, why: str | None) -> None:
        """Drop all figures. why: what ran instead of what was requested; None changes nothing."""
        self._withheld = self._withheld or why

    def save(self, *, figures: dict[str, float] | None = None, noise: dict[str, float] | None = None,
             flags: Sequence[str] = (), **details: Any) -> None:  # fmt: skip
        """Add to the record and write it."""
        self._figures |= figures or {}
        self._noise |= noise or {}
        self._flags += flags
        self._details |= details
        if self._out is not None:
            write_json(self._out, self.to_dict())

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Run a part of a step; an exception is printed and recorded, and the step continues."""
        start = time.perf_counter()
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self._errors[name] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        self._phases[name] = time.perf_counter() - start
        self.save()

    def to_dict(self) -> dict[str, Any]:
        why = {key: self._doubts.get(key, self._doubt) for key in self._figures}
        found: dict[str, Any] = {
            "measured": {k: v for k, v in self._figures.items() if why[k] is None and self._withheld is None},
            **self._details,
            "noise": self._noise,
            "gpu_states": self._states,
            "phases": self._phases,
        }
        if self._withheld is not None:
            found["withheld"] = self._withheld
        elif unverified := {k: v for k, v in self._figures.items() if why[k] is not None}:
            found["unverified"] = unverified
            found["unverified_because"] = {key: why[key] for key in unverified}
        if self._errors:
            found["errors"] = self._errors
        flags = [*self._flags, *(f"throttled: {reason}" for reason in throttled(self._states))]
        flags += [f"noise {share:.1%} ({row})" for row, share in self._noise.items() if share > NOISE_LIMIT]
        return {**found, "flags": flags}
