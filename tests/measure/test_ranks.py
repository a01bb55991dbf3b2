import math

import pytest
import torch
from torch import nn

import droplens as dl
from droplens import measure


def network(bias=True, width=6, p=0.5):
    torch.manual_seed(0)
    layers = (nn.Linear(4, width), nn.Tanh(), nn.Dropout(p), nn.Linear(width, 3, bias=bias))
    return nn.Sequential(*layers).double().eval()


def examples(n=20):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    return x, torch.randn(n, 3, generator=generator, dtype=torch.float64)


def test_spectra_are_those_of_the_whole_matrices():
    model, (x, _) = network(), examples()
    for data in (x, [x[:3], x[3:11], x[11:]]):
        found = measure.ranks(model, data)
        with torch.no_grad():
            h, f = model[:2](x), model(x)
        torch.testing.assert_close(found.features["2"].singular_values, torch.linalg.svdvals(h))
        torch.testing.assert_close(found.predictions.singular_values, torch.linalg.svdvals(f))
        assert found.predictions.effective_rank == pytest.approx(measure.spectrum(f).effective_rank)
        assert list(found.weights) == ["0.weight", "3.weight"]
        assert found.missing == {}


def test_images_and_few_examples():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(0.1), nn.Conv2d(2, 3, 2))
    x = torch.randn(2, 2, 4, 4)
    found = measure.ranks(model, x)
    assert len(found.features["0"].singular_values) == 2
    assert len(found.predictions.singular_values) == 3
    one = measure.ranks(network(), examples(1)[0])
    assert one.predictions.effective_rank == pytest.approx(1)


def test_features_too_many_to_follow_are_said(monkeypatch):
    monkeypatch.setattr(measure._readers, "MOST_FEATURES", 6)
    monkeypatch.setattr(measure._ranks, "MOST_FEATURES", 6)
    found = measure.ranks(network(), examples()[0])
    assert found.features == {}
    assert found.missing == {"features at 2": "6 features, above the 5 that are followed"}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("width", [2, 6])
def test_the_prediction_is_the_prox_of_the_targets_spectrum(bias, width):
    model, (x, y) = network(bias, width), examples()
    for data in ((x, y), [(x[:7], y[:7]), (x[7:9], y[7:9]), (x[9:], y[9:])]):
        found = measure.prediction_spectrum(model, data)
        f = model(x).detach()
        if bias:
            y_, f = y - y.mean(0), f - f.mean(0)
        else:
            y_ = y
        m = torch.linalg.svdvals(y_)
        expected = dl.linear.prox_k_support(m, 1, 1.0 / width)
        expected[width:] = 0
        torch.testing.assert_close(found.targets, m)
        torch.testing.assert_close(found.predicted, torch.as_tensor(expected))
        torch.testing.assert_close(found.actual, torch.linalg.svdvals(f))
        distance = float((found.actual - found.predicted).norm() / m.norm())
        assert found.distance == pytest.approx(distance)
        assert (found.site, found.layer, found.rate, found.width) == ("2", "3", 0.5, width)
        assert (found.block_size, found.centred) == (1, bias)


@pytest.mark.parametrize("block", [1, 2])
def test_the_solution_of_the_linear_problem_has_the_spectrum_predicted(block):
    """X = I: then the features of a linear network are as free as the theory has them."""
    generator = torch.Generator().manual_seed(3)
    n, width = 8, 8
    Y = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    solution = dl.linear.solve(torch.eye(n, dtype=torch.float64), Y, 0.4, width, block_size=block)
    drop = nn.Dropout(0.4) if block == 1 else dl.nn.GroupedDropout(0.4, 2)
    model = nn.Sequential(
        nn.Linear(n, width, bias=False), drop, nn.Linear(width, 3, bias=False)
    ).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.as_tensor(solution.incoming).T)
        model[2].weight.copy_(torch.as_tensor(solution.outgoing))
    found = measure.prediction_spectrum(model, (torch.eye(n, dtype=torch.float64), Y))
    assert found.block_size == block
    assert found.distance < 1e-8
    assert float(found.predicted.sum()) < float(found.targets.sum())


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = network()

    def forward(self, x):
        return 2 * self.inner(x)


X, Y = examples()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: measure.ranks(3, X), TypeError, "model has to be a torch module"),
        (lambda: measure.ranks(network(), X * math.nan), ValueError, "inputs holds NaN or Inf"),
        (lambda: measure.prediction_spectrum(3, (X, Y)), TypeError, "model has to be a torch mod"),
        (
            lambda: measure.prediction_spectrum(network(), (X, Y.argmax(1))),
            ValueError,
            "squared loss on real-valued targets, but these are torch.int64",
        ),
        (
            lambda: measure.prediction_spectrum(network(), (X, Y[:, :2])),
            ValueError,
            "targets has 2 numbers an example, but the predictions have 3",
        ),
        (lambda: measure.prediction_spectrum(network(), X), ValueError, "data has no targets"),
        (
            lambda: measure.prediction_spectrum(network()[:2], (X, X)),
            ValueError,
            "no dropout stands right before a last linear layer",
        ),
        (
            lambda: measure.prediction_spectrum(Scaled(), (X, Y)),
            ValueError,
            "no dropout stands right before a last linear layer",
        ),
        (
            lambda: measure.prediction_spectrum(
                nn.Sequential(dl.nn.DropPath(0.5), nn.Linear(4, 3)).double(), (X, Y)
            ),
            ValueError,
            "the spectrum is predicted for Dropout, GaussianDropout and GroupedDropout",
        ),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
