from __future__ import annotations

import sys
from functools import partial
from types import ModuleType

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from ragturbo.errors import InvalidRequest
from ragturbo.ops import cross_attention, dispatch
from ragturbo.ops.cross_attention import reference

CAPABLE = ["reference", "triton", "sdpa"]


def exact(q, k, v, valid, heads):
    return reference(q.double(), k.double(), v.double(), valid, heads)


def composed(q, k, v, valid, heads):
    """Softmax attention written out in the storage type."""
    k, v = (x.flatten(1, 2).unflatten(-1, (heads, -1)).transpose(1, 2) for x in (k, v))
    q = q.unflatten(-1, (heads, -1)).transpose(1, 2)
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if valid is not None:
        mask = valid[:, None, None, :, None].expand(-1, -1, -1, -1, k.shape[2] // valid.shape[1]).flatten(3)
        scores = scores.masked_fill(~mask, -torch.inf)
    return torch.nan_to_num(F.softmax(scores, dim=-1) @ v).transpose(1, 2).flatten(2)


def composed_gradients(q, k, v, g, valid, heads):
    """The gradients of `composed`, written out: Σ p ∂p of a row computed as ⟨out, g⟩."""
    n, s = k.shape[1:3]
    k, v = (x.flatten(1, 2).unflatten(-1, (heads, -1)).transpose(1, 2) for x in (k, v))
    q, g = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, g))
    scale = q.shape[-1] ** -0.5
    scores = q @ k.transpose(-1, -2) * scale
    if valid is not None:
        scores = scores.masked_fill(~valid.repeat_interleave(s, dim=1)[:, None, None], -torch.inf)
    p = torch.nan_to_num(F.softmax(scores, dim=-1))
    d_scores = p * (g @ v.transpose(-1, -2) - (p @ v * g).sum(-1, keepdim=True)) * scale
    d_q, d_k, d_v = d_scores @ k, d_scores.transpose(-1, -2) @ q, p.transpose(-1, -2) @ g
    d_q, d_k, d_v = (x.transpose(1, 2).flatten(2) for x in (d_q, d_k, d_v))
    return d_q, d_k.unflatten(1, (n, s)), d_v.unflatten(1, (n, s))


# tokens, neighbours, tokens per neighbour, heads, width of a head
@pytest.mark.parametrize(
    "t, n, s, heads, d", [(1, 1, 1, 1, 16), (19, 3, 21, 3, 20), (33, 2, 65, 2, 32), (17, 1, 40, 1, 128)]
)
def test_the_kernel_errs_no_more_than_torch(t, n, s, heads, d, dtype, randn, device, no_worse):
    c = heads * d
    q, k, v = randn(2, t, c, dtype=dtype), randn(2, n, s, c, dtype=dtype), randn(2, n, s, c, dtype=dtype)
    valid = torch.ones(2, n, dtype=torch.bool, device=device)
    valid[0, 1:2] = False
    for mask in (None, valid):
        out = cross_attention(q, k, v, mask, heads=heads, impl="triton")
        no_worse(out, exact(q, k, v, mask, heads), composed(q, k, v, mask, heads))


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.integers(1, 2), t=st.integers(1, 40), n=st.integers(1, 16), s=st.integers(1, 24), heads=st.integers(1, 3),
    d=st.integers(1, 40), seed=st.integers(0, 2**31), data=st.data(),
)  # fmt: skip
def test_any_shape_and_any_neighbours_valid(batch, t, n, s, heads, d, seed, data, device, no_worse):
    # With very few outputs all may cancel, and a relative error means nothing.
    assume(batch * t * heads * d >= 32)
    generator = torch.Generator().manual_seed(seed)
    valid = data.draw(st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=batch, max_size=batch))
    valid = torch.tensor(valid, device=device)
    q = torch.randn(batch, t, heads * d, generator=generator).to(device)
    k, v = (torch.randn(batch, n, s, heads * d, generator=generator).to(device) for _ in range(2))
    out = cross_attention(q, k, v, valid, heads=heads, impl="triton")
    no_worse(out, exact(q, k, v, valid, heads), composed(q, k, v, valid, heads))


