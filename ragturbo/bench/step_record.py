"""What a GPU step has found so far, on disk after every phase: a process that is killed loses one phase, not a step."""

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
    """Whoever reads finds the old record or the new one, never half of one."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(record, default=str), "utf-8")
    os.replace(part, path)


class StepRecord:
    """Figures by budget key, and whether they may be judged.

    A figure is "measured" once `verify` has said that its step computes the right thing. Until then, and where the
    comparison failed, it is "unverified": its value is kept beside the reason and no budget sees it. After `refuse`
    there is no figure at all, because something else than what was asked for ran.
    """

    def __init__(self, out: Path | None = None, *, has_gpu: bool = True) -> None:
        self._out, self._has_gpu = out, has_gpu
        self._figures: dict[str, float] = {}
        self._doubts: dict[str, str | None] = {}
        self._doubt: str | None = NOT_COMPARED
        self._refusal: str | None = None
        self._states: list[Any] = []
        self._flags: list[str] = []
        self._noise: dict[str, float] = {}
        self._phases: dict[str, float] = {}
        self._errors: dict[str, str] = {}
        self._details: dict[str, Any] = {}

    def look(self) -> None:
        """Asks for the card's state: beside a measurement, never within one."""
        if self._has_gpu:
            self._states.append(gpu_state())

    def verify(self, why: str | None, keys: Sequence[str] = ()) -> None:
        """why: what is wrong with the results that the figures are times of, None where they agree with the
        reference's. keys: the budgets it is said of; all without one of their own if empty."""
        if keys:
            self._doubts |= dict.fromkeys(keys, why)
        else:
            self._doubt = why

    def refuse(self, why: str | None) -> None:
        """why: what ran in place of what was asked for; None changes nothing."""
        self._refusal = self._refusal or why

    def save(self, *, figures: dict[str, float] | None = None, noise: dict[str, float] | None = None,
             flags: Sequence[str] = (), **details: Any) -> None:  # fmt: skip
        """Adds to the record and writes it."""
        self._figures |= figures or {}
        self._noise |= noise or {}
        self._flags += flags
        self._details |= details
        if self._out is not None:
            write_json(self._out, self.to_dict())

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A part of a step whose failure must not cost the others: it is printed, kept by its name, and passed over."""
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
            "measured": {k: v for k, v in self._figures.items() if why[k] is None and self._refusal is None},
            **self._details,
            "noise": self._noise,
            "gpu_states": self._states,
            "phases": self._phases,
        }
        if self._refusal is not None:
            found["withheld"] = self._refusal
        elif unverified := {k: v for k, v in self._figures.items() if why[k] is not None}:
            found["unverified"] = unverified
            found["unverified_because"] = {key: why[key] for key in unverified}
        if self._errors:
            found["errors"] = self._errors
        flags = [*self._flags, *(f"throttled: {reason}" for reason in throttled(self._states))]
        flags += [f"noise {share:.1%} ({row})" for row, share in self._noise.items() if share > NOISE_LIMIT]
        return {**found, "flags": flags}
