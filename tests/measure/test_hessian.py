import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Dataset, TensorDataset

from droplens import measure
from droplens.batches import as_batches, checked_passes
from droplens.measure._masks import Masking
from droplens.measure._operators import LossHessian
from droplens.measure._risk import Loss
from tests.reference_measure import dense_hessian, loss_of_parameters

CE = nn.CrossEntropyLoss()


def network(activation=nn.Tanh, width=8, dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, width), activation(), nn.Dropout(0.5), nn.Linear(width, 3)
    ).to(dtype)


def examples(n=20, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(3, (n,), generator=generator)


class Attentive(nn.Module):
    """Attention, whose fused kernel has no double backward on the CPU."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 4)
        self.attention = nn.MultiheadAttention(4, 2, dropout=0.3, batch_first=True)
        self.last = nn.Linear(4, 3)

    def forward(self, x):
        h = self.inner(x.unflatten(1, (2, 2)))
        return self.last(self.attention(h, h, h, need_weights=False)[0].mean(1))


MODELS = {
    "tanh": network,
    "relu": lambda: network(nn.ReLU),
    "norm": lambda: nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Linear(8, 3)
    ).double(),
    "attention": lambda: Attentive().double(),
}


@pytest.mark.parametrize("name", MODELS)
def test_products_equal_the_dense_matrix(name):
    torch.manual_seed(3)
    model, (x, y) = MODELS[name]().eval(), examples()
    H = dense_hessian_of(model, x, y, CE)
    V = np.random.default_rng(0).standard_normal((len(H), 2))
    for data in ((x, y), [(x[:7], y[:7]), (x[7:], y[7:])]):
        with Masking("off", 2, 0).applied(model) as applied:
            found = LossHessian(model, as_batches(data), Loss(CE), applied).products(V)
        np.testing.assert_allclose(found, H.numpy() @ V, rtol=1e-8, atol=1e-12)


def dense_hessian_of(model, x, y, loss):
    with sdpa_kernel(SDPBackend.MATH):
        if isinstance(model, Attentive):
            value, flat = loss_of_parameters(model, x, y, loss)
            return torch.autograd.functional.hessian(value, flat)
        return dense_hessian(model, x, y, loss)


@pytest.mark.parametrize("name", MODELS)
def test_top_eigenvalues_and_trace(name):
    torch.manual_seed(3)
    model, (x, y) = MODELS[name]().eval(), examples()
    H = dense_hessian_of(model, x, y, CE)
    truth = torch.linalg.eigvalsh(H).flip(0)
    result = measure.hessian(model, (x, y), CE, top=3, seed=0)
    torch.testing.assert_close(result.top_eigenvalues, truth[:3], rtol=1e-6, atol=0)
    assert (result.residuals < 2e-4 * truth[0]).all()
    # Few weights: exact, or to 5% by fewer probes than there are weights.
    slack = 4 * result.trace.standard_error + 1e-9 * abs(float(H.trace()))
    assert abs(float(result.trace) - float(H.trace())) < slack
    assert result.trace.over == "probes"
    assert result.masks == "off"
    assert result.trace.standard_error <= 0.05 * abs(float(result.trace))


def test_the_trace_is_unbiased_and_its_error_honest():
    model, data = network(), examples()
    truth = float(dense_hessian(model.eval(), *data, CE).trace())
    runs = [measure.hessian(model, data, CE, top=2, probes=20, seed=s) for s in range(60)]
    z = torch.tensor([(float(r.trace) - truth) / r.trace.standard_error for r in runs])
    # Student's t with 19 degrees: variance 19/17; the mean of 60 and their mean square.
    assert abs(float(z.mean())) < 4 * math.sqrt(19 / 17 / 60)
    assert 0.5 < float(z.square().mean()) < 2.2


def test_the_part_of_the_trace_on_the_eigenvectors_is_exact():
    """A softmax regression has rank at most n·(C − 1): with those known, nothing is left."""
    x, y = torch.randn(8, 30, dtype=torch.float64), torch.arange(8) % 3
    model = nn.Linear(30, 3).double()
    H = dense_hessian(model, x, y, CE)
    result = measure.hessian(model, (x, y), CE, top=16, probes=2)
    assert float(result.trace) == pytest.approx(float(H.trace()), rel=1e-7)


def test_trace_equals_the_fishers_for_rectified_networks():
    model, data = network(nn.ReLU), examples()
    result = measure.hessian(model, data, CE, top=4, probes=400, seed=0)
    fisher = float(measure.fisher(model, data, CE).trace)
    assert float(result.trace) == pytest.approx(fisher, rel=1e-9)


def test_a_small_network_is_exact():
    model, (x, y) = nn.Linear(4, 3).double(), examples()
    H = dense_hessian(model, x, y, CE)
    result = measure.hessian(model, (x, y), CE, top=15)
    assert float(result.trace) == pytest.approx(float(H.trace()), rel=1e-10)
    assert result.trace.standard_error == 0
    truth = torch.linalg.eigvalsh(H).flip(0)
    torch.testing.assert_close(result.top_eigenvalues, truth, rtol=1e-8, atol=1e-12)


def random_labels(width):
    """A network of two hidden layers before training, whose traces probes hardly see."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, width), nn.Tanh(), nn.Dropout(0.2),
        nn.Linear(width, 6),
    ).double()  # fmt: skip
    x, _ = examples(30)
    return model.eval(), x, torch.arange(30) % 6