@pytest.mark.parametrize("impl", CAPABLE)
def test_memory_of_invalid_neighbours_is_never_looked_at(impl, dtype, randn, device):
    q, k, v = randn(2, 5, 32, dtype=dtype), randn(2, 3, 7, 32, dtype=dtype), randn(2, 3, 7, 32, dtype=dtype)
    valid = torch.tensor([[True, False, True], [True, True, False]], device=device)
    clean = cross_attention(q, k, v, valid, heads=2, impl=impl)
    for garbage in (torch.nan, torch.inf):
        dirty_k, dirty_v = (x.masked_fill(~valid[..., None, None], garbage) for x in (k, v))
        assert torch.equal(cross_attention(q, dirty_k, dirty_v, valid, heads=2, impl=impl), clean)
    only = cross_attention(q[:1], k[:1, [0, 2]], v[:1, [0, 2]], heads=2, impl=impl)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(clean[:1], only, rtol=4 * eps, atol=2 * eps)


@pytest.mark.parametrize("impl", CAPABLE)
def test_a_sample_with_nothing_valid_gets_zeros_and_so_do_its_gradients(impl, dtype, randn, device):
    q, k, v = randn(2, 5, 32, dtype=dtype), randn(2, 3, 7, 32, dtype=dtype), randn(2, 3, 7, 32, dtype=dtype)
    k[1], v[1] = torch.nan, torch.nan
    leaves = [x.requires_grad_() for x in (q, k, v)]
    valid = torch.tensor([[True, True, False], [False] * 3], device=device)
    out = cross_attention(*leaves, valid, heads=2, impl=impl)
    assert (out[1].float().abs() < 1e-30).all() and out[0].abs().min() > 0
    for gradient in torch.autograd.grad(out.sum(), leaves):
        assert gradient.isfinite().all() and (gradient[1].float().abs() < 1e-30).all()


def test_permuting_neighbours_changes_nothing_and_replacing_one_does(randn):
    q, k, v = randn(1, 9, 32), randn(1, 4, 8, 32), randn(1, 4, 8, 32)
    out = cross_attention(q, k, v, heads=2, impl="triton")
    order = [2, 0, 3, 1]
    torch.testing.assert_close(cross_attention(q, k[:, order], v[:, order], heads=2, impl="triton"), out)
    other = k.clone()
    other[:, 1] = randn(1, 8, 32)
    assert (cross_attention(q, other, v, heads=2, impl="triton") - out).abs().max() > 1e-3


def test_views_of_one_projection_are_read_where_they_lie(randn, no_worse):
    """Q, K and V as thirds of one tensor, and K and V as halves of another, are read by strides."""
    qkv = randn(2, 11, 96)
    q, k, v = qkv.chunk(3, dim=-1)
    k, v = k[:, None], v[:, None]
    no_worse(cross_attention(q, k, v, heads=2, impl="triton"), exact(q, k, v, None, 2), composed(q, k, v, None, 2))
    k, v = randn(2, 3, 5, 64).chunk(2, dim=-1)
    no_worse(cross_attention(q, k, v, heads=2, impl="triton"), exact(q, k, v, None, 2), composed(q, k, v, None, 2))
    first = randn(2, 32, 11).transpose(1, 2)
    out = cross_attention(first, k, v.contiguous(), heads=2, impl="triton")
    no_worse(out, exact(first, k, v, None, 2), composed(first, k, v, None, 2))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("t, n, s, heads, d", [(19, 3, 21, 3, 20), (5, 1, 33, 1, 64)])
