"""Masks off, held, or averaged over: every measure against networks whose masks are written out."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Sampler, TensorDataset

from droplens import measure
from droplens.estimates import crossed_estimate
from droplens.gates import HeldMasks
from tests.reference_measure import dense_fisher, dense_hessian, flat_parameters

CE = nn.CrossEntropyLoss()
N, UNITS = 2, 2
# Every mask of N examples and UNITS units at p = 1/2, all equally likely.
ALL = torch.tensor(list(itertools.product([0.0, 2.0], repeat=N * UNITS))).double()
ALL = ALL.reshape(-1, N, UNITS)


def network(p=0.5):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(2, UNITS), nn.Tanh(), nn.Dropout(p), nn.Linear(UNITS, 2)
    ).double()


class Masked(nn.Module):
    """The same network with its mask written out."""

    def __init__(self, model, mask):
        super().__init__()
        self.first, self.last, self.mask = model[0], model[3], mask

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)) * self.mask)


def examples(n=N):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 2, generator=generator, dtype=torch.float64), torch.arange(n) % 2


@pytest.fixture
def enumerated(monkeypatch):
    """Draw number k is the k-th of all masks."""

    def hold(self, draw, batch):
        self.mask = ALL[draw % len(ALL)]

    def visit(self, call, x):
        self.drew = True
        return x * self.mask

    monkeypatch.setattr(HeldMasks, "hold", hold)
    monkeypatch.setattr(HeldMasks, "visit", visit)


def moved(model, step, radius):
    """Every masked network with its weights moved, one after the other."""
    for mask in ALL:
        twin = Masked(model, mask)
        with torch.no_grad():
            for name, p in model.named_parameters():
                p += radius * step[name]
        yield twin
        with torch.no_grad():
            for name, p in model.named_parameters():
                p -= radius * step[name]


def mean_loss(model, x, y, step, radius):
    with torch.no_grad():
        return sum(float(CE(twin(x), y)) for twin in moved(model, step, radius)) / len(ALL)


def some_step(model, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(p.shape, generator=generator, dtype=p.dtype)
        for name, p in model.named_parameters()
    }


def test_expected_losses_are_the_mean_over_all_masks(enumerated):
    model, (x, y) = network(), examples()
    first, second = some_step(model), some_step(model, 4)
    found = measure.flatness(model, (x, y), CE, [first], (0.0, 0.7), "expected", draws=len(ALL))
    for k, radius in enumerate(found.radii):
        truth = mean_loss(model, x, y, first, radius)
        assert float(found.values[0, k]) == pytest.approx(truth, rel=1e-10)
    assert found.draws == len(ALL)
    assert found.masks == "expected"
    assert found.loss[1].over == "masks"
    surface = measure.plane(
        model, (x, y), CE, [first, second], ([0.0, 0.7], [0.0]), "expected", draws=len(ALL)
    )
    torch.testing.assert_close(surface.loss[0], found.values[0], rtol=1e-10, atol=0)
    other = network()
    with torch.no_grad():
        for name, p in other.named_parameters():
            p += first[name]
    line = measure.interpolation(
        model, other, (x, y), CE, [0.0, 0.7, 1.0], "expected", draws=len(ALL)
    )
    torch.testing.assert_close(line.loss[:2], found.values[0], rtol=1e-10, atol=0)


def test_the_expected_hessian_is_that_of_the_mean_loss(enumerated):
    model, (x, y) = network(), examples()
    dense = sum(dense_hessian(Masked(model, mask), x, y, CE) for mask in ALL) / len(ALL)
    found = measure.hessian(model, (x, y), CE, 4, "expected", draws=len(ALL))
    truth = torch.linalg.eigvalsh(dense).flip(0)[:4]
    torch.testing.assert_close(found.top_eigenvalues, truth, rtol=1e-8, atol=1e-12)
    assert float(found.trace) == pytest.approx(float(dense.trace()), rel=1e-10)
    _, flat = flat_parameters(model)
    relative = float(flat.square() @ dense.diagonal())
    assert float(found.relative_trace) == pytest.approx(relative, rel=1e-10)
    assert found.trace.over == "masks"
    # The error of the mean of as many draws, each mask once.
    traces = torch.stack([dense_hessian(Masked(model, mask), x, y, CE).trace() for mask in ALL])
    assert found.trace.standard_error == pytest.approx(float(traces.std()) / len(ALL) ** 0.5)


def test_the_expected_fisher_is_the_mean_over_all_masks(enumerated):
    model, (x, y) = network(), examples()
    dense = sum(dense_fisher(Masked(model, mask), x, y, CE) for mask in ALL) / len(ALL)
    found = measure.fisher(model, (x, y), CE, masks="expected", draws=len(ALL))
    names, _ = flat_parameters(model)
    diagonal = torch.cat([found.diagonal[name].flatten() for name in names])
    torch.testing.assert_close(diagonal, dense.diagonal(), rtol=1e-10, atol=1e-14)
    assert float(found.trace) == pytest.approx(float(dense.trace()), rel=1e-10)
    assert set(found.how.values()) == {"layer by layer"}
    whole = measure.fisher_spectrum(model, x, CE, 3, "expected", draws=len(ALL), probes=2)
    truth = torch.linalg.eigvalsh(dense).flip(0)
    torch.testing.assert_close(whole.top_eigenvalues, truth[:3], rtol=1e-8, atol=1e-12)


class Recurrent(nn.Module):
    """Gradients example by example, in a network that drops units."""

    def __init__(self):
        super().__init__()
        self.cell, self.last = nn.GRU(2, UNITS), nn.Linear(UNITS, 2)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.last(self.drop(self.cell(x.unsqueeze(0))[0][0]))


def test_masks_stay_with_their_example_where_gradients_are_taken_one_by_one(enumerated):
    torch.manual_seed(0)
    model, (x, y) = Recurrent().double(), examples()
    found = measure.fisher(model, (x, y), CE, masks="expected", draws=len(ALL))
    assert found.how["cell.weight_ih_l0"] == "example by example"

    class Written(nn.Module):
        def __init__(self, mask):
            super().__init__()
            self.cell, self.last, self.mask = model.cell, model.last, mask

        def forward(self, x):
            return self.last(self.cell(x.unsqueeze(0))[0][0] * self.mask)

    dense = sum(dense_fisher(Written(mask), x, y, CE) for mask in ALL) / len(ALL)
    names, _ = flat_parameters(Written(ALL[0]))
    diagonal = torch.cat([found.diagonal[name].flatten() for name in names])
    torch.testing.assert_close(diagonal, dense.diagonal(), rtol=1e-10, atol=1e-14)


def largest_node(model, data, **options):
    found = measure.spectral_density(model, data, CE, probes=2, **options)
    return found.quadrature.nodes[0].max()


def fisher_top(model, data, **options):
    return measure.fisher_spectrum(model, data, CE, probes=2, **options).top_eigenvalues


MEASURES = {
    "flatness": lambda m, d, **o: measure.flatness(m, d, CE, 3, (0.0, 1.0), **o).values,
    "plane": lambda m, d, **o: measure.plane(m, d, CE, points=(-1.0, 0.0, 1.0), **o).loss,
    "interpolation": lambda m, d, **o: measure.interpolation(m, network(), d, CE, 3, **o).loss,
    "sharpness": lambda m, d, **o: measure.sharpness(m, d, CE, directions=2, **o).raw_values,
    "hessian": lambda m, d, **o: measure.hessian(m, d, CE, 2, **o).top_eigenvalues,
    "fisher": lambda m, d, **o: measure.fisher(m, d, CE, **o).diagonal["0.weight"],
    "density": largest_node,
    "fisher spectrum": fisher_top,
}


@pytest.mark.parametrize("name", MEASURES)
def test_one_seed_one_network(name):
    """Held masks come again from the seed, batch by batch, and differ between seeds and modes."""
    x, y = examples(8)
    run, data = MEASURES[name], [(x[:5], y[:5]), (x[5:], y[5:])]
    model = network().train()
    stream = torch.get_rng_state()
    found = {
        (masks, seed): run(model, data, masks=masks, seed=seed, draws=3)
        for masks in ("off", "fixed", "expected")
        for seed in (0, 1)
    }
    again = run(model, data, masks="fixed", seed=0)
    assert torch.equal(found["fixed", 0], again)
    assert not torch.allclose(found["fixed", 0], found["fixed", 1])
    assert not torch.allclose(found["fixed", 0], found["off", 0])
    assert not torch.allclose(found["expected", 0], found["off", 0])
    assert not torch.allclose(found["expected", 0], found["expected", 1])
    assert model.training
    assert torch.equal(stream, torch.get_rng_state())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("name", MEASURES)
def test_a_network_that_drops_nothing_needs_one_draw(name):
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    other, data = MEASURES[name], examples(6)
    if name == "interpolation":

        def other(m, d, **o):
            return measure.interpolation(m, m, d, CE, 3, **o).loss

    torch.testing.assert_close(
        other(model, data, masks="expected", seed=0), other(model, data, masks="off", seed=0)
    )
    assert measure.flatness(model, data, CE, 2, masks="expected").draws == 1
    assert measure.hessian(model, data, CE, 2, masks="expected").trace.standard_error == 0


@pytest.mark.parametrize("name", MEASURES)
def test_bad_modes_are_refused(name):
    run, data = MEASURES[name], examples(4)
    with pytest.raises(ValueError, match="masks has to be 'off', 'fixed' or 'expected'"):
        run(network(), data, masks="on")
    with pytest.raises(ValueError, match="draws has to be at least 2, but got 1"):
        run(network(), data, masks="expected", draws=1)
    unknown = nn.Sequential(*network(), nn.AlphaDropout(0.3)).double()
    if name != "interpolation":
        with pytest.raises(ValueError, match=r"site '4': its masks cannot be held .* masks='off'"):
            run(unknown, data, masks="fixed")


class Restless(Sampler):
    """Another order in every pass, from a stream that no one else knows."""

    def __init__(self):
        self.source = np.random.default_rng(0)

    def __iter__(self):
        return iter(self.source.permutation(8).tolist())

    def __len__(self):
        return 8


def test_data_in_another_order_breaks_held_masks_and_is_detected():
    def loader(size=3):
        return DataLoader(TensorDataset(*examples(8)), batch_size=size, sampler=Restless())

    # In other batches the examples are the same, and so is the Hessian without masks.
    found = measure.hessian(network(), loader(), CE, 1, masks="off")
    truth = measure.hessian(network(), examples(8), CE, 1)
    assert float(found.trace) == pytest.approx(float(truth.trace))
    # The second: one batch, whose examples change places.
    for size in (3, 8):
        with pytest.raises(ValueError, match="or comes in another order"):
            measure.hessian(network(), loader(size), CE, 1, masks="fixed")
        with pytest.raises(ValueError, match="or comes in another order"):
            measure.curvature(network(), loader(size), CE, directions=1, parameters=3)


def test_crossed_errors_of_additive_draws_add_in_squares():
    """Y = a + b with no interaction: the error is that of both means."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, generator=generator, dtype=torch.float64) for n in (7, 5))
    found = crossed_estimate(a[:, None] + b, ("masks", "probes"))
    truth = math.hypot(float(a.std()) / 7**0.5, float(b.std()) / 5**0.5)
    assert found.standard_error == pytest.approx(truth)
    assert found.over == "masks and probes"
    assert 4 <= found.n - 1 <= 10
    assert crossed_estimate(a[:, None]).over == "masks"
    assert crossed_estimate(b[None]).over == "directions"
    assert crossed_estimate(torch.ones(3, 3)).standard_error == 0
    assert math.isnan(crossed_estimate(torch.full((3, 3), math.nan)).standard_error)
    with pytest.raises(ValueError, match="table has to be a matrix of draws"):
        crossed_estimate(a)


@pytest.mark.slow
@pytest.mark.parametrize("interaction", [0.0, 1.0, 3.0])
@pytest.mark.parametrize(("rows", "columns"), [(16, 8), (8, 16), (5, 5), (40, 3)])
def test_crossed_intervals_cover(interaction, rows, columns):
    generator = torch.Generator().manual_seed(rows * columns)
    repeats = 1000
    covered = 0
    for _ in range(repeats):
        a = torch.randn(rows, 1, generator=generator)
        b = 1.5 * torch.randn(1, columns, generator=generator)
        e = interaction * torch.randn(rows, columns, generator=generator)
        low, high = crossed_estimate(a + b + e).interval()
        covered += low <= 0 <= high
    assert covered / repeats >= 0.93
    if interaction <= 1:  # where it dominates, the interval is somewhat too wide
        assert covered / repeats <= 0.97
