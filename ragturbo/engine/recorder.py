"""How a segment (a function over fixed buffers) runs: recorded as a CUDA graph and replayed, or called each time.

There is a main stream and a retrieval stream, which runs beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import torch

from ragturbo.engine.timings import StageClock


class Program(Protocol):
    """A recorded segment."""

    def replay(self) -> None: ...

    def seconds(self) -> dict[str, float]:
        """By stage, of the last replay. Call after waiting for it."""
        ...


class Recorder(Protocol):
    name: str

    def record(self, label: str, segment: Callable[[], None], *, on_retrieval: bool = False) -> Program:
        """on_retrieval: replay on the retrieval stream instead of the main one."""
        ...

    # Inside a segment

    def stage(self, name: str) -> Any:
        """A context manager: time in it is reported under this name."""
        ...

    def fork(self) -> Any:
        """A context manager: work in it runs on the retrieval stream, beside what follows it, until `join`.

        Tensors used on both streams must stay referenced until the join; the allocator would reuse their memory.
        """
        ...

    def join(self) -> None: ...

    # On the host, around replays

    def main_stream(self) -> Any:
        """A context manager: device work in it goes to the main stream."""
        ...

    def retrieval_stream(self) -> Any: ...

    def mark_main(self) -> None:
        """Mark the current end of the main stream, for `wait_for_mark`."""
        ...

    def wait_for_mark(self) -> None:
        """Block the host until the main stream reaches the mark, without waiting for later replays."""
        ...

    def wait_for_main(self) -> None:
        """Block the host until the main stream is idle."""
        ...

    def main_after_retrieval(self) -> None:
        """Make the main stream wait, on the device, for the retrieval stream."""
        ...

    def synchronize_default(self) -> None:
        """Block the host until work outside both streams has finished, such as copies of weights and keys."""
        ...


class Uncaptured:
    """Segments are called at each replay: on a CPU, and on a GPU to debug or to compare with replays."""

    name = "none: segments are called"

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self._clock = StageClock(self._device)

    def record(self, label: str, segment: Callable[[], None], *, on_retrieval: bool = False) -> Program:
        return _Called(self, segment)

    def stage(self, name: str) -> Any:
        return self._clock.stage(name)

    @contextmanager
    def fork(self) -> Iterator[None]:
        yield

    def join(self) -> None: ...

    def main_stream(self) -> Any:
        return nullcontext()

    def retrieval_stream(self) -> Any:
        return nullcontext()

    def mark_main(self) -> None: ...

    def wait_for_mark(self) -> None:
        self.wait_for_main()

    def wait_for_main(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def main_after_retrieval(self) -> None: ...

    def synchronize_default(self) -> None: ...


class _Called:
    def __init__(self, recorder: Uncaptured, segment: Callable[[], None]) -> None:
        self._recorder, self._segment = recorder, segment
        self._clock = recorder._clock

    def replay(self) -> None:
        recorder = self._recorder
        recorder._clock = self._clock = StageClock(recorder._device)
        # Events and streams are created on the current device, which may not be the model's.
        with torch.cuda.device(recorder._device) if recorder._device.type == "cuda" else nullcontext():
            self._segment()

    def seconds(self) -> dict[str, float]:
        return self._clock.seconds()
