import copy
import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from droplens import measure
from droplens.batches import as_batches
from droplens.losses import family
from droplens.measure._density import matrix_of
from droplens.measure._lanczos import lanczos_quadrature
from droplens.measure._masks import Masking
from droplens.measure._operators import GaussNewton
from droplens.measure._risk import Loss
from tests.reference_measure import dense_fisher, dense_hessian

CE = nn.CrossEntropyLoss()


def network(activation=nn.Tanh, width=12):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, width), activation(), nn.Linear(width, 3)).double()


def examples(n=20):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (n,), generator=generator)


LOSSES = {
    "classes": (CE, None),
    "weighted": (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 9.0]).double()), None),
    "summed": (nn.CrossEntropyLoss(reduction="sum"), None),
    "squared": (nn.MSELoss(), torch.ones(20, 3, dtype=torch.float64)),
    "logistic": (nn.BCEWithLogitsLoss(), torch.ones(20, 3, dtype=torch.float64)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_fisher_products_equal_the_dense_matrix(name):
    model, (x, labels) = network(), examples()
    loss, y = LOSSES[name]
    y = labels if y is None else y
    F = dense_fisher(model, x, y, loss).numpy()
    V = np.random.default_rng(0).standard_normal((len(F), 2))
    for data in ((x, y), [(x[:7], y[:7]), (x[7:], y[7:])]):
        with Masking("off", 2, 0).applied(model) as applied:
            matrix = GaussNewton(model, as_batches(data), Loss(loss), applied, family(loss))
            found = matrix.products(V)
        np.testing.assert_allclose(found, F @ V, rtol=1e-8, atol=1e-12)
    whole = measure.fisher_spectrum(model, (x, y), loss, 3, seed=0, probes=2, steps=5)
    truth = np.linalg.eigvalsh(F)[::-1]
    np.testing.assert_allclose(whole.top_eigenvalues, truth[:3], rtol=1e-6)
    assert (whole.residuals < 2e-4 * truth[0]).all()


def test_lanczos_integrates_polynomials_exactly():
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((30, 30))
    matrix = matrix + matrix.T
    v = rng.standard_normal(30)
    nodes, weights = lanczos_quadrature(lambda q: matrix @ q, v, 4)
    assert len(nodes) == 4
    for degree in range(8):
        truth = v @ np.linalg.matrix_power(matrix, degree) @ v / (v @ v)
        assert weights @ nodes**degree == pytest.approx(truth, rel=1e-9)


def test_lanczos_stops_where_the_space_ends():
    matrix = np.diag([1.0, 1.0, 5.0, 0.0])
    nodes, weights = lanczos_quadrature(lambda q: matrix @ q, np.ones(4), 60)
    kept = weights > 1e-12
    np.testing.assert_allclose(nodes[kept], [0, 1, 5], atol=1e-12)
    np.testing.assert_allclose(weights[kept], [0.25, 0.5, 0.25])


def smoothed(values, grid, width):
    distance = (grid[:, None] - values) / width
    return torch.exp(-0.5 * distance.square()).mean(1) / (width * math.sqrt(2 * math.pi))


@pytest.mark.parametrize("matrix", ["hessian", "fisher"])
def test_the_density_is_that_of_the_dense_eigenvalues(matrix):
    model, (x, y) = network(), examples()
    dense = dense_hessian if matrix == "hessian" else dense_fisher
    values, Q = torch.linalg.eigh(dense(model, x, y, CE))
    probes = 40
    found = measure.spectral_density(
        model, (x, y), CE, matrix, probes=probes, steps=30, width=0.05, seed=0
    )
    truth = smoothed(values, found.grid, 0.05)
    seen = torch.tensor([float(e) for e in found.density])
    # sᵀAs of random signs has variance 2 Σ_{i≠j} A_ij².
    bumps = [smoothed(v[None], found.grid, 0.05) for v in values]
    A = torch.einsum("ik,kg,jk->gij", Q, torch.stack(bumps), Q) / len(values)
    off = A.square().sum((1, 2)) - A.diagonal(dim1=1, dim2=2).square().sum(1)
    errors = (2 * off / probes).sqrt()
    z = ((seen - truth) / errors)[truth > 1e-2 * truth.max()]
    assert z.abs().max() < 4.5
    assert abs(float(found.trace) - float(values.sum())) < 4 * found.trace.standard_error
    step = float(found.grid[1] - found.grid[0])
    assert float(seen.sum()) * step == pytest.approx(1, abs=1e-4)
    below = float(values.clamp_max(0).sum())
    if matrix == "fisher":
        assert abs(float(found.negative)) < 1e-9
    else:
        assert abs(float(found.negative) - below) < 4 * found.negative.standard_error
    assert found.matrix == matrix
    assert found.trace.over == "probes"


def test_the_spectrum_of_expected_masks_is_not_widened_by_drawing_few():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(1, 2), nn.Tanh(), nn.Dropout(0.5), nn.Linear(2, 2, bias=False)
    ).double()
    x, y = torch.ones(1, 1).double(), torch.tensor([0])
    matrices = []
    for mask in itertools.product([0.0, 2.0], repeat=2):
        written = copy.deepcopy(model).eval()
        written[2] = Times(torch.tensor(mask).double())
        matrices.append(dense_hessian(written, x, y, CE))
    H = sum(matrices) / len(matrices)
    found = measure.spectral_density(
        model, (x, y), CE, masks="expected", draws=3, probes=100, seed=0
    ).quadrature
    truth = float(H.square().sum()) / len(H)
    square = found.mean(torch.square)
    assert abs(square.value - truth) < 3 * square.standard_error
    plain = sum(float(nodes[: len(H)].square().mean()) for nodes in found.nodes) / 100
    assert plain - truth > 3 * square.standard_error
    assert all(float(weights.sum()) == pytest.approx(1) for weights in found.weights)


