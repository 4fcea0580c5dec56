"""A small model is loaded on one CPU thread, and nothing else changes."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from ragturbo.model import one_thread
from ragturbo.model.one_thread import on_one_thread


def where() -> tuple[int, threading.Thread]:
    return torch.get_num_threads(), threading.current_thread()


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(one_thread, "SMALL", 100)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_a_small_model_is_loaded_on_one_thread(two_threads: None) -> None:
    count, thread = on_one_thread(where, torch.device("cpu"), [nn.Linear(4, 4)])
    assert count == 1 and thread is not threading.current_thread() and not thread.is_alive()
    seen: list[int] = []
    # Neither this thread nor new ones are affected.
    other = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    other.start()
    other.join()
    assert torch.get_num_threads() == 2 and seen == [2]


def test_an_error_is_raised_in_the_caller(two_threads: None) -> None:
    with pytest.raises(ZeroDivisionError):
        on_one_thread(lambda: 1 // 0, torch.device("cpu"), [nn.Linear(4, 4)])
    assert torch.get_num_threads() == 2


def test_other_models_are_loaded_here(two_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    here = 2, threading.current_thread()
    assert on_one_thread(where, torch.device("cpu"), [nn.Linear(4, 4), nn.Linear(20, 20)]) == here
    assert on_one_thread(where, torch.device("cuda"), [nn.Linear(4, 4)]) == here
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert on_one_thread(where, torch.device("cpu"), [nn.Linear(4, 4)]) == here
