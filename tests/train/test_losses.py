"""Eqs. 6-10 against values worked out by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ragturbo.train.losses import hinge_d, hinge_g, masked_mean, r1, smooth_l1, total, weighted_mean


def test_hinge_d_sums_over_heads_the_means_of_both_sides():
    real = [torch.tensor([[2.0, 0.0], [0.5, 1.0]]), torch.tensor([[-1.0], [3.0]])]
    fake = [torch.tensor([[-2.0, 0.0], [1.0, -0.5]]), torch.tensor([[0.0], [-4.0]])]
    # head 1: (0 + 1 + .5 + 0)/4 + (0 + 1 + 2 + .5)/4 = .375 + .875; head 2: (2 + 0)/2 + (1 + 0)/2 = 1.5
    assert hinge_d(real, fake).tolist() == [1.25, 1.5]
    assert hinge_d(real, fake).sum().item() == 2.75


def test_a_head_without_signal_has_two_whatever_the_weights():
    zeros = [torch.zeros(3, 4)]
    weight = torch.tensor([[1.0, 0.5, 0.0, 1.0, 0.5, 0.25]])
    assert hinge_d(zeros, [torch.zeros(6, 4)], weight).tolist() == [2.0]


def test_weights_leave_out_the_fakes_they_are_zero_for():
    real, fake = [torch.full((2, 1), 5.0)], [torch.tensor([[-3.0], [4.0]])]
    assert hinge_d(real, fake, torch.tensor([[1.0, 0.0]])).sum().item() == 0.0
    assert hinge_d(real, fake, torch.tensor([[0.0, 1.0]])).sum().item() == 5.0


def test_real_weights_leave_out_the_reals_they_are_zero_for():
    real, fake = [torch.tensor([[-3.0], [4.0]])], [torch.full((2, 1), -5.0)]
    assert hinge_d(real, fake, None, torch.tensor([0.0, 1.0])).item() == 0.0
    assert hinge_d(real, fake, None, torch.tensor([1.0, 0.0])).item() == 4.0


def test_hinge_g_is_minus_the_sum_of_the_means():
    assert hinge_g([torch.tensor([[1.0, 3.0]]), torch.tensor([[-0.5]])]).item() == -1.5


def test_smooth_l1_is_quadratic_below_one_and_linear_above():
    z0 = torch.zeros(2, 1, 1, 2)
    z0_hat = torch.tensor([[[[0.5, 2.0]]], [[[-3.0, 0.0]]]])
    # (.5·.25 + 1.5)/2 and (2.5 + 0)/2
    assert smooth_l1(z0_hat, z0).tolist() == [0.8125, 1.25]


def test_the_total_weighs_its_parts_as_the_paper_does():
    assert total(torch.tensor(1.0), torch.tensor(2.0), torch.tensor(3.0)).item() == 1 + 2.5 * 2 + 1.0 * 3


def test_r1_is_half_gamma_times_the_squared_gradient_a_sample():
    features = [torch.ones(2, 3, 1, 1, requires_grad=True)]
    logits = [(features[0] * torch.tensor([1.0, 2.0, 2.0]).view(1, 3, 1, 1)).sum((1, 2, 3)).view(2, 1)]
    assert r1(logits, features, 4.0).item() == pytest.approx(4.0 / 2 * 9.0)


def test_a_masked_sample_costs_nothing_even_when_it_is_nan():
    loss = torch.tensor([1.0, float("nan"), 3.0, 5.0], requires_grad=True)
    mean = masked_mean(loss, torch.tensor([True, False, True, False]))
    mean.backward()
    assert mean.item() == 1.0
    assert loss.grad.tolist() == [0.25, 0.0, 0.25, 0.0]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.data())
def test_splitting_a_batch_into_micro_batches_changes_no_mean(parts, size, data):
    values = data.draw(st.lists(st.floats(-4, 4), min_size=parts * size, max_size=parts * size))
    mask = data.draw(st.lists(st.booleans(), min_size=parts * size, max_size=parts * size))
    loss, keep = torch.tensor(values, dtype=torch.float64), torch.tensor(mask)
    split = sum(masked_mean(a, b) for a, b in zip(loss.chunk(parts), keep.chunk(parts), strict=True)) / parts
    torch.testing.assert_close(split, masked_mean(loss, keep))


def test_a_weighted_mean_of_nothing_is_zero_and_not_nan():
    assert weighted_mean(torch.tensor([3.0, 4.0]), torch.zeros(2)).item() == 0.0
