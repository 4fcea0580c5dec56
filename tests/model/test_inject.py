"""λ, validity and the four strategies."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ragturbo.errors import InvalidRequest
from ragturbo.model.adapter import HSpaceAdapter
from ragturbo.model.inject import MODES, blend_weights, cosine, inject, mean_of_neighbours

NAN = float("nan")


def float64_slerp(t: np.ndarray, r: np.ndarray, w: float) -> np.ndarray:
    """Eq. 3 in float64."""
    t, r = t.astype(np.float64), r.astype(np.float64)
    cos = (t * r).sum() / (np.linalg.norm(t) * np.linalg.norm(r))
    omega = math.acos(max(-1.0, min(1.0, cos)))
    return (math.sin((1 - w) * omega) * r + math.sin(w * omega) * t) / math.sin(omega)


def adapter_of(channels: int) -> HSpaceAdapter:
    adapter = HSpaceAdapter(channels).eval().requires_grad_(False)
    torch.nn.init.normal_(adapter.proj_out.weight, std=0.2)
    return adapter


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_lambda_is_each_valid_neighbours_cosine_unless_one_is_given(data: st.DataObject) -> None:
    batch, k = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    cosines = [[data.draw(st.one_of(st.just(NAN), st.floats(-1.1, 1.1))) for _ in range(k)] for _ in range(batch)]
    ids = [[data.draw(st.sampled_from([-1, 0, 7])) for _ in range(k)] for _ in range(batch)]
    scores = [[data.draw(st.one_of(st.just(NAN), st.floats(-5, 5))) for _ in range(k)] for _ in range(batch)]
    limits = [data.draw(st.sampled_from([-math.inf, -1.0, 0.5])) for _ in range(batch)]
    given_lam = [data.draw(st.one_of(st.just(NAN), st.floats(0, 1))) for _ in range(batch)]
    lam, valid = blend_weights(
        torch.tensor(cosines),
        torch.tensor(ids),
        torch.tensor(scores),
        min_score=torch.tensor(limits),
        lam=torch.tensor(given_lam),
    )
    assert lam.dtype == torch.float32 and valid.dtype == torch.bool
    for b in range(batch):
        counts = [
            ids[b][j] >= 0 and (limits[b] == -math.inf or np.float32(scores[b][j]) >= np.float32(limits[b]))
            for j in range(k)
        ]
        assert valid[b].tolist() == counts
        own = [0.0 if math.isnan(c) else min(1.0, max(0.0, c)) for c in cosines[b]]
        each = own if math.isnan(given_lam[b]) else [given_lam[b]] * k
        assert lam[b].tolist() == pytest.approx([x if v else 0.0 for x, v in zip(each, counts, strict=True)], abs=1e-6)


def test_one_limit_for_all_and_no_lambda_given() -> None:
    lam, valid = blend_weights(
        torch.tensor([[0.8, 0.4]]), torch.tensor([[3, 4]]), torch.tensor([[2.0, 1.0]]), min_score=torch.tensor([1.5])
    )
    assert valid.tolist() == [[True, False]] and lam[0].tolist() == pytest.approx([0.8, 0])


def test_each_phrases_neighbours_are_compared_with_its_own_key() -> None:
    keys, stored = (torch.nn.functional.normalize(torch.rand(2, n, 8), dim=-1) for n in (3, 6))
    together = cosine(keys, stored)
    alone = [cosine(keys[:, p], stored[:, 2 * p : 2 * p + 2]) for p in range(3)]
    torch.testing.assert_close(together, torch.cat(alone, 1))


def test_several_neighbours_average_by_their_cosines() -> None:
    rows = torch.stack([torch.full((1, 2, 3), value) for value in (1.0, 3.0, NAN)], dim=1)
    valid = torch.tensor([[True, True, False]])
    mean = mean_of_neighbours(rows, valid, torch.tensor([[0.6, 0.2, 0.9]]))
    torch.testing.assert_close(mean, torch.full((1, 2, 3), (0.6 * 1 + 0.2 * 3) / 0.8))
    # Without weights, or with none above zero, all have equal weight.
    torch.testing.assert_close(mean_of_neighbours(rows, valid), torch.full((1, 2, 3), 2.0))
    unrelated = mean_of_neighbours(rows, valid, torch.tensor([[-0.5, 0.0, 0.9]]))
    torch.testing.assert_close(unrelated, torch.full((1, 2, 3), 2.0))
    nothing = mean_of_neighbours(rows, torch.zeros(1, 3, dtype=torch.bool))
    assert torch.equal(nothing, torch.zeros(1, 2, 3))


def test_the_mean_is_summed_in_fp32() -> None:
    rows = torch.full((1, 2, 1, 1), 60000.0, dtype=torch.float16)
    assert mean_of_neighbours(rows, torch.ones(1, 2, dtype=torch.bool)).item() == 60000.0


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_takes_and_gives_the_features_shape(mode: str, layout: torch.memory_format) -> None:
    h = torch.randn(2, 32, 3, 4).to(memory_format=layout)
    h_retr = torch.randn(2, 2, 12, 32)
    lam = torch.tensor([[0.9, 0.5], [0.7, 0.2]])
    out = inject(mode, h, h_retr, lam=lam, w=torch.tensor([0.8, 0.6]), adapter=adapter_of(32))
    assert out.shape == h.shape and out.dtype == h.dtype
    if mode == "none":
        assert out is h
    else:
        assert not torch.allclose(out, h, atol=1e-3)
        if layout is torch.channels_last:
            assert out.is_contiguous(memory_format=torch.channels_last)
        other = h_retr.clone()
        other[0, 1] = torch.randn(12, 32)
        changed = inject(mode, h, other, lam=lam, w=torch.tensor([0.8, 0.6]), adapter=adapter_of(32))
        assert not torch.allclose(changed[0], out[0], atol=1e-3)


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**31), w=st.floats(0, 1), k=st.integers(1, 3), scale=st.floats(0.1, 50))
def test_slerp_of_one_image_is_equation_3(seed: int, w: float, k: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(2, 8, 2, 3, generator=generator)
    h_retr = torch.randn(2, k, 6, 8, generator=generator) * scale
    weights = torch.rand(2, k, generator=generator)
    out = inject("slerp", h, h_retr, w=w, lam=weights)
    for b in range(2):
        share = (weights[b] / weights[b].sum()).double().numpy()
        retrieved = (share[:, None, None] * h_retr[b].double().numpy()).sum(0)
        target = h[b].permute(1, 2, 0).reshape(6, 8).numpy()
        expected = float64_slerp(target, retrieved, w)
        got = out[b].permute(1, 2, 0).reshape(6, 8).numpy()
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4 * max(1.0, scale))


def test_slerp_per_token_takes_each_tokens_own_angle() -> None:
    h, h_retr = torch.randn(1, 8, 2, 2), torch.randn(1, 1, 4, 8)
    out = inject("slerp", h, h_retr, w=0.3, per="token")[0].flatten(1).T
    for token in range(4):
        expected = float64_slerp(h[0].flatten(1).T[token].numpy(), h_retr[0, 0, token].numpy(), 0.3)
        np.testing.assert_allclose(out[token].numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["slerp", "lerp"])
def test_the_weight_is_the_targets(mode: str) -> None:
    h, h_retr = torch.randn(2, 8, 2, 2), torch.randn(2, 1, 4, 8)
    torch.testing.assert_close(inject(mode, h, h_retr, w=1.0), h, rtol=0, atol=1e-6)
    only = inject(mode, h, h_retr, w=0.0).permute(0, 2, 3, 1).flatten(1, 2)
    torch.testing.assert_close(only, h_retr[:, 0], rtol=1e-6, atol=1e-6)


def test_lerp_is_the_chord_below_slerps_arc() -> None:
    h, h_retr = torch.randn(1, 8, 2, 2), torch.randn(1, 1, 4, 8)
    chord = inject("lerp", h, h_retr, w=0.5)
    tokens = chord.permute(0, 2, 3, 1).flatten(1, 2)
    torch.testing.assert_close(tokens, (h.permute(0, 2, 3, 1).flatten(1, 2) + h_retr[:, 0]) / 2)
    assert chord.norm() < inject("slerp", h, h_retr, w=0.5).norm()


@pytest.mark.parametrize("mode", ["slerp", "lerp", "adapter"])
def test_a_row_without_a_neighbour_keeps_its_bits(mode: str) -> None:
    h = torch.randn(2, 32, 2, 2)
    h[1, 0] = -0.0
    h_retr = torch.full((2, 2, 4, 32), NAN)
    h_retr[0] = torch.randn(2, 4, 32)
    valid = torch.tensor([[True, True], [False, False]])
    out = inject(mode, h, h_retr, lam=torch.tensor([0.5, 0.5]), valid=valid, adapter=adapter_of(32))
    assert torch.equal(out[1].view(torch.int32), h[1].contiguous().view(torch.int32))
    assert torch.isfinite(out[0]).all() and not torch.allclose(out[0], h[0], atol=1e-3)


def test_the_adapter_takes_any_grid_and_its_own_kv() -> None:
    adapter, h, h_retr, lam = adapter_of(32), torch.randn(2, 32, 3, 4), torch.randn(2, 2, 6, 32), torch.rand(2)
    out = inject("adapter", h, h_retr, lam=lam, adapter=adapter, grid=(2, 3))
    assert torch.equal(inject("adapter", h, adapter.retrieved_kv(h_retr), lam=lam, adapter=adapter), out)


@pytest.mark.parametrize("mode", ["slerp", "lerp"])
def test_unequal_grids_are_refused_with_both_named(mode: str) -> None:
    h = torch.randn(1, 8, 3, 4)
    with pytest.raises(InvalidRequest, match="3x4.*4x3"):
        # The same number of tokens in another grid.
        inject(mode, h, torch.randn(1, 1, 12, 8), grid=(4, 3))
    with pytest.raises(InvalidRequest, match="3x4.*9 tokens"):
        inject(mode, h, torch.randn(1, 1, 9, 8))


def test_nonsense_is_refused() -> None:
    h, h_retr = torch.randn(1, 32, 2, 2), torch.randn(1, 1, 4, 32)
    kv = adapter_of(32).retrieved_kv(h_retr)
    wrong: list[tuple[str, Tensor | None, dict[str, object]]] = [
        ("blend", h_retr, {}),
        ("slerp", None, {}),
        ("adapter", h_retr, {"lam": torch.ones(1)}),
        ("adapter", h_retr, {"adapter": adapter_of(32)}),
        ("slerp", h_retr, {"w": 1.5}),
        ("lerp", h_retr, {"w": -0.1}),
        ("slerp", h_retr, {"per": "channel"}),
        ("slerp", kv, {}),  # type: ignore[list-item]
    ]
    for mode, rows, options in wrong:
        with pytest.raises(InvalidRequest):
            inject(mode, h, rows, **options)  # type: ignore[arg-type]
