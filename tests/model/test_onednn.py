from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from ragturbo.model import onednn
from ragturbo.model.onednn import PackedConv2d, PackedLinear

pytestmark = pytest.mark.skipif(onednn.why_not() is not None, reason=str(onednn.why_not()))
DTYPES = [torch.float32, torch.bfloat16]


def close(ours, exact, dtype):
    """Sums of rounded products: some roundings of the largest value."""
    assert ours.dtype == dtype
    assert float((ours.double() - exact).abs().max()) <= 8 * torch.finfo(dtype).eps * float(exact.abs().max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel, stride, padding", [(3, 1, 1), (1, 1, 0), (2, 1, 1), (3, 2, 1)])
def test_a_convolution_of_any_size_is_torchs_with_bias_and_residual(dtype, kernel, stride, padding):
    torch.manual_seed(0)
    weight = torch.randn(24, 12, kernel, kernel).to(dtype)
    packed = PackedConv2d(lambda: weight, weight.shape, dtype, (stride, stride), (padding, padding))
    bias = torch.randn(24).to(dtype)
    for batch, h, w in [(1, 4, 4), (2, 17, 9), (1, 40, 40), (8, 5, 6), (1, 4, 4)]:
        x = torch.randn(batch, 12, h, w).to(dtype)
        exact = F.conv2d(x.double(), weight.double(), bias.double(), stride, padding)
        out = packed(x, bias)
        close(out, exact, dtype)
        assert out.is_contiguous(memory_format=torch.channels_last)
        residual = torch.randn(exact.shape).to(dtype)
        close(packed(x, bias, residual), exact + residual.double(), dtype)
        close(packed(x), exact - bias.double()[:, None, None], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_linear_layer_of_any_size_is_torchs_with_bias_and_residual(dtype):
    torch.manual_seed(0)
    weight, bias = torch.randn(40, 24).to(dtype), torch.randn(40).to(dtype)
    packed = PackedLinear(lambda: weight, (40, 24), dtype)
    for shape in [(1, 24), (2, 7, 24), (1, 300, 24)]:
        x, residual = torch.randn(shape).to(dtype), torch.randn(*shape[:-1], 40).to(dtype)
        exact = F.linear(x.double(), weight.double(), bias.double())
        close(packed(x, bias), exact, dtype)
        close(packed(x, bias, residual), exact + residual.double(), dtype)


def test_a_weight_is_packed_once_per_layout_and_again_after_it_changed():
    made = []

    def weight():
        made.append(1)
        return torch.full((8, 8, 3, 3), float(len(made)))

    packed = PackedConv2d(weight, torch.Size((8, 8, 3, 3)), torch.float32, (1, 1), (1, 1))
    x = torch.ones(1, 8, 6, 6)
    first = packed(x)
    assert torch.equal(packed(x), first) and len(made) == 1
    packed(torch.ones(1, 8, 7, 7))
    held = {id(w) for w in packed.weight._by_size.values()}
    assert len(packed.weight._by_size) == 2 and len(held) == len(packed.weight._by_layout)
    # The size is known from a layer of the same settings, and its layout is held: nothing is packed.
    known = len(made)
    packed.weight._by_size.clear()
    packed(x), packed(torch.ones(1, 8, 7, 7))
    assert len(made) == known
    packed.weight.clear()
    assert torch.equal(packed(x), len(made) * first)


def test_a_torch_without_these_calls_is_said_and_not_used(monkeypatch):
    onednn.why_not.cache_clear()
    try:
        monkeypatch.setattr(onednn, "PackedLinear", lambda *_: lambda x, bias, residual: x + residual)
        assert "computes packed layers differently" in str(onednn.why_not())
        onednn.why_not.cache_clear()

        def missing(*_):
            raise AttributeError("no such operation")

        monkeypatch.setattr(onednn, "PackedConv2d", missing)
        assert "has no packed layers for this CPU: no such operation" in str(onednn.why_not())
    finally:
        onednn.why_not.cache_clear()
