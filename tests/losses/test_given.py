"""Losses that a user describes, against torch's own of the same A."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import droplens as dl
from droplens.losses import HessianOnlyError, family, from_log_partition, from_output_hessian

generator = torch.Generator().manual_seed(0)
n, C = 12, 3


def randn(*shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


x, labels = randn(n, 4), torch.randint(C, (n,), generator=generator)
counts = torch.poisson(randn(n, C).exp(), generator=generator)
coins = (randn(n, C) > 0).double()

# name: A, its layout, torch's loss of the same A, targets, and what A is multiplied by there
PAIRS = {
    "squared": (lambda f: 0.5 * f.square().sum(-1), "elements", nn.MSELoss, randn(n, C), 2.0),
    "binary": (lambda f: F.softplus(f).sum(-1), "elements", nn.BCEWithLogitsLoss, coins, 1.0),
    "poisson": (lambda f: f.exp().sum(-1), "elements", nn.PoissonNLLLoss, counts, 1.0),
    "classes": (lambda f: f.logsumexp(-1), "classes", nn.CrossEntropyLoss, labels, 1.0),
}
pairs = pytest.mark.parametrize("name", PAIRS)
reductions = pytest.mark.parametrize("reduction", ["mean", "sum"])


def losses(name, reduction="mean"):
    A, layout, kind, targets, factor = PAIRS[name]
    given = from_log_partition(A, layout=layout, reduction=reduction)
    return given, kind(reduction=reduction), targets, factor


def network():
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(4, 16), nn.Tanh(), nn.Dropout(0.3), nn.Linear(16, C)
    ).double()  # fmt: skip


@pairs
def test_derivatives_are_the_familys_own(name):
    given, known, _, _ = losses(name)
    f = family(known).natural(randn(n, C))
    torch.testing.assert_close(family(given).mean(f), family(known).mean(f))
    torch.testing.assert_close(family(given).hessian(f), family(known).hessian(f))
    root = family(given).root(f)
    torch.testing.assert_close(root @ root.mT, family(known).hessian(f), atol=1e-8, rtol=1e-8)
    step = 0.3 * torch.ones_like(f)
    step[..., 0] = -1
    torch.testing.assert_close(
        family(given).divergence(f, step), family(known).divergence(f, step), atol=1e-10, rtol=1e-8
    )


@pairs
@reductions
def test_the_loss_is_torchs_up_to_what_the_targets_add(name, reduction):
    given, known, targets, factor = losses(name, reduction)
    first, second = randn(n, C), randn(n, C)
    if name == "classes":
        torch.testing.assert_close(given(first, targets), known(first, targets))
    torch.testing.assert_close(
        factor * (given(first, targets) - given(second, targets)),
        known(first, targets) - known(second, targets),
    )


@pairs
@reductions
def test_second_order_is_torchs(name, reduction):
    given, known, targets, factor = losses(name, reduction)
    net = network()
    own = float(dl.penalty(net, x, given, "second_order", targets=targets))
    assert factor * own == pytest.approx(float(dl.penalty(net, x, known, "second_order")), rel=1e-9)


@pairs
def test_second_order_has_torchs_gradient(name):
    given, known, _, factor = losses(name)
    net = network()
    gradients = [
        torch.autograd.grad(c * dl.penalty(net, x, loss, "second_order").total, net[0].weight)[0]
        for c, loss in ((factor, given), (1.0, known))
    ]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-9)


@pairs
def test_the_gaussian_value_is_within_two_percent_of_torchs(name):
    given, known, _, factor = losses(name)
    net = network()
    with torch.no_grad():
        own, other = (float(dl.penalty(net, x, loss)) for loss in (given, known))
    assert factor * own == pytest.approx(other, rel=0.02)


@pairs
def test_masks_cost_the_same(name):
    given, known, targets, factor = losses(name)
    net = network()
    own, other = (dl.decompose(net, x, targets, loss, 20, seed=0) for loss in (given, known))
    for part in ("gap", "spread", "shift"):
        assert factor * getattr(own, part).value == pytest.approx(
            getattr(other, part).value, rel=1e-8
        )


@pairs
def test_fisher_is_torchs(name):
    given, known, _, factor = losses(name)
    net = network()
    own, other = (float(dl.measure.fisher(net, x, loss).trace) for loss in (given, known))
    assert factor * own == pytest.approx(other, rel=1e-7)


def test_drawn_labels_have_mean_zero_and_covariance_H():
    given, known, _, _ = losses("classes")
    f = randn(1, 1, C)
    many = f.expand(20_000, 1, C)
    drawn = family(given).residual(many, torch.Generator().manual_seed(1))[:, 0]
    H = family(known).hessian(f)[0, 0]
    error = (H.diagonal() / len(drawn)).sqrt()
    assert (drawn.mean(0).abs() <= 4.5 * error).all()
    squares = drawn[:, :, None] * drawn[:, None]
    assert ((squares.mean(0) - H).abs() <= 4.5 * squares.std(0) / len(drawn) ** 0.5).all()


def test_a_constant_of_the_targets_makes_it_torchs_whole_loss():
    given = from_log_partition(
        lambda f: f.exp().sum(-1), constant=lambda y: torch.lgamma(y + 1)
    )  # fmt: skip
    exact = -torch.distributions.Poisson(x.exp()).log_prob(counts[:, :1].expand(n, 4)).mean()
    torch.testing.assert_close(given(x, counts[:, :1].expand(n, 4)), exact)


def test_positions_and_statistics_as_targets():
    given = from_log_partition(lambda f: f.logsumexp(-1), layout="classes")
    outputs, tokens = randn(n, C, 5), torch.randint(C, (n, 5), generator=generator)
    torch.testing.assert_close(given(outputs, tokens), nn.CrossEntropyLoss()(outputs, tokens))
    one_hot = F.one_hot(tokens, C).mT.to(outputs)
    torch.testing.assert_close(given(outputs, one_hot), given(outputs, tokens))


def test_it_goes_through_an_inspection():
    given, known, targets, _ = losses("classes")
    own, other = (
        dl.inspect(network(), (x, targets), loss, draws=10, directions=1, seed=0)
        for loss in (given, known)
    )
    assert own.cost.gap.value == pytest.approx(other.cost.gap.value, rel=1e-8)
    assert own.hessian.trace.value == pytest.approx(other.hessian.trace.value, rel=1e-6)
    assert own.base == pytest.approx(other.base)


def huber(outputs, targets):
    return F.huber_loss(outputs, targets)


def curvature(f):
    return torch.ones_like(f).unsqueeze(-1)


def test_a_hessian_gives_second_order_and_fisher():
    """Huber's loss inside its corner is half the squared loss."""
    given = from_output_hessian(huber, curvature)
    net, half = network(), 0.5 * float(dl.penalty(network(), x, nn.MSELoss(), "second_order"))
    assert float(dl.penalty(net, x, given, "second_order")) == pytest.approx(half)
    own, squared = (dl.measure.fisher(net, x, loss).trace.value for loss in (given, nn.MSELoss()))
    assert own == pytest.approx(squared / 2)
    assert float(given(x, x + 0.1)) == pytest.approx(0.005)