@pytest.mark.parametrize("options", [{}, {"probes": 1000}], ids=["by default", "asked for"])
def test_a_basis_takes_the_place_of_as_many_probes(options):
    model, x, y = random_labels(14)
    H = dense_hessian(model, x, y, CE)
    assert 64 < len(H) < 400
    found = measure.hessian(model, (x, y), CE, top=1, seed=0, **options)
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    relative = float((weights**2 * H.diagonal()).sum())
    assert float(found.trace) == pytest.approx(float(H.trace()), rel=1e-9)
    assert float(found.relative_trace) == pytest.approx(relative, rel=1e-9)
    assert found.trace.standard_error == found.relative_trace.standard_error == 0
    assert found.notes == ()


def test_averaged_over_masks_a_basis_leaves_their_error_alone():
    model, x, y = random_labels(14)
    found = measure.hessian(model, (x, y), CE, 1, "expected", draws=4, seed=0)
    assert found.trace.over == "masks"
    assert found.trace.n == 4
    with Masking("expected", 4, 0).applied(model) as applied:
        H = LossHessian(model, checked_passes((x, y), model, in_order=True), Loss(CE), applied)
        diagonals = np.stack([H.products_of_draw(k, np.eye(H.size)).diagonal() for k in range(4)])
        squares = H.weights() ** 2
    for one, each in (
        (found.trace, diagonals.sum(1)),
        (found.relative_trace, diagonals @ squares),
    ):
        assert one.value == pytest.approx(each.mean(), rel=1e-9)
        assert one.standard_error == pytest.approx(each.std(ddof=1) / 2, rel=1e-6)


def test_what_is_not_known_to_5_percent_says_so():
    model, x, y = random_labels(60)
    H = dense_hessian(model, x, y, CE)
    assert len(H) > 400
    found = measure.hessian(model, (x, y), CE, top=1, seed=0)
    assert found.trace.n == 400
    assert found.trace.standard_error < 0.05 * float(found.trace)
    assert found.relative_trace.standard_error > 0.05 * float(found.relative_trace)
    (note,) = found.notes
    assert note.startswith("the relative trace has a standard error of ")
    assert f"probes={len(H)} in place of 400 would make that 5%" in note
    under = measure.hessian(model, (x, y), CE, 1, "expected", probes=4, draws=2, seed=0)
    of_traces = [note for note in under.notes if "trace" in note]
    assert all("in place of 4 and more draws of masks" in note for note in of_traces)
    assert of_traces
    # What is known well has nothing to say.
    assert measure.hessian(model, (x, y), CE, top=1, probes=len(H), seed=0).notes == ()


def test_eigenvectors_are_directions_of_flatness():
    model, data = network(), examples()
    result = measure.hessian(model, data, CE, top=2, seed=0)
    radius = 1e-3
    along = measure.flatness(model, data, CE, result.eigenvectors, (-radius, 0.0, radius))
    curvature = (along.values[:, 0] - 2 * along.values[:, 1] + along.values[:, 2]) / radius**2
    torch.testing.assert_close(curvature, result.top_eigenvalues, rtol=1e-4, atol=1e-6)


