"""Programmatic dependent launch: no kernel touches memory before it waits for the kernels ahead of it."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from ragturbo.kernels import bias_residual, cross_attention_backward, launch  # noqa: E402

KERNELS = Path(launch.__file__).parent
# What a kernel may call before it waits: none of these reads or writes memory, except for prefetches into L2.
HARMLESS = {
    "tl.program_id", "tl.num_programs", "tl.arange", "tl.cdiv", "tl.cast", "tl.minimum", "statistics.channels", "to",
    "pdl.prefetch_rows", "pdl.prefetch_vector",
}  # fmt: skip
# Kernels of gradients are in no graph, and do without.
BACKWARD = {"cross_attention_dkv", "cross_attention_dq", "scaled_residual_backward", "slerp_blend_backward"}


def name(call: ast.Call) -> str:
    """tl.load for a call of it, to for a method of an expression."""
    if isinstance(call.func, ast.Attribute):
        module = call.func.value
        modules = ("tl", "pdl", "statistics")
        return f"{module.id}.{call.func.attr}" if getattr(module, "id", "") in modules else call.func.attr
    return call.func.id


def kernels() -> dict[str, ast.FunctionDef]:
    """The kernels that launchers launch, not the functions that kernels call."""
    functions, launched = {}, set()
    for path in KERNELS.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef) and any(ast.unparse(d) == "triton.jit" for d in node.decorator_list):
                functions[node.name] = node
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "launch":
                launched.add(node.args[0].id)
    return {key: functions[key] for key in launched}


def test_every_kernel_waits_before_it_reads_or_writes_memory():
    found = kernels()
    assert len(found) > 20 and found.keys() >= BACKWARD
    for kernel, function in found.items():
        waits = [i for i, line in enumerate(function.body) if ast.unparse(line) == "pdl.wait(PDL)"]
        takes = "PDL" in [argument.arg for argument in function.args.args]
        assert (len(waits), takes) == ((0, False) if kernel in BACKWARD else (1, True)), kernel
        for line in function.body[: waits[0] if waits else 0]:
            called = {name(node) for node in ast.walk(line) if isinstance(node, ast.Call)}
            assert called <= HARMLESS, f"{kernel}: {ast.unparse(line)}"
            # A program that returned would not wait.
            assert not any(isinstance(node, ast.Return) for node in ast.walk(line)), kernel


def test_it_is_off_below_sm_90_and_in_kernels_that_do_not_wait(monkeypatch):
    waits, does_not = bias_residual.bias_residual, cross_attention_backward.cross_attention_dq
    assert launch.programmatic(waits, 90) == launch.programmatic(waits, 100) == {"PDL": True, "launch_pdl": True}
    assert launch.programmatic(waits, 89) == launch.programmatic(waits, 0) == {"PDL": False}
    assert launch.programmatic(does_not, 90) == {}
    monkeypatch.setattr(launch, "PDL", False)
    assert launch.programmatic(waits, 90) == {"PDL": False}


def test_the_environment_turns_it_off():
    code = "from ragturbo.kernels import launch; print(launch.PDL)"
    for value, expected in (("0", "False"), ("1", "True")):
        environment = {**os.environ, "RAGTURBO_PDL": value}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="launches overlap on a GPU")
def test_a_chain_of_kernels_has_the_same_bits_with_and_without(monkeypatch):
    """Every kernel's output is the next one's input, so a read before the wait would see the last replay's memory."""
    from ragturbo import ops

    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).cuda().half()

    x, weight, bias = randn(1, 64, 1280), randn(1280, 1280) / 36, randn(1280)

    def chain() -> torch.Tensor:
        y = x
        for _ in range(8):
            y, total = ops.layer_norm_and_sum(y, bias, bias, add=x, impl="triton")
            y = ops.linear(y, [weight], bias, residual=total, impl="triton")
            y = ops.slerp(y, x, 0.5, impl="triton")
            image = y.transpose(1, 2).unflatten(2, (8, 8))
            y = ops.group_norm(image, 32, bias, bias, silu=True, impl="triton").flatten(2).transpose(1, 2)
        return y

    start = x.clone()
    found: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    for on in (True, False):
        monkeypatch.setattr(launch, "PDL", on)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            chain()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            out = chain()
        for _ in range(50):
            # The input changes, so that a stale read gives other bits.
            for i, sign in enumerate((1, -1)):
                x.copy_(sign * start)
                graph.replay()
                found[i].append(out.clone())
    for results in found:
        assert all(torch.equal(results[0], other) for other in results)
    assert not torch.equal(found[0][0], found[1][0])
