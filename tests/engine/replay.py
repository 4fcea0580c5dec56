"""A CUDA graph without a GPU: the operations of a step are recorded once, and replayed.

As in a graph, a replay runs no line of Python: it repeats the same operations on the same memory, and everything that
the host decided or read while recording stays as it was. A value that a step reads from the host instead of from the
arenas is stale in the next replay, and the result is wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ragturbo.engine import graph_segments
from ragturbo.engine.recorder import Uncaptured

# `ragturbo.ops` has functions of the same names.
gather, search = import_module("ragturbo.ops.gather_rows"), import_module("ragturbo.ops.topk")


# The CPU references read a table's address and count on the host, where GPU kernels read them: recorded as one op.
@torch.library.custom_op("ragturbo_tests::gather_rows", mutates_args=())
def _gather(descriptor: Tensor, ids: Tensor, row_bytes: int, tokens: int, channels: int, stored: str) -> Tensor:
    return gather.reference(gather.Rows(descriptor, row_bytes, tokens, channels, stored), ids)


@torch.library.custom_op("ragturbo_tests::topk", mutates_args=())
def _topk(keys: Tensor, query: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return search.reference(keys, query, k)


class _Log(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        # The outputs are held: on a GPU, the graph's pool holds their memory.
        self.done.append((func, args, kwargs or {}, [t for t in tree_leaves(out) if isinstance(t, Tensor)]))
        return out


class Replayed(Uncaptured):
    """A recorder. `before(label)` is called at each replay, and may raise instead of the graph."""

    name = "replayed operations"

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__()
        patch.setattr(graph_segments, "gather_rows", lambda rows, ids: _gather(*rows[:1], ids, *rows[1:]))
        patch.setattr(graph_segments, "topk", _topk)
        self.before: Callable[[str], None] = lambda label: None

    def record(self, label: str, step: Callable[[], None], *, on_retrieval: bool = False) -> Any:
        step()
        with _Log() as log:
            step()
        return _Replay(self, label, log.done)


class _Replay:
    def __init__(self, recorder: Replayed, label: str, done: list[Any]) -> None:
        self._recorder, self._label, self._done = recorder, label, done

    def replay(self) -> None:
        self._recorder.before(self._label)
        for func, args, kwargs, recorded in self._done:
            out = func(*args, **kwargs)
            for old, new in zip(recorded, (t for t in tree_leaves(out) if isinstance(t, Tensor)), strict=True):
                # A view keeps its memory; a new tensor (also of a `reshape` or a `to` that had to copy) is copied to
                # the memory of the recorded one.
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)

    def seconds(self) -> dict[str, float]:
        return {}
