"""Every interval of the landscape and Fisher measures holds the truth in 93–97% of 1,000 runs.

At the measures' own defaults.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from droplens import measure
from droplens.estimates import Estimate
from droplens.measure import _density, _hessian
from droplens.measure._masks import Applied
from droplens.measure._operators import WeightMatrix
from droplens.measure._trajectory import _slope
from tests.reference_measure import dense_fisher, dense_hessian

pytestmark = pytest.mark.slow

CE = nn.CrossEntropyLoss()
REPEATS = 1000
N, UNITS = 2, 2


class Masked(nn.Module):
    """A network whose mask, one number a unit, is written out."""

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


def by_example(dense, model, data):
    """The matrix of every example under every mask of its own, (examples, masks, d, d)."""
    masks = torch.tensor(list(itertools.product([0.0, 2.0], repeat=model[0].out_features)))
    pairs = [(x[None], y[None]) for x, y in zip(*data, strict=True)]
    return torch.stack(
        [
            torch.stack([dense(Masked(model, m), *pair, CE) for m in masks.double()])
            for pair in pairs
        ]
    ).detach()


def over_all_masks(dense, model, data):
    return by_example(dense, model, data).mean((0, 1))


def assert_covers(run, truth, most=0.97):
    assert_all_cover(lambda seed: (run(seed),), (truth,), most)


def assert_all_cover(run, truths, most=0.97):
    held = [0] * len(truths)
    for seed in range(REPEATS):
        for k, (estimate, truth) in enumerate(zip(run(seed), truths, strict=True)):
            low, high = estimate.interval()
            held[k] += low <= truth <= high
    assert all(0.93 <= count / REPEATS <= most for count in held), held


class Written(WeightMatrix):
    """A matrix for every draw of masks, written out in place of the products of a network."""

    def __init__(self, matrices, weights, count, source):
        self.size, self.dtype, self.divisor = len(weights), np.float64, 1.0
        self.masks, self._matrices, self._weights = Applied(count, None), matrices, weights
        self._source, self._draws, self._means = source, {}, {}
        self._curved, self.moves = False, True

    def _of_draw(self, draw):
        if draw not in self._draws:
            examples, masks = self._matrices.shape[:2]
            chosen = self._source.integers(masks, size=examples)
            self._draws[draw] = self._matrices[np.arange(examples), chosen].mean(0)
        return self._draws[draw]

    def products_of_draw(self, draw, V):
        return self._of_draw(draw) @ V

    def products(self, V, draws=None):
        count = self.masks.count
        draws = draws if draws is not None and count > 1 else range(count)
        if draws not in self._means:
            self._means[draws] = sum(map(self._of_draw, draws)) / len(draws)
        return self._means[draws] @ V

    def weights(self):
        return self._weights

    def named(self, vector):
        return {}

    def pairs(self):
        raise NotImplementedError

    def graph(self, batch, outputs):
        raise NotImplementedError


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def written(monkeypatch, dense, masks):
    """Let the measures work on dense matrices: 1,000 runs at their defaults in seconds.

    That the products of a network are those of its dense matrix, masks and all, others test.
    """
    if masks == "off":
        model, data = network(), examples()
        matrices = dense(model.eval(), *data, CE)[None, None]
    else:
        model, data = network(4, 16), examples(20, 16)
        matrices = by_example(dense, model, data)
    source = np.random.default_rng(2)

    def make(*given):
        applied = next(a for a in given if isinstance(a, Applied))
        return Written(matrices.numpy(), flat(model).numpy(), applied.count, source)

    for place, name in (
        (_hessian, "LossHessian"),
        (_density, "LossHessian"),
        (_density, "GaussNewton"),
    ):
        monkeypatch.setattr(place, name, make)
    return model, data, matrices.mean((0, 1))


@pytest.mark.parametrize("masks", ["off", "expected"])
def test_flatness(masks):
    model, data = network(), examples()

    def run(seed, **more):
        return measure.flatness(
            model, data, CE, radii=(0.5,), masks=masks, seed=seed, **more
        ).increase[0]

    many = 4000 if masks == "off" else 150
    assert_covers(run, float(run(10**6, directions=many, draws=many)))


@pytest.mark.parametrize("masks", ["off", "expected"])
@pytest.mark.parametrize("kind", ["raw", "scale_free"])
def test_sharpness(masks, kind):
    model, data = network(), examples()

    def run(seed, **more):
        levels = ((0.1,), ()) if kind == "raw" else ((), (0.2,))
        found = measure.sharpness(model, data, CE, *levels, masks, seed=seed, **more)
        return getattr(found, kind)[0]

    many = 4000 if masks == "off" else 150
    assert_covers(run, float(run(10**6, directions=many, draws=many)))


def test_interpolation_and_planes():
    model, data = network(), examples()
    other = network()
    with torch.no_grad():
        other[0].weight.mul_(-1)
    way = measure.between(model, other)

    def run(seed, **more):
        line = measure.interpolation(model, other, data, CE, [0.5], "expected", seed=seed, **more)
        return Estimate(float(line.loss[0]), float(line.standard_error[0]), line.draws)

    truth = float(run(10**6, draws=4000))
    assert_covers(run, truth)

    def surface(seed):
        found = measure.plane(
            model, data, CE, [way, {"3.bias": torch.ones(3)}], ([0.5], [0.0]), "expected", seed=seed
        )
        return Estimate(float(found.loss[0, 0]), float(found.standard_error[0, 0]), found.draws)

    assert_covers(surface, truth)


# A barrier as small as its noise is held more often: what noise takes off it stops at 0.
@pytest.mark.parametrize(("steps", "most"), [(100, 0.97), (16, 1.0)])
def test_the_barrier(steps, most):
    """Between a network and itself with its hidden units in another order."""
    model, data = network(), examples()
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        CE(model(data[0]), data[1]).backward()
        optimizer.step()
    other = network()
    with torch.no_grad():
        for place, dim in (("0.weight", 0), ("0.bias", 0), ("3.weight", 1)):
            other.get_parameter(place).copy_(model.get_parameter(place).roll(1, dim))
        other[3].bias.copy_(model[3].bias)

    def line(a, b, masks="off", seed=None):
        return measure.interpolation(a, b, data, CE, 5, masks, seed=seed)

    of_units = torch.tensor(list(itertools.product([0.0, 2.0], repeat=8))).double()
    loss = sum(line(Masked(model, m), Masked(other, m)).loss for m in of_units) / len(of_units)
    truth = float((loss - torch.linspace(float(loss[0]), float(loss[-1]), 5).double()).max())
    assert truth > 0.01

    def run(seed):
        found = line(model, other, "expected", seed)
        return Estimate(found.barrier, found.barrier_error, found.draws)

    assert_covers(run, truth, most)


@pytest.mark.parametrize("masks", ["off", "expected"])
def test_hessian(monkeypatch, masks):
    model, data, H = written(monkeypatch, dense_hessian, masks)
    truths = float(H.trace()), float(flat(model).square() @ H.diagonal())

    def run(seed):
        found = measure.hessian(model, data, CE, masks=masks, seed=seed)
        return found.trace, found.relative_trace

    assert_all_cover(run, truths)


def test_the_largest_expected_eigenvalue():
    model, data = network(UNITS, 1), examples(N, 1)
    H = over_all_masks(dense_hessian, model, data)
    truth = float(torch.linalg.eigvalsh(H)[-1])

    def run(seed):
        found = measure.hessian(model, data, CE, 1, "expected", seed=seed)
        return Estimate(
            float(found.top_eigenvalues[0]), float(found.standard_errors[0]), found.draws
        )

    assert_covers(run, truth)


@pytest.mark.parametrize("method", ["sampled", "sampled_hessian"])
def test_fisher_over_labels(method):
    model, (x, y) = network(4, 2), examples(20, 2)
    truth = float(dense_fisher(model.eval(), x, y, CE).trace())
    assert_covers(lambda s: measure.fisher(model, x, CE, method, seed=s).trace, truth)


@pytest.mark.parametrize("method", ["exact", "sampled"])
def test_fisher_over_masks(method):
    model, data = small()
    truth = float(over_all_masks(dense_fisher, model, data).trace())

    def run(seed):
        return measure.fisher(model, data, CE, method, "expected", seed=seed).trace

    assert_covers(run, truth)


@pytest.mark.parametrize("masks", ["off", "expected"])
def test_fisher_spectrum(monkeypatch, masks):
    model, data, F = written(monkeypatch, dense_fisher, masks)
    values = torch.linalg.eigvalsh(F).clamp_min(0)
    truths = float((values / (values + 0.05)).sum()), float(values.sum())

    def run(seed):
        found = measure.fisher_spectrum(model, data, CE, masks=masks, damping=0.05, seed=seed)
        return found.effective_dimension, found.trace

    assert_all_cover(run, truths)


@pytest.mark.parametrize("masks", ["off", "expected"])
def test_spectral_density(monkeypatch, masks):
    model, data, H = written(monkeypatch, dense_hessian, masks)
    values = torch.linalg.eigvalsh(H)

    def run(seed):
        found = measure.spectral_density(
            model, data, CE, masks=masks, steps=24, width=0.1, seed=seed
        )
        bump = found.quadrature.mean(lambda nodes: torch.exp(-0.5 * ((nodes - 0.3) / 0.1) ** 2))
        return bump, found.trace, found.negative

    bump = float(torch.exp(-0.5 * ((values - 0.3) / 0.1) ** 2).mean())
    assert_all_cover(run, (bump, float(values.sum()), float(values.clamp_max(0).sum())))


def test_the_slope_of_variance_on_flatness():
    generator = torch.Generator().manual_seed(0)

    def run(seed):
        x = torch.linspace(-1, 1, 9, dtype=torch.float64)
        noise = torch.randn(9, generator=generator, dtype=torch.float64)
        return _slope((1 - 2 * x + 0.3 * noise).exp(), x.exp())

    assert_covers(run, -2.0)
    assert math.isnan(_slope(torch.ones(2), torch.ones(2)).value)
