"""Every interval of the landscape and Fisher measures holds the truth in 93–97% of 1,000 runs."""

import itertools
import math

import pytest
import torch
from torch import nn

from droplens import measure
from droplens.estimates import Estimate
from droplens.measure._trajectory import _slope
from tests.measure.test_density import smoothed
from tests.reference_measure import dense_fisher, dense_hessian

pytestmark = pytest.mark.slow

CE = nn.CrossEntropyLoss()
REPEATS = 1000
N, UNITS = 2, 2


class Masked(nn.Module):
    """A network whose mask, (N, UNITS), is written out."""

    def __init__(self, model, mask):
        super().__init__()
        self.first, self.last, self.mask = model[0], model[3], mask

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)) * self.mask)


def network(width=8, inputs=4, p=0.5):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(inputs, width), nn.Tanh(), nn.Dropout(p), nn.Linear(width, 3)
    ).double()


def examples(n=20, inputs=4):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, inputs, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (n,), generator=generator)


def small():
    """Few enough masks to write out, and more weights than are treated as a matrix."""
    return network(UNITS, 30), examples(N, 30)


def over_all_masks(dense, model, data):
    masks = torch.tensor(list(itertools.product([0.0, 2.0], repeat=N * UNITS))).double()
    return sum(dense(Masked(model, m.view(N, UNITS)), *data, CE) for m in masks) / len(masks)


def coverage(run, truth):
    held = 0
    for seed in range(REPEATS):
        low, high = run(seed).interval()
        held += low <= truth <= high
    return held / REPEATS


def assert_covers(run, truth):
    share = coverage(run, truth)
    assert 0.93 <= share <= 0.97, share


@pytest.mark.parametrize("masks", ["off", "expected"])
def test_flatness(masks):
    model, data = network(), examples()

    def run(seed, directions=8, draws=8):
        return measure.flatness(
            model, data, CE, directions, (0.5,), masks, seed=seed, draws=draws
        ).increase[0]

    many = 4000 if masks == "off" else 150
    assert_covers(run, float(run(10**6, many, many)))


@pytest.mark.parametrize("masks", ["off", "expected"])
@pytest.mark.parametrize("kind", ["raw", "scale_free"])
def test_sharpness(masks, kind):
    model, data = network(), examples()

    def run(seed, directions=16, draws=8):
        levels = ((0.1,), ()) if kind == "raw" else ((), (0.2,))
        found = measure.sharpness(
            model, data, CE, *levels, masks, directions=directions, draws=draws, seed=seed
        )
        return getattr(found, kind)[0]

    many = 4000 if masks == "off" else 150
    assert_covers(run, float(run(10**6, many, many)))


def test_interpolation_and_planes():
    model, data = network(), examples()
    other = network()
    with torch.no_grad():
        other[0].weight.mul_(-1)
    way = measure.between(model, other)

    def run(seed, draws=12):
        line = measure.interpolation(
            model, other, data, CE, [0.5], "expected", draws=draws, seed=seed
        )
        return Estimate(float(line.loss[0]), float(line.standard_error[0]), draws)

    truth = float(run(10**6, 4000))
    assert_covers(run, truth)

    def surface(seed, draws=12):
        found = measure.plane(
            model, data, CE, [way, {"3.bias": torch.ones(3)}], ([0.5], [0.0]), "expected",
            draws=draws, seed=seed,
        )  # fmt: skip
        return Estimate(float(found.loss[0, 0]), float(found.standard_error[0, 0]), draws)

    assert_covers(surface, truth)


@pytest.mark.parametrize("name", ["trace", "relative_trace"])
def test_hessian_over_probes(name):
    model, data = network(), examples()
    H = dense_hessian(model.eval(), *data, CE)
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    truth = H.trace() if name == "trace" else weights.square() @ H.diagonal()

    def run(seed):
        return getattr(measure.hessian(model, data, CE, 1, probes=12, seed=seed), name)

    assert_covers(run, float(truth))


@pytest.mark.parametrize("name", ["trace", "relative_trace"])
def test_hessian_over_masks_and_probes(name):
    model, data = small()
    H = over_all_masks(dense_hessian, model, data)
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    truth = H.trace() if name == "trace" else weights.square() @ H.diagonal()

    def run(seed):
        found = measure.hessian(model, data, CE, 0, "expected", probes=10, draws=16, seed=seed)
        return getattr(found, name)

    assert_covers(run, float(truth))


def test_the_largest_expected_eigenvalue():
    model, data = network(UNITS, 1), examples(N, 1)
    H = over_all_masks(dense_hessian, model, data)
    truth = float(torch.linalg.eigvalsh(H)[-1])

    def run(seed, draws=24):
        found = measure.hessian(model, data, CE, 1, "expected", draws=draws, seed=seed)
        return Estimate(float(found.top_eigenvalues[0]), float(found.standard_errors[0]), draws)

    assert_covers(run, truth)


@pytest.mark.parametrize("method", ["sampled", "sampled_hessian"])
def test_fisher_over_labels(method):
    model, (x, y) = network(4, 2), examples(20, 2)
    truth = float(dense_fisher(model.eval(), x, y, CE).trace())
    assert_covers(lambda s: measure.fisher(model, x, CE, method, draws=12, seed=s).trace, truth)


@pytest.mark.parametrize("method", ["exact", "sampled"])
def test_fisher_over_masks(method):
    model, data = small()
    truth = float(over_all_masks(dense_fisher, model, data).trace())

    def run(seed):
        return measure.fisher(model, data, CE, method, "expected", draws=24, seed=seed).trace

    assert_covers(run, truth)


def test_fisher_spectrum_over_probes():
    model, (x, y) = network(), examples()
    values = torch.linalg.eigvalsh(dense_fisher(model.eval(), x, y, CE)).clamp_min(0)
    truths = float((values / (values + 0.05)).sum()), float(values.sum())
    held = [0, 0]
    for seed in range(REPEATS):
        found = measure.fisher_spectrum(model, x, CE, 0, steps=12, seed=seed)
        for k, estimate in enumerate((found.effective_dimension, found.trace)):
            low, high = estimate.interval()
            held[k] += low <= truths[k] <= high
    assert all(0.93 <= share / REPEATS <= 0.97 for share in held), held


def test_spectral_density_over_probes():
    model, (x, y) = network(), examples()
    values = torch.linalg.eigvalsh(dense_hessian(model.eval(), x, y, CE))
    held = torch.zeros(3)
    for seed in range(REPEATS):
        found = measure.spectral_density(
            model, (x, y), CE, probes=8, steps=32, width=0.1, seed=seed
        )
        at = found.density[100]
        truths = (
            float(smoothed(values, found.grid[100:101], 0.1)),
            float(values.sum()),
            float(values.clamp_max(0).sum()),
        )
        for k, estimate in enumerate((at, found.trace, found.negative)):
            low, high = estimate.interval()
            held[k] += low <= truths[k] <= high
    assert ((held / REPEATS >= 0.93) & (held / REPEATS <= 0.97)).all(), held


def test_the_slope_of_variance_on_flatness():
    generator = torch.Generator().manual_seed(0)

    def run(seed):
        x = torch.linspace(-1, 1, 9, dtype=torch.float64)
        noise = torch.randn(9, generator=generator, dtype=torch.float64)
        return _slope((1 - 2 * x + 0.3 * noise).exp(), x.exp())

    assert_covers(run, -2.0)
    assert math.isnan(_slope(torch.ones(2), torch.ones(2)).value)
