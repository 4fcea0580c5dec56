from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import roofline
from ragturbo import ops
from ragturbo.kernels import group_norm, slerp
from ragturbo.kernels.launch import replaced
from ragturbo.model.adapter import HSpaceAdapter


def matrix_flops(call):
    # The counter does not know the attention kernel of every CPU; products it always knows.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        call()
    return counter.get_total_flops()


def test_the_adapters_parameters_and_flops_are_torchs_own_count():
    batch, tokens, neighbours, retrieved, channels, heads = 2, 20, 3, 9, 64, 2
    with torch.device("meta"):
        whole = HSpaceAdapter(1280, 20, "transformer")
    assert sum(p.numel() for p in whole.parameters()) == roofline.transformer_parameters(1280) == 36_071_680
    for kind, count in (
        ("transformer", roofline.transformer_adapter), ("attention", roofline.attention_adapter)
    ):  # fmt: skip
        adapter = HSpaceAdapter(channels, heads, kind)
        h_tgt, h_retr = torch.randn(batch, tokens, channels), torch.randn(batch, neighbours, retrieved, channels)
        work = count(batch, tokens, neighbours, retrieved, channels, 4)
        assert work.flops == matrix_flops(lambda a=adapter, x=h_tgt, y=h_retr: a(x, y, torch.ones(batch)))
        moved = sum(p.numel() for p in adapter.parameters()) + 2 * h_tgt.numel() + h_retr.numel()
        assert work.memory_bytes == 4 * moved


def test_flops_of_products_are_torchs_own_count():
    x, w = torch.randn(2, 5, 32), torch.randn(16, 32)
    assert roofline.linear(10, 16, 32).flops == matrix_flops(lambda: ops.linear(x, [w]))
    assert roofline.linear(10, 8, 32, geglu=True).flops == matrix_flops(lambda: ops.linear(x, [w], geglu=True))
    q, k = torch.randn(2, 5, 32), torch.randn(2, 3, 4, 32)
    work = roofline.cross_attention(2, 5, 3, 4, 32)
    assert work.flops == matrix_flops(lambda: ops.cross_attention(q, k, k, heads=2))


def test_bytes_are_those_of_the_tensors():
    h = torch.empty(2, 64, 1280, dtype=torch.float16)
    assert roofline.slerp(2, 64, 1280).memory_bytes == 3 * h.nbytes + 8
    assert roofline.scaled_residual(2, 64, 1280).memory_bytes == 3 * h.nbytes + 8
    assert roofline.group_norm(2, 1280, 64).bytes == 2 * h.nbytes
    assert roofline.group_norm(2, 1280, 64, add=True).bytes == 4 * h.nbytes
    assert roofline.to_uint8(1, 512 * 512, 4).bytes == 512 * 512 * 3 * 5
    row = roofline.gather_rows(3, 64, 1280, "int8")
    rows = ops.Rows(ops.describe(0, 0, "cpu"), 1 << 20, 64, 1280, "int8")
    assert row.link_bytes == 3 * rows.record_bytes and row.memory_bytes == 3 * 163_840


def test_launches_change_where_the_kernels_do():
    assert [roofline.slerp(1, 1, n, per="token").launches for n in (slerp.ONE_PASS, slerp.ONE_PASS + 1)] == [1, 2]
    names: list[str] = []
    for channels, pixels in ((1280, 64), (1280, 256), (2560, 256), (320, 4096), (512, 16384), (256, 65536)):
        names.clear()
        x, weight = torch.empty(1, channels, pixels, 1, device="meta"), torch.empty(channels, device="meta")
        with replaced(lambda kernel, *_: names.append(kernel.__name__)):
            group_norm.forward(x, 32, weight, weight, 1e-5, True, None, None, False)
        assert roofline.group_norm(1, channels, pixels).launches == len(names), (channels, pixels, names)


def test_the_designs_floors():
    """0.63M × 1024 keys are 1.29 GB, about 0.27 ms on an H200; the adapter's weights alone about 0.015 ms."""
    work, h200 = roofline.topk(630_000, 1024), roofline.MACHINES["H200"]
    assert work.bytes == pytest.approx(1.29e9, rel=1e-3) and work.seconds(h200) == pytest.approx(0.269e-3, rel=1e-2)
    adapter = roofline.transformer_adapter(1, 64, 1, 64, 1280)
    assert adapter.seconds(h200) == pytest.approx(15.1e-6, rel=1e-2)
    assert adapter.fraction(h200, 30.2e-6) == pytest.approx(0.5, rel=1e-2)
    assert (adapter + work).launches == 16


def test_any_gpu_by_two_numbers(capsys):
    assert roofline.main(["--tflops", "100", "--bandwidth", "1000"]) == 0
    table = capsys.readouterr().out
    assert "this GPU" in table and len(table.splitlines()) == 2 + len(roofline.main_shapes())
    (row,) = [line for line in table.splitlines() if "topk" in line]
    assert row.split("|")[-2].strip() == "1.29e+03"
    with pytest.raises(SystemExit):
        roofline.main(["--tflops", "100"])
