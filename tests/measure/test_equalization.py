import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from droplens import measure

U = torch.tensor([[3.0, 0.0, 1.0], [4.0, 1.0, 0.0]])  # column norms 5, 1, 1
V = torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.0, 2.0]])  # column norms 1, 2, 2


def test_scores_are_products_of_norms():
    result = measure.equalization(U, V)
    assert result.scores.tolist() == [5, 2, 2]
    assert result.variance == pytest.approx(2)
    assert result.variation == pytest.approx(math.sqrt(2) / 3)
    assert result.participation == pytest.approx(81 / 33)


def test_activations_count_by_their_root_mean_square():
    H = torch.tensor([[3.0, 1.0, 0.0], [4.0, 1.0, 2.0]])
    result = measure.equalization(U, H, rows="examples")
    expected = torch.tensor([5 * math.sqrt(12.5), 1.0, math.sqrt(2)], dtype=torch.float64)
    torch.testing.assert_close(result.scores, expected)


def test_a_metric_turns_weights_into_activations():
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(50, 2, generator=generator, dtype=torch.float64)
    by_metric = measure.equalization(U, V, metric=X.T @ X / 50)
    by_activations = measure.equalization(U, X @ V.double(), rows="examples")
    torch.testing.assert_close(by_metric.scores, by_activations.scores)


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e30])
def test_equal_units_at_any_scale(scale):
    result = measure.equalization(torch.eye(4) * scale, torch.eye(4))
    assert result.variation == pytest.approx(0)
    assert result.participation == pytest.approx(4)


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=20))
def test_participation_follows_the_variation(scores):
    result = measure.equalization(torch.diag(torch.tensor(scores)), torch.eye(len(scores)))
    assert result.participation == pytest.approx(len(scores) / (1 + result.variation**2))
    assert 1 - 1e-9 <= result.participation <= len(scores) + 1e-9


def test_degenerate_units():
    one = measure.equalization(torch.ones(2, 1), torch.ones(3, 1))
    assert (one.variation, one.participation) == (0, 1)
    nothing = measure.equalization(torch.zeros(2, 3), V)
    assert (nothing.variation, nothing.variance, nothing.participation) == (0, 0, 0)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((U, V[:, :2]), {}, ValueError, "outgoing has 3 units .* has 2"),
        ((U[0], V), {}, ValueError, "outgoing has to be a matrix, but got shape"),
        ((U, V * math.nan), {}, ValueError, "activations_or_incoming holds NaN or Inf"),
        ((U.long(), V), {}, TypeError, "outgoing has to be floating point"),
        (([1], V), {}, TypeError, "outgoing has to be a tensor, but got list"),
        ((U[:, :0], V[:, :0]), {}, ValueError, "outgoing is empty"),
        ((U, V), {"rows": "both"}, ValueError, "rows has to be 'weights' or 'examples'"),
        ((U, V), {"metric": torch.eye(3)}, ValueError, r"metric has to have shape \(2, 2\)"),
        ((U, V), {"metric": U, "rows": "examples"}, ValueError, "metric belongs to incoming"),
    ],
)
def test_bad_input_is_refused(arguments, options, error, message):
    with pytest.raises(error, match=message):
        measure.equalization(*arguments, **options)
