"""Every loss and every method against dense Jacobians and enumerated masks."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import droplens as dl
from droplens.losses import HessianOnlyError, from_log_partition, from_output_hessian
from tests.penalties.test_penalty import METHODS, deep_network, randn, tail_network, x
from tests.reference import all_coins

class_weights = torch.tensor([1.0, 0.5, 3.0], dtype=torch.float64)
pos_weight = torch.tensor([2.0, 0.5, 1.0], dtype=torch.float64)
kinds = torch.tensor([0, 2, 1, 1, 0])
ignoring = torch.tensor([0, -100, 1, 1, -100])
soft = torch.softmax(randn(5, 3, seed=8), 1)
ones = (randn(5, 3, seed=9) > 0).double()
counts = torch.randint(4, (5, 3), generator=torch.Generator().manual_seed(0)).double()


# loss, targets that fit, whether its A is known
LOSSES = {
    "squared": (nn.MSELoss(), randn(5, 3, seed=7), True),
    "squared, summed": (nn.MSELoss(reduction="sum"), randn(5, 3, seed=7), True),
    "cross-entropy": (nn.CrossEntropyLoss(), kinds, True),
    "class weights": (nn.CrossEntropyLoss(class_weights), kinds, True),
    "class weights, summed": (nn.CrossEntropyLoss(class_weights, reduction="sum"), kinds, True),
    "labels left out": (nn.CrossEntropyLoss(ignore_index=-100), ignoring, True),
    "smoothed labels": (nn.CrossEntropyLoss(class_weights, label_smoothing=0.2), kinds, True),
    "soft labels": (nn.CrossEntropyLoss(class_weights), soft, True),
    "binary": (nn.BCEWithLogitsLoss(), ones, True),
    "binary, weighted": (nn.BCEWithLogitsLoss(class_weights, pos_weight=pos_weight), ones, True),
    "Poisson": (nn.PoissonNLLLoss(), counts, True),
    "Poisson, summed": (nn.PoissonNLLLoss(reduction="sum"), counts, True),
    "a user's A": (
        from_log_partition(lambda f: torch.logsumexp(f, -1), layout="classes"),
        kinds,
        True,
    ),
    "a user's A of elements": (
        from_log_partition(lambda f: F.softplus(f).sum(-1), reduction="sum"),
        ones,
        True,
    ),
    "a user's Hessian": (
        from_output_hessian(
            lambda f, y: ((f - y) ** 2).mean() * 1.5, lambda f: torch.full((*f.shape, 1), 3.0)
        ),
        randn(5, 3, seed=7),
        False,
    ),
    "a user's Hessian of classes": (
        from_output_hessian(
            F.cross_entropy,
            lambda f: (
                torch.diag_embed(f.softmax(-1))
                - f.softmax(-1)[..., :, None] * f.softmax(-1)[..., None, :]
            ),
            layout="classes",
        ),
        kinds,
        False,
    ),
}


def dense(net, loss, targets, p):
    """½ λ Σ_a (JᵀHJ)_aa, H the loss's own Hessian by automatic differentiation of all outputs."""
    total = 0.0
    outputs = net.eval()(x).detach()
    for i, row in enumerate(x):

        def cost(f, i=i):
            return loss(torch.cat([outputs[:i], f[None], outputs[i + 1 :]]), targets)

        def through(gates, row=row):
            h = torch.tanh(net[0](row)) * gates[:4]
            return net[6](torch.tanh(net[3](h)) * gates[4:])

        H = torch.autograd.functional.hessian(cost, outputs[i])
        J = torch.autograd.functional.jacobian(through, torch.ones(8, dtype=torch.float64))
        total += 0.5 * p / (1 - p) * float(torch.trace(J.mT @ H @ J))
    return total


@pytest.mark.parametrize("name", LOSSES)
def test_second_order_and_its_probes_against_dense_jacobians(name):
    loss, targets, _ = LOSSES[name]
    net, given = deep_network(0.3), {"targets": targets}
    expected = dense(net, loss, targets, 0.3)
    with torch.no_grad():
        found = dl.penalty(net, x, loss, "second_order", **given)
        probes = dl.penalty(net, x, loss, "sampled", draws=600, seed=0, **given)
    assert float(found) == pytest.approx(expected, rel=1e-9)
    assert abs(float(probes) - expected) <= 4.5 * probes.standard_error


@pytest.mark.parametrize("name", [name for name, (_, _, known) in LOSSES.items() if known])
def test_gaussian_and_masks_before_the_last_layer(name):
    """16 masks of an affine tail: the loss's mean over them is base + spread, shift zero."""
    loss, targets, _ = LOSSES[name]
    net, given = tail_network(0.2), {"targets": targets}
    hidden = torch.tanh(net[0](x)).detach()
    gap = -float(loss(net.eval()(x), targets).detach())
    for probability, z in all_coins(4, 0.2):
        gap += probability * float(loss(net[3](hidden * z / 0.8), targets).detach())
    with torch.no_grad():
        masks = dl.penalty(net, x, loss, "masks", draws=1500, seed=0, **given)
        gaussian = dl.penalty(net, x, loss, **given)
    assert abs(float(masks) - gap) <= 4.5 * masks.standard_error
    # Four coins are no Gaussian; for squared loss they need not be.
    close = 1e-9 if "squared" in name else 0.15
    assert float(gaussian) == pytest.approx(gap, rel=close)


@pytest.mark.parametrize("name", [name for name, (_, _, known) in LOSSES.items() if known])
@pytest.mark.parametrize("method", METHODS)
def test_gradients_against_finite_differences(name, method):
    loss, targets, _ = LOSSES[name]
    net, given = deep_network(0.3), {"targets": targets}
    weight = net[3].weight
    (gradient,) = torch.autograd.grad(dl.penalty(net, x, loss, method, **given).total, weight)
    step = randn(*weight.shape, seed=2)
    moved = []
    for size in (1e-5, -2e-5):
        with torch.no_grad():
            weight += size * step
            moved.append(float(dl.penalty(net, x, loss, method, **given)))
    slope = (moved[0] - moved[1]) / 2e-5
    assert float((gradient * step).sum()) == pytest.approx(slope, rel=1e-5, abs=1e-10)


@pytest.mark.parametrize("method", ["gaussian", "masks"])
def test_a_hessian_alone_says_what_it_cannot(method):
    loss, targets, _ = LOSSES["a user's Hessian"]
    with pytest.raises(HessianOnlyError, match="use method='second_order'"):
        dl.penalty(deep_network(), x, loss, method, targets=targets)
