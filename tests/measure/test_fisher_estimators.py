"""Both Monte-Carlo estimators of the Fisher information, and their variances (papers.md §11)."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, hessian, jacrev

from droplens import losses, measure
from tests.reference_measure import dense_fisher, flat_parameters, unflatten

CE = nn.CrossEntropyLoss()


def network(activation=nn.Tanh):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2), activation(), nn.Linear(2, 3)).double()


def inputs(n=4):
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def per_example(model, x):
    """∂h (n, C, d), diag ∂²h (n, C, d) and π (n, C)."""
    names, flat = flat_parameters(model)

    def outputs(vector):
        return functional_call(model, unflatten(model, names, vector), (x,))

    J = jacrev(outputs)(flat)
    second = hessian(outputs)(flat).diagonal(dim1=-2, dim2=-1)
    return J.detach(), second.detach(), torch.softmax(outputs(flat), -1).detach()


def squared_score_variance(J, pi):
    """Var (∂h·δ)² under y ~ π, by the sum over labels: Σ_abcd J J J J (K − I I)."""
    delta = torch.eye(pi.shape[-1], dtype=pi.dtype) - pi.unsqueeze(-2)  # (n, y, C)
    squares = torch.einsum("nyc,ncd->nyd", delta, J).square()
    mean = (pi.unsqueeze(-1) * squares).sum(1)
    return (pi.unsqueeze(-1) * squares.square()).sum(1) - mean.square()


def second_derivative_variance(second, pi):
    """(∂²h)ᵀ I (∂²h)."""
    information = torch.diag_embed(pi) - pi.unsqueeze(-1) * pi.unsqueeze(-2)
    return torch.einsum("nad,nab,nbd->nd", second, information, second)


def flat(by_name, model):
    names, _ = flat_parameters(model)
    return torch.cat([by_name[name].flatten() for name in names])


@pytest.mark.parametrize("method", ["sampled", "sampled_hessian"])
def test_the_variance_is_the_papers(method):
    draws = {"sampled": 1500, "sampled_hessian": 300}[method]
    model, x = network(), inputs()
    J, second, pi = per_example(model, x)
    variance = (
        squared_score_variance(J, pi)
        if method == "sampled"
        else second_derivative_variance(second, pi)
    )
    truth = (variance.sum(0) / len(x) ** 2 / draws).sqrt()
    found = measure.fisher(model, x, CE, method, draws=draws, seed=0)
    errors = flat(found.standard_error, model)
    used = truth > 1e-6
    # The error of a standard deviation from N draws of kurtosis κ: √((κ − 1)/4N); κ < 20 here.
    assert ((errors / truth)[used] - 1).abs().max() < 4 * (19 / 4 / draws) ** 0.5
    exact = dense_fisher(model, x, torch.zeros(len(x), dtype=torch.long), CE).diagonal()
    z = ((flat(found.diagonal, model) - exact) / truth)[used]
    assert z.abs().max() < 4.5
    assert found.trace.over == "labels"
    assert found.seed == 0


def test_the_second_derivative_has_no_variance_in_the_last_layer():
    model, x = network(), inputs()
    found = measure.fisher(model, x, CE, "sampled_hessian", draws=3, seed=0)
    assert set(found.how.values()) == {"a product a weight"}
    exact = measure.fisher(model, x, CE)
    for name in ("2.weight", "2.bias"):
        torch.testing.assert_close(found.diagonal[name], exact.diagonal[name])
        assert found.standard_error[name].max() < 1e-12
    assert found.standard_error["0.weight"].min() > 1e-6
    squares = measure.fisher(model, x, CE, "sampled", draws=3, seed=0)
    assert squares.standard_error["2.weight"].min() > 1e-6


def test_the_second_derivative_is_exact_for_rectified_networks():
    model, x = network(nn.ReLU), inputs()
    found = measure.fisher(model, x, CE, "sampled_hessian", draws=1, seed=0)
    exact = measure.fisher(model, x, CE)
    torch.testing.assert_close(flat(found.diagonal, model), flat(exact.diagonal, model))


def test_larger_networks_are_probed(monkeypatch):
    from droplens.measure import _fisher_passes

    monkeypatch.setattr(_fisher_passes, "MOST_PRODUCTS", 10)
    model, x = network(), inputs()
    found = measure.fisher(model, x, CE, "sampled_hessian", draws=300, seed=0)
    assert set(found.how.values()) == {"random probes"}
    exact = measure.fisher(model, x, CE)
    error = flat(found.standard_error, model)
    z = (flat(found.diagonal, model) - flat(exact.diagonal, model)) / error
    assert z.abs().max() < 4.5
    assert abs(float(found.trace) - float(exact.trace)) < 4 * found.trace.standard_error


@pytest.mark.parametrize(
    "loss", [nn.MSELoss(), nn.BCEWithLogitsLoss(), nn.PoissonNLLLoss()], ids=lambda v: str(v)
)
def test_other_losses_in_their_own_units(loss):
    model, x = network(), inputs()
    exact = measure.fisher(model, x, loss)
    found = measure.fisher(model, x, loss, "sampled_hessian", draws=60, seed=0)
    assert abs(float(found.trace) - float(exact.trace)) < 4 * found.trace.standard_error


def test_batches_and_masks():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 3)).double()
    x = inputs(6)
    mean = measure.fisher(model, x, CE, masks="expected", draws=200, seed=0)
    for method in ("sampled", "sampled_hessian"):
        for data in (x, [x[:3], x[3:5], x[5:]]):
            found = measure.fisher(model, data, CE, method, "expected", draws=100, seed=1)
            assert found.trace.over == "masks and labels"
            distance = float(found.trace) - float(mean.trace)
            error = (found.trace.standard_error**2 + mean.trace.standard_error**2) ** 0.5
            assert abs(distance) < 4 * error


def test_group_norm_and_root_mean_square_norm_are_layers():
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.group = nn.Conv1d(1, 4, 2), nn.GroupNorm(2, 4)
            self.rms, self.last = nn.RMSNorm(2), nn.Linear(8, 3)

        def forward(self, x):
            h = torch.tanh(self.group(self.conv(x.unsqueeze(1))))
            return self.last(self.rms(h).flatten(1))

    torch.manual_seed(0)
    model, x = Normed().double(), inputs(5)
    with torch.no_grad():
        for parameter in (*model.group.parameters(), *model.rms.parameters()):
            parameter.uniform_(0.5, 1.5)
    found = measure.fisher(model, x, CE)
    assert set(found.how.values()) == {"layer by layer"}
    truth = dense_fisher(model, x, torch.zeros(5, dtype=torch.long), CE).diagonal()
    torch.testing.assert_close(flat(found.diagonal, model), truth, rtol=1e-8, atol=1e-12)


def test_a_loss_known_by_its_hessian_alone_has_no_labels_to_differentiate():
    loss = losses.from_output_hessian(nn.MSELoss(), lambda f: 2 * torch.ones_like(f).unsqueeze(-1))
    with pytest.raises(losses.HessianOnlyError, match="known by its output Hessian alone"):
        measure.fisher(network(), inputs(), loss, "sampled_hessian")
