import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from droplens import measure
from droplens.measure import _condensation
from tests.reference_measure import entropy_number, greedy_cover


def gaussian(m, d, seed=0):
    return torch.randn(m, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def planted(groups, copies, d, noise, seed=0):
    """`copies` neurons near each of `groups` orthogonal directions, of random amplitude."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.eye(d, dtype=torch.float64)[:groups].repeat_interleave(copies, 0)
    sizes = 0.5 + torch.rand(len(directions), 1, generator=generator, dtype=torch.float64)
    jitter = noise * torch.randn(directions.shape, generator=generator, dtype=torch.float64)
    return directions * sizes + jitter


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("d", [1, 2, 3, 20])
@pytest.mark.parametrize("tolerance", [0.001, 0.05, 0.5])
def test_equals_the_greedy_cover_by_hand(d, tolerance, signed, monkeypatch):
    monkeypatch.setattr(_condensation, "_BLOCK", 7)
    monkeypatch.setattr(_condensation, "_PRODUCTS", 20)
    weights = gaussian(60, d)
    amplitudes = gaussian(60, 1, seed=1).flatten().abs()
    amplitudes[::9] = amplitudes[0]  # ties
    result = measure.condensation(weights, amplitudes, tolerance, signed)
    labels, representatives = greedy_cover(weights, amplitudes, tolerance, signed)
    assert result.labels.tolist() == labels
    assert result.representatives.tolist() == representatives
    assert result.orientations == len(representatives)
    covered = sum(label >= 0 for label in labels)
    assert result.omitted == 60 - covered
    assert result.effective_ratio == pytest.approx(len(representatives) / covered)
    mass = [
        sum(float(a) for a, own in zip(amplitudes, labels, strict=True) if own == group)
        for group in range(len(representatives))
    ]
    expected = entropy_number([m / sum(mass) for m in mass])
    assert result.weighted_orientations == pytest.approx(expected)


@pytest.mark.parametrize("groups", [1, 3, 10])
def test_planted_orientations_are_found(groups):
    result = measure.condensation(planted(groups, 30, 12, 0.01))
    assert result.orientations == groups
    assert result.effective_ratio == pytest.approx(1 / 30)
    assert groups * 0.9 < result.weighted_orientations <= groups
    assert result.labels.bincount().tolist() == [30] * groups


def test_opposite_directions_fold_for_odd_activations():
    weights = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0]])
    assert measure.condensation(weights).orientations == 3
    assert measure.condensation(weights, signed=False).orientations == 2


def test_negligible_and_zero_neurons_are_left_out():
    weights = torch.tensor([[1.0, 0.0], [0.0, 0.0099], [0.0, 0.011], [0.0, 0.0]])
    result = measure.condensation(weights)
    assert result.labels.tolist() == [0, -1, 1, -1]
    assert result.omitted == 2
    assert result.effective_ratio == 1
    # With amplitudes given, a row without a direction still has none.
    assert measure.condensation(weights, torch.ones(4)).labels.tolist() == [0, 1, 1, -1]


def test_nothing_but_zeros():
    result = measure.condensation(torch.zeros(3, 2))
    assert (result.orientations, result.effective_ratio, result.omitted) == (0, 0.0, 3)
    assert result.weighted_orientations == 0


def test_random_directions_in_the_plane_need_about_as_many_groups_as_the_theory_says():
    counts = {measure.condensation(gaussian(1000, 2, seed)).orientations for seed in range(5)}
    assert all(10 <= count <= 20 for count in counts)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 40), st.floats(0.1, 10), st.integers(0, 1000))
def test_scale_does_not_matter(m, scale, seed):
    weights = gaussian(m, 3, seed)
    result = measure.condensation(weights)
    scaled = measure.condensation(weights * scale)
    assert torch.equal(result.labels, scaled.labels)
    assert 1 <= result.weighted_orientations <= result.orientations + 1e-9


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(3),), ValueError, "weights has to be a matrix"),
        ((torch.tensor([[math.nan]]),), ValueError, "weights holds NaN or Inf"),
        ((torch.ones(3, 2), torch.ones(2)), ValueError, r"amplitudes has to have shape \(3,\)"),
        ((torch.ones(3, 2), -torch.ones(3)), ValueError, "finite and at least 0"),
        ((torch.ones(3, 2), None, 0.0), ValueError, "tolerance has to be between 0 and 1"),
        ((torch.ones(3, 2), [1, 2, 3]), TypeError, "amplitudes has to be a tensor"),
        ((torch.zeros(0, 2),), ValueError, "weights is empty"),
    ],
)
def test_bad_input_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        measure.condensation(*arguments)
