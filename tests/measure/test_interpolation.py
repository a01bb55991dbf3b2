import math

import pytest
import torch
from torch import nn

from droplens import measure


class Line(nn.Module):
    """Predicts θ for every example: the squared loss is (θ − y)²."""

    def __init__(self, theta):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(theta, dtype=torch.float64))

    def forward(self, x):
        return self.theta * x


ONE = torch.ones(3, 1, dtype=torch.float64)


def network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 2)
    ).double()


def examples(n=20):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    return x, torch.randint(2, (n,), generator=generator)


def test_a_quadratic_bowl_follows_its_formula_and_has_no_barrier():
    alphas = [-0.5, 0.0, 0.25, 1.0, 1.5]
    result = measure.interpolation(Line(1.0), Line(3.0), (ONE, 2 * ONE), nn.MSELoss(), alphas)
    expected = [(1 + 2 * a - 2) ** 2 for a in alphas]
    torch.testing.assert_close(result.loss.tolist(), expected)
    assert result.barrier == 0
    assert result.masks == "off"


class Hill(Line):
    def forward(self, x):
        return torch.cos(self.theta) * x


def test_a_hill_between_two_minima_is_the_barrier():
    model_a, model_b = Hill(-math.pi / 2), Hill(math.pi / 2)
    result = measure.interpolation(model_a, model_b, (ONE, 0 * ONE), nn.MSELoss(), 11)
    torch.testing.assert_close(result.alphas, torch.linspace(0, 1, 11, dtype=torch.float64))
    assert result.barrier == pytest.approx(1)


def test_the_barrier_is_measured_from_the_straight_line_between_the_ends():
    model_a, model_b = Hill(0.0), Hill(math.pi)  # losses of 1 and 1 against 0, 0 in between
    assert measure.interpolation(model_a, model_b, (ONE, 0 * ONE), nn.MSELoss()).barrier == 0
    tilted = measure.interpolation(Hill(0.0), Hill(1.0), (ONE, 0 * ONE), nn.MSELoss(), [0.5])
    chord = (1 + math.cos(1.0) ** 2) / 2
    assert tilted.barrier == pytest.approx(math.cos(0.5) ** 2 - chord)
    outside = measure.interpolation(Hill(0.0), Hill(1.0), (ONE, 0 * ONE), nn.MSELoss(), [1.5])
    assert outside.barrier == 0


def test_the_ends_are_the_two_networks_with_their_statistics():
    x, y = examples()
    models = network(0), network(1)
    for k, model in enumerate(models):
        model[1].running_mean.fill_(k + 0.5)
    result = measure.interpolation(*models, [(x[:3], y[:3]), (x[3:], y[3:])], nn.CrossEntropyLoss())
    for end, model in zip((0, -1), models, strict=True):
        assert model.training
        with torch.no_grad():
            truth = float(nn.functional.cross_entropy(model.eval()(x), y))
        assert float(result.loss[end]) == pytest.approx(truth)
    assert float(models[0][1].running_mean[0]) == 0.5


def test_a_barrier_that_is_not_seen_is_no_certainty():
    model = network(0).eval()
    other = network(0).eval()
    with torch.no_grad():
        other[4].weight.add_(0.3)
    # The loss is convex in the last layer, so that it rises nowhere above the straight line.
    data, loss = examples(), nn.CrossEntropyLoss()
    found = measure.interpolation(model, other, data, loss, 5, "expected", seed=0)
    assert found.barrier == 0
    assert found.barrier_error > 0
    ends = measure.interpolation(model, other, data, loss, [0.0, 1.0], "expected", seed=0)
    assert (ends.barrier, ends.barrier_error) == (0, 0)
    assert measure.interpolation(model, other, data, loss, 5).barrier_error == 0


@pytest.mark.parametrize(
    ("model_b", "points", "error", "message"),
    [
        (nn.Linear(3, 2).double(), 5, ValueError, "share an architecture, but differ in '0.bias'"),
        ("b", 5, TypeError, "model_b has to be a torch module, but got str"),
        (network(1), 1, ValueError, "points has to be at least 2"),
        (network(1), [], ValueError, "at least one finite number"),
        (network(1), [math.nan], ValueError, "at least one finite number"),
    ],
)
def test_bad_input_is_refused(model_b, points, error, message):
    with pytest.raises(error, match=message):
        measure.interpolation(network(0), model_b, examples(), nn.CrossEntropyLoss(), points)
