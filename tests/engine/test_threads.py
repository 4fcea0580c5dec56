"""CPU threads: a small model's device thread uses one, and the number of all other threads is unchanged."""

from __future__ import annotations

import threading

import pytest
import torch

from ragturbo import Generator
from ragturbo.engine import threads


@pytest.fixture
def two_threads(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def in_a_new_thread() -> int:
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return found[0]


def test_a_small_models_device_thread_computes_alone_and_the_callers_threads_stay(two_threads, model_folder):
    with Generator.from_pretrained(model_folder, device="cpu") as gen:
        assert gen.info["threads"] == gen._executor.call(torch.get_num_threads) == 1
        assert torch.get_num_threads() == in_a_new_thread() == 2
        gen("a red circle", seed=1)
        assert gen._executor.call(torch.get_num_threads) == 1
        assert torch.get_num_threads() == in_a_new_thread() == 2


def test_a_large_model_and_an_environment_that_says_how_many_are_left_alone(two_threads, model_folder, monkeypatch):
    monkeypatch.setattr(threads, "SMALL", 1000)
    with Generator.from_pretrained(model_folder, device="cpu") as gen:
        assert gen.info["threads"] == gen._executor.call(torch.get_num_threads) == 2
    monkeypatch.undo()
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    with Generator.from_pretrained(model_folder, device="cpu") as gen:
        assert gen.info["threads"] == gen._executor.call(torch.get_num_threads) == 2