LARGER = {
    "mean": CE,
    "sum": nn.CrossEntropyLoss(reduction="sum"),
    "weighted": nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 9.0]).double()),
}


@pytest.mark.parametrize("reduction", LARGER)
@pytest.mark.parametrize("kind", ["hessian", "fisher"])
def test_copies_of_a_batch_hold_a_draw_each(kind, reduction):
    torch.manual_seed(0)
    drops = nn.Dropout(0.5)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), drops, nn.Linear(3, 3)).double()
    data = as_batches([[t[:2] for t in examples()], [t[2:] for t in examples()]])
    loss = LARGER[reduction]
    V = np.eye(sum(p.numel() for p in model.parameters()))
    with Masking("expected", 100, 0).applied(model) as applied:
        M = matrix_of(kind, model, data, loss, applied)
        one_by_one = np.stack([M.products_of_draw(k, V) for k in range(100)])
        with M.gathered() as passes:
            assert passes == 1  # of 100 copies: two examples come first
            together = M.products(V, range(1000, 1001))
        assert M.products_of_draw(7, V) == pytest.approx(one_by_one[7])
    error = one_by_one.std(0) * (2 / 100) ** 0.5
    z = (together - one_by_one.mean(0)) / (error + 1e-12 * error.max())
    assert abs(z).max() < 5
    # Copies under one and the same draw would be 10 times as far away.
    assert 0.3 < (z**2).mean() < 3


def test_rows_that_meet_are_not_copied():
    class Centred(nn.Module):
        def forward(self, x):
            return x - x[:1]

    layers = nn.Linear(4, 5), nn.Tanh(), nn.Dropout(0.5), Centred(), nn.Linear(5, 3)
    model = nn.Sequential(*layers).double()
    with Masking("expected", 40, 0).applied(model) as applied:
        M = matrix_of("hessian", model, as_batches(examples(5)), CE, applied)
        with M.gathered() as passes:
            assert passes == 40


def test_a_width_that_masks_do_not_allow_is_warned_of():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 12), nn.Dropout(0.8), nn.Linear(12, 3)).double()

    def run(width=None, **more):
        return measure.spectral_density(
            model, examples(), CE, "hessian", "expected", width=width, probes=4, seed=0, **more
        )

    found = run()
    assert found.width == found.quadrature.resolution
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(found.width)
    with pytest.warns(UserWarning, match="ask for more steps, or leave width out"):
        run(found.width / 2)
    with pytest.warns(UserWarning, match="ask for more draws, or leave width out"):
        run(found.width / 9, draws=2, steps=40)
    assert run(steps=30).width < 0.8 * found.width