def test_a_hessian_alone_gives_no_spread_and_says_so():
    given, y = from_output_hessian(huber, curvature), randn(n, C)
    advice = "known by its output Hessian alone.*method='second_order'.*from_log_partition"
    with pytest.raises(HessianOnlyError, match=advice):
        dl.penalty(network(), x, given)
    parts = dl.decompose(network(), x, y, given, 5, seed=0)
    assert math.isfinite(parts.gap.value)
    assert math.isnan(parts.spread.value)
    assert math.isnan(parts.shift.value)
    found = dl.inspect(network(), (x, y), given, draws=5, directions=1, seed=0)
    assert found.cost.gaussian is None
    assert found.cost.second_order > 0
    assert found.hessian is not None
    assert found.fisher is not None


def partition(f):
    return f.exp().sum(-1)


REFUSED = [
    (lambda: from_log_partition(3), TypeError, "log_partition has to be a function of f"),
    (lambda: from_log_partition(partition, layout="rows"), ValueError, "layout has to be 'elem"),
    (lambda: from_log_partition(partition, reduction="none"), ValueError, "reduction has to be"),
    (lambda: from_output_hessian(nn.HuberLoss, curvature), TypeError, "loss has to be a function"),
    (lambda: from_output_hessian(huber, 3), TypeError, "hessian has to be a function"),
    (
        lambda: from_log_partition(lambda f: f.exp())(x, x),
        ValueError,
        r"one number per term, \(12, 4\) for f of shape \(12, 4, 1\), but returned \(12, 4, 1\)",
    ),
    (
        lambda: dl.penalty(
            network(), x, from_output_hessian(huber, torch.ones_like), "second_order"
        ),
        ValueError,
        r"hessian has to return shape \(12, 3, 1, 1\)",
    ),
    (lambda: from_log_partition(partition)(x, x[:3]), ValueError, r"outputs' shape \(12, 4\)"),
    (lambda: from_log_partition(partition)(x, x * torch.nan), ValueError, "targets holds NaN"),
    (
        lambda: from_log_partition(partition, layout="classes")(x, torch.full((n,), 4)),
        ValueError,
        "the label 4, but the outputs have 4 classes",
    ),
    (
        lambda: from_log_partition(partition, layout="classes")(x[:, 0], labels),
        ValueError,
        r"outputs of shape \(n, C, ...\), but the model returned \(12,\)",
    ),
    (lambda: family(nn.L1Loss()), TypeError, "L1Loss is not one .*losses.from_log_partition"),
]


@pytest.mark.parametrize(("make", "error", "message"), REFUSED)
def test_bad_descriptions_are_refused_in_one_line(make, error, message):
    with pytest.raises(error, match=message):
        make()