def test_a_flat_loss_has_no_curvature():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(100, dtype=torch.float64))

        def forward(self, x):
            return x[:, :1] * self.weight.sum()

    x, _ = examples()
    result = measure.hessian(Flat(), (x, x[:, :1]), nn.L1Loss(), top=2)
    assert result.top_eigenvalues.tolist() == [0, 0]
    assert float(result.trace) == 0


def test_single_precision_reaches_a_millionth():
    double, single = network(), network(dtype=torch.float32)
    single.load_state_dict(double.state_dict())
    truth = measure.hessian(double, examples(), CE, seed=0).top_eigenvalues
    found = measure.hessian(single, examples(dtype=torch.float32), CE, seed=0).top_eigenvalues
    torch.testing.assert_close(found, truth, rtol=3e-6, atol=3e-6 * float(truth[0]))


def test_runs_repeat_and_leave_everything_as_it_was():
    model, data = network().train(), examples()
    stream = torch.get_rng_state()
    runs = [measure.hessian(model, data, CE, seed=1) for _ in range(2)]
    assert float(runs[0].trace) == float(runs[1].trace)
    assert torch.equal(runs[0].top_eigenvalues, runs[1].top_eigenvalues)
    assert model.training
    assert torch.equal(stream, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in model.parameters())
    loader = DataLoader(TensorDataset(*data), batch_size=6, shuffle=True)
    streamed = measure.hessian(model, loader, CE, seed=1)
    torch.testing.assert_close(streamed.top_eigenvalues, runs[0].top_eigenvalues)
    assert float(streamed.trace) == pytest.approx(float(runs[0].trace))
    with torch.no_grad():
        assert float(measure.hessian(model, data, CE, seed=1).trace) == float(runs[0].trace)


def test_summed_and_weighted_losses_add_up_over_batches():
    model, (x, y) = network().eval(), examples()
    parts = [(x[:7], y[:7]), (x[7:], y[7:])]
    for loss in (
        nn.CrossEntropyLoss(reduction="sum"),
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 9.0]).double()),
    ):
        truth = torch.linalg.eigvalsh(dense_hessian(model, x, y, loss)).flip(0)
        found = measure.hessian(model, parts, loss, top=2, seed=0).top_eigenvalues
        torch.testing.assert_close(found, truth[:2], rtol=1e-6, atol=0)


class Drifting(Dataset):
    def __init__(self):
        self.source = np.random.default_rng(0)

    def __len__(self):
        return 8

    def __getitem__(self, i):
        return torch.from_numpy(self.source.standard_normal(4)), i % 3


@pytest.mark.parametrize("masks", ["off", "expected"])
def test_without_probes_the_eigenvalues_are_the_same_and_the_traces_unknown(masks):
    found = measure.hessian(network(), examples(), CE, top=3, masks=masks, probes=0, seed=1)
    probed = measure.hessian(network(), examples(), CE, top=3, masks=masks, probes=2, seed=1)
    assert torch.equal(found.top_eigenvalues, probed.top_eigenvalues)
    assert torch.equal(found.residuals, probed.residuals)
    for trace in (found.trace, found.relative_trace):
        assert math.isnan(trace.value)
        assert math.isnan(trace.standard_error)
    assert not any("trace" in note for note in found.notes)


class Detached(nn.Linear):
    def forward(self, x):
        return super().forward(x).detach()


@pytest.mark.parametrize(
    ("model", "data", "options", "message"),
    [
        (
            network(),
            examples(),
            {"masks": "on"},
            "masks has to be 'off', 'fixed' or .* but got 'on'",
        ),
        (network(), examples(), {"top": -1}, "top has to be a whole number of at least 0"),
        (network(), examples(), {"top": 1000}, "top is 1000, but the model has only 67"),
        (network(), examples(), {"probes": 1}, "probes has to be 0 or at least 2, but got 1"),
        (network(), examples()[0], {}, "data has no targets"),
        (network(), DataLoader(Drifting(), batch_size=4), {}, "data changes between passes"),
        (network().requires_grad_(False), examples(), {}, "no parameters that require gradients"),
        (Detached(4, 3).double(), examples(), {}, "loss does not depend on the model"),
    ],
)
def test_bad_input_is_refused(model, data, options, message):
    with pytest.raises(ValueError, match=message):
        measure.hessian(model, data, CE, **options)