def test_the_kernels_gradients_are_the_references(t, n, s, heads, d, masked, dtype, rng, randn, device, no_worse):
    c = heads * d
    shapes = (2, t, c), (2, n, s, c), (2, n, s, c)
    tensors = [randn(*shape, dtype=dtype) for shape in shapes]
    g = randn(2, t, c, dtype=dtype)
    valid = torch.tensor([[True] * n, [False] * (n - 1) + [True]], device=device) if masked else None

    def gradients(attention, convert=lambda x: x):
        leaves = [convert(x.clone()).requires_grad_() for x in tensors]
        return torch.autograd.grad(attention(*leaves), leaves, convert(g))

    def in_another_order(gradients_of):
        """The same gradients with tokens and channels in random order, so with sums in another order."""
        tokens, channels = torch.randperm(s), (torch.arange(heads)[:, None] * d + torch.randperm(d)).flatten()
        q, k, v = tensors[0], *(x[:, :, tokens] for x in tensors[1:])
        d_q, d_k, d_v = gradients_of(*(x[..., channels] for x in (q, k, v, g)))
        back = channels.argsort()
        return d_q[..., back], *(x[:, :, tokens.argsort()][..., back] for x in (d_k, d_v))

    def by_autograd(q, k, v, g):
        leaves = [x.requires_grad_() for x in (q, k, v)]
        return torch.autograd.grad(composed(*leaves, valid, heads), leaves, g)

    found = gradients(lambda q, k, v: cross_attention(q, k, v, valid, heads=heads, impl="triton"))
    true = gradients(lambda q, k, v: reference(q, k, v, valid, heads), torch.Tensor.double)
    # In up to 8 % of draws, one order of torch's sums has more than twice another's maximum error: use eight, half of
    # them with each row's inner product as the kernels compute it.
    torch.manual_seed(int(rng.integers(2**31)))
    written_out = partial(composed_gradients, valid=valid, heads=heads)
    eager = [in_another_order(form) for form in (by_autograd, written_out) for _ in range(4)]
    for a, b, *c in zip(found, true, *eager, strict=True):
        # Scores, probabilities, gradient: in one draw of 200 the three roundings add up.
        no_worse(a, b, *c, chained=3)


@pytest.mark.slow
def test_the_compiled_reference_is_the_reference(randn, device):
    q, k = randn(2, 5, 32), randn(2, 3, 7, 32)
    valid = torch.tensor([[True, False, True], [False] * 3], device=device)
    out = cross_attention(q, k, k, valid, heads=2, impl="compile")
    torch.testing.assert_close(out, cross_attention(q, k, k, valid, heads=2, impl="reference"))


def test_the_reference_passes_gradcheck():
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 3, 8), (2, 2, 4, 8), (2, 2, 4, 8)
    leaves = [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]
    valid = torch.tensor([[True, False], [False, False]])
    assert torch.autograd.gradcheck(lambda q, k, v: cross_attention(q, k, v, valid, heads=2), leaves)


def test_an_xformers_without_kernels_for_this_torch_is_refused_in_its_own_words(monkeypatch, randn):
    def attention(*tensors, attn_bias):
        raise NotImplementedError("No operator found for memory_efficient_attention_forward")

    # An xformers built for another torch can be imported but has no operator.
    module = ModuleType("xformers.ops")
    module.memory_efficient_attention = attention
    monkeypatch.setitem(sys.modules, "xformers", ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", module)
    monkeypatch.setattr(dispatch, "refusal", lambda *asked: None)
    q, k = randn(2, 5, 32), randn(2, 3, 7, 32)
    with pytest.raises(InvalidRequest, match="xformers.*No operator found"):
        cross_attention(q, k, k, heads=2, impl="xformers")


def test_nonsense_is_refused_by_name(randn, device):
    q, k = randn(2, 5, 32), randn(2, 3, 7, 32)
    with pytest.raises(InvalidRequest, match=r"\(2, 7, 32\)"):
        cross_attention(q, k[:, 0], k[:, 0], heads=2)
    with pytest.raises(InvalidRequest, match="32 channels.*3 heads"):
        cross_attention(q, k, k, heads=3)
    with pytest.raises(InvalidRequest, match="bool"):
        cross_attention(q, k, k, torch.ones(2, 3, device=device), heads=2)
