"""The CUDA part of the native module: resources of its machine code, argument checks, and results on a GPU."""

from __future__ import annotations

import re
import subprocess

import pytest
import torch

_native = pytest.importorskip("ragturbo._native", reason="installed without the native module: see `ragturbo info`")
build = _native.build_info()
pytestmark = pytest.mark.skipif(not build["cuda"], reason=f"no CUDA part: {build['cuda_off']}")

KERNELS = {"gather_fp16", "gather_int8", "scan_keysILi1E", "scan_keysILi2E", "scan_keysILi4E", "merge_lists"}


def resources() -> dict[tuple[str, str], dict[str, int]]:
    """(arch, kernel) -> REG, STACK, LOCAL, SHARED, from the cuobjdump in Triton's wheel."""
    pytest.importorskip("triton", reason="cuobjdump comes with its wheel")
    from benchmarks.compile_offline import cuobjdump

    command = [str(cuobjdump()), "--dump-resource-usage", _native.__file__]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = {}
    for part in text.split("arch = ")[1:]:
        arch = part.split()[0]
        for name, usage in re.findall(r"Function (\S+):\s*(.*)", part):
            (kernel,) = (k for k in KERNELS if k in name)
            found[arch, kernel] = {key: int(value) for key, value in re.findall(r"\b([A-Z]+):(\d+)", usage)}
    return found


def test_every_kernel_is_there_for_every_target_and_none_spills() -> None:
    found, targets = resources(), build["archs"].split()
    # An installation for a single GPU has only that GPU's target.
    assert targets and set(found) == {(arch, kernel) for arch in targets for kernel in KERNELS}
    for (arch, kernel), use in sorted(found.items()):
        print(f"{arch} {kernel:16} {use['REG']:3} registers, {use['SHARED']:5} B shared, {use['LOCAL']} B spilled")
        assert use["LOCAL"] == use["STACK"] == 0
        # A block of 256 threads has 65,536 registers and, by default, 48 KiB of shared memory.
        assert use["REG"] * 256 <= 65536 and use["SHARED"] <= 48 * 1024


GATHER = {
    "base_at": 256, "count_at": 256, "ids": 256, "n": 1, "tokens": 64, "channels": 1280, "stride": 163840,
    "stored": "float16", "out": 256, "stream": 0,
}  # fmt: skip
TOPK = {
    "base_at": 256, "count_at": 256, "query": 256, "queries": 1, "dim": 1024, "k": 4, "rows": 256, "scores": 256,
    "workspace": 256, "workspace_bytes": 1 << 30, "stream": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    "wrong",
    [
        {"n": -1}, {"n": 65536}, {"tokens": 0}, {"channels": 0}, {"channels": 1284}, {"stride": 163839},
        {"stride": 163848}, {"stored": "float32"}, {"out": 8}, {"out": 0}, {"ids": 4}, {"base_at": 0},
        {"tokens": 1 << 62}, {"stored": "int8", "channels": 1288}, {"stored": "int8", "stride": 81920},
    ],
    ids=str,
)  # fmt: skip
def test_gather_refuses(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=list(wrong)[-1]):
        _native.gather_rows(**{**GATHER, **wrong})


@pytest.mark.parametrize(
    "wrong",
    [
        {"queries": 0}, {"queries": 5}, {"k": 0}, {"k": 33}, {"dim": 4}, {"dim": 1028}, {"dim": 4096},
        {"query": 2}, {"rows": 0}, {"scores": 3}, {"workspace": 4}, {"count_at": 0},
    ],
    ids=str,
)  # fmt: skip
def test_topk_refuses(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        _native.topk(**{**TOPK, **wrong})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_a_launch_is_an_error_in_cudas_words() -> None:
    with pytest.raises(RuntimeError, match="gather_rows: .*(CUDA|device)"):
        _native.gather_rows(**GATHER)
    with pytest.raises(RuntimeError, match="topk: .*(CUDA|device)"):
        _native.topk(**TOPK)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="runs on a GPU")
@pytest.mark.parametrize("stored", ["float16", "int8"])
@pytest.mark.parametrize("shape", [(64, 1280), (3, 16), (7, 48), (256, 320)], ids=str)
def test_gather_on_a_gpu_is_the_reference(stored: str, shape: tuple[int, int]) -> None:
    from ragturbo.ops.gather_rows import Rows, describe, gather_rows

    tokens, channels = shape
    count = 20
    record = tokens * channels * 2 if stored == "float16" else tokens * channels + tokens * 4
    stride = -(-record // 128) * 128
    arena = torch.zeros(count, stride, dtype=torch.uint8).pin_memory()
    values = torch.randn(count, tokens, channels)
    if stored == "float16":
        arena[:, :record] = values.half().flatten(1).view(torch.uint8)
    else:
        arena[:, : tokens * channels] = (values * 40).clamp(-127, 127).to(torch.int8).flatten(1).view(torch.uint8)
        arena[:, tokens * channels : record] = torch.rand(count, tokens).view(torch.uint8)
    ids = torch.tensor([3, 0, 19, -1, 20, 3, 2**40])
    host = Rows(describe(arena.data_ptr(), count, "cpu"), stride, tokens, channels, stored)
    expected = gather_rows(host, ids, impl="reference")
    device = Rows(describe(arena.data_ptr(), count, "cuda"), stride, tokens, channels, stored)
    torch.testing.assert_close(gather_rows(device, ids.cuda(), impl="cuda").cpu(), expected, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="runs on a GPU")
@pytest.mark.parametrize("queries", [1, 2, 3, 4])
@pytest.mark.parametrize(("count", "dim", "k"), [(5000, 1024, 10), (1, 8, 4), (0, 64, 3), (777, 72, 32), (31, 2048, 1)])
def test_topk_on_a_gpu_is_the_reference(queries: int, count: int, dim: int, k: int) -> None:
    from ragturbo.ops.gather_rows import describe
    from ragturbo.ops.topk import topk

    generator = torch.Generator().manual_seed(count + dim)
    # Small integers: products are exact in fp32 in any order, and there are many ties.
    keys = torch.randint(-3, 4, (max(count, 1), dim), generator=generator).half()
    keys[::7, 0] = torch.nan
    query = torch.randint(-3, 4, (queries, dim), generator=generator).float()
    rows, scores = topk(describe(keys.data_ptr(), count, "cpu"), query, k, impl="reference")
    on_gpu = keys.cuda()
    found, best = topk(describe(on_gpu.data_ptr(), count, "cuda"), query.cuda(), k, impl="cuda")
    torch.testing.assert_close(found.cpu(), rows, rtol=0, atol=0)
    torch.testing.assert_close(best.cpu(), scores, rtol=0, atol=0, equal_nan=True)