class Times(nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def forward(self, h):
        return h * self.mask


def test_the_effective_dimension_is_that_of_the_dense_eigenvalues():
    model, (x, y) = network(), examples()
    values = torch.linalg.eigvalsh(dense_fisher(model, x, y, CE)).clamp_min(0)
    for damping in (None, 1e-3, 1.0):
        found = measure.fisher_spectrum(
            model, x, CE, 1, damping=damping, probes=30, steps=30, seed=0
        )
        tau = 1 / 20 if damping is None else damping
        assert found.damping == pytest.approx(tau)
        truth = float((values / (values + tau)).sum())
        estimate = found.effective_dimension
        assert abs(float(estimate) - truth) < 4 * estimate.standard_error
        # Of a direction that is uniform on the sphere, orthogonal to the eigenvector found.
        f = (values / (values + tau))[:-1]
        error = len(f) * (2 * f.var(unbiased=False) / (len(f) + 2) / 30) ** 0.5
        assert estimate.standard_error == pytest.approx(float(error), rel=0.3)
    summed = measure.fisher_spectrum(model, x, nn.CrossEntropyLoss(reduction="sum"), 0, probes=2)
    assert summed.damping == 1


def test_sums_are_exact_on_the_span_of_the_eigenvectors():
    """A softmax regression has rank at most n·(C − 1): with those known, nothing is left."""
    x = torch.randn(8, 30, generator=torch.Generator().manual_seed(0)).double()
    model = nn.Linear(30, 3).double()
    values = torch.linalg.eigvalsh(dense_fisher(model, x, torch.arange(8) % 3, CE)).clamp_min(0)
    found = measure.fisher_spectrum(model, x, CE, 16, probes=2, seed=0)
    assert found.quadrature.known == 16
    dimension, trace = found.effective_dimension, found.trace
    assert float(dimension) == pytest.approx(float((values / (values + 1 / 8)).sum()), rel=1e-7)
    assert float(trace) == pytest.approx(float(values.sum()), rel=1e-7)
    assert dimension.standard_error < 1e-6
    assert trace.standard_error < 1e-6


def test_small_networks_are_exact():
    model, (x, y) = nn.Linear(4, 3).double(), examples()
    values = torch.linalg.eigvalsh(dense_fisher(model, x, y, CE)).clamp_min(0)
    found = measure.fisher_spectrum(model, x, CE, 15)
    truth = float((values / (values + 0.05)).sum())
    assert float(found.effective_dimension) == pytest.approx(truth, rel=1e-9)
    assert found.effective_dimension.standard_error == 0
    torch.testing.assert_close(found.top_eigenvalues, values.flip(0), rtol=1e-8, atol=1e-12)
    density = measure.spectral_density(model, (x, y), CE, "fisher")
    seen = torch.tensor([float(e) for e in density.density], dtype=torch.float64)
    torch.testing.assert_close(seen, smoothed(values, density.grid, density.width))


def test_traces_of_hessian_and_gauss_newton_agree_for_rectified_networks():
    model, data = network(nn.ReLU), examples()
    runs = [measure.spectral_density(model, data, CE, m, seed=0) for m in ("hessian", "fisher")]
    exact = float(measure.fisher(model, data, CE).trace)
    for run in runs:
        assert abs(float(run.trace) - exact) < 4 * run.trace.standard_error


def test_a_flat_loss_has_one_eigenvalue():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(100, dtype=torch.float64))

        def forward(self, x):
            return x[:, :1] * self.weight.sum()

    x, _ = examples()
    found = measure.spectral_density(Flat(), (x, x[:, :1]), nn.L1Loss(), probes=2)
    assert float(found.trace) == 0
    assert found.trace.standard_error == 0


class Rough(torch.autograd.Function):
    """An operation whose derivative cannot be differentiated."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return gradient


class Roughened(nn.Linear):
    def forward(self, x):
        return Rough.apply(super().forward(x))


class Rounded(nn.Linear):
    def forward(self, x):
        return torch.round(super().forward(x))


@pytest.mark.parametrize(
    "run",
    [measure.hessian, measure.spectral_density, measure.fisher_spectrum, measure.fisher],
)
def test_an_operation_whose_derivative_is_zero_is_warned_of(run):
    with pytest.warns(UserWarning, match="exactly zero: to autograd no trainable weight moves"):
        found = run(Rounded(6, 12).double(), (torch.ones(5, 6).double(), torch.arange(5)), CE)
    assert float(found.trace) == 0


class Stepped(nn.Linear):
    def forward(self, x):
        return torch.sign(super().forward(x)).detach()


@pytest.mark.parametrize(
    "run",
    [
        lambda m, d: measure.hessian(m, d, CE, 1),
        lambda m, d: measure.spectral_density(m, d, CE),
        lambda m, d: measure.fisher_spectrum(m, d, CE),
    ],
)
def test_operations_without_second_derivatives_are_named(run):
    model = Roughened(4, 3).double()
    with pytest.raises(RuntimeError, match="once_differentiable"):
        run(model, examples())
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(ValueError, match="detach"):
        run(Stepped(4, 3).double(), examples())
    # What needs first derivatives alone works.
    assert float(measure.fisher(model, examples(), CE).trace) > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"matrix": "jacobian"}, "matrix has to be 'hessian' or 'fisher'"),
        ({"probes": 1}, "probes has to be at least 2, but got 1"),
        ({"steps": 0}, "steps has to be at least 1, but got 0"),
        ({"width": 0.0}, "width has to be positive, but got 0"),
    ],
)
def test_bad_input_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        measure.spectral_density(network(), examples(), CE, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top": -1}, "top has to be a whole number"),
        ({"top": 1000}, "the model has only 99 trainable numbers"),
        ({"damping": 0.0}, "damping has to be positive, but got 0"),
        ({"probes": 1}, "probes has to be at least 2, but got 1"),
    ],
)
def test_bad_spectra_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        measure.fisher_spectrum(network(), examples(), CE, **options)
    with pytest.raises(TypeError, match="L1Loss is not one whose A"):
        measure.fisher_spectrum(network(), examples(), nn.L1Loss())
    with pytest.raises(ValueError, match="no parameters that require gradients"):
        measure.fisher_spectrum(network().requires_grad_(False), examples(), CE)
