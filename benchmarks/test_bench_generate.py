"""Latency from prompt to uint8 images on the host. Prompts and seeds differ from call to call."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.diffusers_peer import Diffusers, agreement
from benchmarks.overhead import by_hand, pairs
from ragturbo.bench.agreement import disagreement, engine_mismatch, latent_agreement
from ragturbo.bench.prompts import prompts

WORDS = prompts(128)
MODES = ("none", "slerp", "adapter")


def calls(gen: Any, batch: int, **options: Any) -> Any:
    """Return a call that uses other prompts and seeds each time."""
    turn = itertools.count()

    def call() -> Any:
        i = next(turn)
        words = [WORDS[(i * batch + j) % len(WORDS)] for j in range(batch)]
        return gen(words, seed=[i * batch + j for j in range(batch)], output_type="uint8", **options)

    return call


def peer_calls(peer: Diffusers) -> Any:
    turn = itertools.count()

    def call() -> Any:
        i = next(turn)
        return (peer([WORDS[i % len(WORDS)]], [i]) * 255).round().astype("uint8")

    return call


def draw(gen: Any) -> Any:
    return lambda words, seeds, output: gen(words, seed=seeds, mode="none", output_type=output).images


def verify(gen: Any, bundle: Any, mode: str) -> None:
    """Compare mode "none" with diffusers, and the other modes with plain torch."""
    found = (
        agreement(draw(gen), Diffusers(bundle), WORDS[:2], WORDS[2:4])
        if mode == "none"
        else latent_agreement(bundle, gen, mode, WORDS)
    )
    why = disagreement(found, bundle.dtype)
    assert why is None, f"{why}: {found}"


def check_engine(gen: Any, bundle: Any) -> None:
    """Fail if batches fell back to plain torch or the VAE to fp32."""
    expected = "graph" if bundle.device.type == "cuda" and gen.config.engine != "reference" else "auto"
    why = engine_mismatch(gen.info, expected, bundle.dtype)
    assert why is None, why


def needs(bundle: Any, mode: str) -> None:
    if mode == "adapter" and bundle.adapter is None:
        pytest.skip(f"{bundle.name} has no adapter")


def record(measure: Any, bundle: Any, gen: Any, mode: str, batch: int, **options: Any) -> None:
    call = calls(gen, batch, mode=mode)

    def right() -> None:
        verify(gen, bundle, mode)
        # With search and VAE, as it is timed.
        call()
        check_engine(gen, bundle)

    measure(
        call, verify=right, dtype=bundle.dtype, capture=False,
        group=f"generate, batch {batch}",
        sizes={"model": bundle.name, "batch": batch, "pixels": bundle.default_size, "pairs": len(gen.database)},
        extra={"op": "generate", "mode": mode, "engine": gen.info["engine"], "images_a_call": batch,
               "threads": gen.info["threads"], **options},
    )  # fmt: skip
    check_engine(gen, bundle)


@pytest.mark.quick
@pytest.mark.parametrize("mode", MODES)
def test_generate(measure, bundle, make_generator, mode):
    needs(bundle, mode)
    record(measure, bundle, make_generator(engine="auto"), mode, 1)


@pytest.mark.parametrize("batch", [2, 4, 8])
@pytest.mark.parametrize("mode", ["none", "adapter"])
def test_generate_in_batches(measure, bundle, make_generator, mode, batch):
    needs(bundle, mode)
    record(measure, bundle, make_generator(engine="auto"), mode, batch)


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("capture", [False, True])
def test_generate_by_capture(measure, bundle, make_generator, capture, mode, batch):
    record(measure, bundle, make_generator(engine="graph", capture=capture), mode, batch)


@pytest.mark.quick
def test_peer_diffusers(measure, bundle):
    """The same modules through diffusers' pipeline."""
    measure(
        peer_calls(Diffusers(bundle)), dtype=bundle.dtype, capture=False, group="generate, batch 1",
        sizes={"model": bundle.name, "batch": 1, "pixels": bundle.default_size},
        extra={"op": "peer.diffusers", "images_a_call": 1, "threads": torch.get_num_threads()},
    )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.compiled
def test_peer_diffusers_compiled(measure, sd21):
    peer = Diffusers(sd21, compile=True)
    reference = Diffusers(sd21)

    def same() -> None:
        # Batch 1, as it is timed: another batch size would be compiled again, for minutes.
        why = disagreement(agreement(peer, reference, WORDS[:1], WORDS[1:2]), sd21.dtype)
        assert why is None, why

    measure(
        peer_calls(peer), verify=same, dtype=sd21.dtype, capture=False, group="generate, batch 1",
        sizes={"model": sd21.name, "batch": 1, "pixels": sd21.default_size},
        extra={"op": "peer.diffusers_compiled", "images_a_call": 1, "peer": peer.name},
    )  # fmt: skip


@pytest.mark.quick
def test_library_overhead(measure, bundle, make_generator):
    """The same modules called by hand, without requests, queue or checks."""
    gen, hand = make_generator(engine="reference"), by_hand(bundle)
    turn = itertools.count()

    def library(prompt: str, seed: int) -> np.ndarray:
        return gen(prompt, seed=seed, mode="none", output_type="uint8").images

    # As many threads as the library's device thread has.
    own, threads = torch.get_num_threads(), gen.info["threads"]
    torch.set_num_threads(threads)
    try:
        drawn = library(WORDS[0], 0).astype(int)
        assert np.abs(hand(WORDS[0], 0) - drawn).max() <= 1 < np.abs(hand(WORDS[1], 0) - drawn).max()
        found = pairs(library, hand, WORDS, rounds=40)
        measure(
            lambda: hand(WORDS[(i := next(turn)) % len(WORDS)], i), dtype=bundle.dtype, capture=False,
            group="generate, batch 1", sizes={"model": bundle.name, "batch": 1, "pixels": bundle.default_size},
            extra={"op": "modules_by_hand", "mode": "none", "images_a_call": 1, "threads": threads,
                   "measured": {"library_overhead": found["wall"]["overhead"]}},
        )  # fmt: skip
    finally:
        torch.set_num_threads(own)
