"""Structured masks at sites of any rank, attention, and several sites, against all their masks."""

from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import droplens as dl
from droplens.gates import open_gates
from tests import reference_masks as reference
from tests.penalties.test_penalty import METHODS, cross_entropy, randn
from tests.reference import exact_parts, softmax_hessian


@dataclass(frozen=True)
class Case:
    law: object
    units: tuple[int, ...]
    outcomes: object  # () -> (probabilities, z)


def one_dropped(shape, generator):
    """Exactly one of four units falls."""
    fallen = torch.randint(4, shape[:1], generator=generator)
    return (1 - F.one_hot(fallen, 4)).double().reshape(shape)


ONE_OF_FOUR = torch.full((4,), 0.25, dtype=torch.float64), 1 - torch.eye(4, dtype=torch.float64)
custom = dl.masks.Custom(
    torch.full((2, 2), 0.75),
    torch.eye(4, dtype=torch.float64) * 0.25 - torch.full((4, 4), 0.0625, dtype=torch.float64),
    sampler=one_dropped,
)
m = dl.masks
CASES = {
    "coins on a sequence": Case(
        m.Bernoulli(0.3), (2, 3), partial(reference.bernoulli, 0.3, (2, 3))
    ),
    "groups": Case(m.Grouped(0.4, 2), (2, 4), partial(reference.grouped, 0.4, 2, (2, 4))),
    "channels of a series": Case(m.Channel(0.3), (3, 2), partial(reference.channel, 0.3, (3, 2))),
    "channels of an image": Case(
        m.Channel(0.3), (3, 2, 2), partial(reference.channel, 0.3, (3, 2, 2))
    ),
    "channels of a volume": Case(
        m.Channel(0.3), (2, 2, 1, 2), partial(reference.channel, 0.3, (2, 2, 1, 2))
    ),
    "path": Case(m.Path(0.2), (2, 2, 2), partial(reference.path, 0.2, (2, 2, 2))),
    "blocks of a series": Case(m.Block(0.3, 2), (6,), partial(reference.block, 0.3, 2, (6,))),
    "blocks of an image": Case(m.Block(0.3, 2), (4, 3), partial(reference.block, 0.3, 2, (4, 3))),
    "blocks, a mask a channel": Case(
        m.Block(0.3, 2, dims=2), (2, 3, 3), partial(reference.block, 0.3, 2, (3, 3), 2)
    ),
    "blocks, one mask": Case(
        m.Block(0.3, 2, dims=2, shared=True),
        (2, 3, 3),
        partial(reference.block, 0.3, 2, (3, 3), 2, True),
    ),
    "blocks of a volume": Case(
        m.Block(0.2, 2), (3, 2, 3), partial(reference.block, 0.2, 2, (3, 2, 3))
    ),
    "moments given": Case(custom, (2, 2), lambda: ONE_OF_FOUR),
}
N = 3
labels = torch.tensor([0, 2, 1])


def tail(case):
    """A site before one affine layer."""
    torch.manual_seed(0)
    size = torch.Size(case.units).numel()
    return nn.Sequential(dl.nn.Masked(case.law), nn.Flatten(), nn.Linear(size, 3)).double()


def deep(case):
    """A site with bends before and behind it."""
    torch.manual_seed(0)
    size = torch.Size(case.units).numel()
    layers = [nn.Tanh(), dl.nn.Masked(case.law), nn.Flatten(), nn.Linear(size, 4), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(4, 3)).double()


def data(case):
    return randn(N, *case.units, seed=5)


def outputs_under(net, at, case, inputs) -> tuple[Tensor, Tensor]:
    """Probabilities (M,) and outputs (M, n, C) under every mask at site `at`."""
    probabilities, z = case.outcomes()
    ratio = (z / (probabilities @ z)).reshape(-1, 1, *case.units)
    with torch.no_grad():
        h = net[:at](inputs)
        return probabilities, torch.stack([net[at + 1 :](h * mask) for mask in ratio])


@pytest.mark.parametrize("name", CASES)
def test_squared_loss_before_the_last_layer_is_exact(name):
    """The gap over all masks equals the penalty to rounding."""
    case = CASES[name]
    net, inputs, y = tail(case), data(case), randn(N, 3, seed=6)
    probabilities, outputs = outputs_under(net, 0, case, inputs)
    costs = (outputs - y).square().mean((1, 2))
    base = float(nn.functional.mse_loss(net.eval()(inputs), y).detach())
    expected = float(probabilities @ costs) - base
    for method in METHODS:
        found = dl.penalty(net, inputs, nn.MSELoss(), method)
        assert float(found) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("name", CASES)
def test_second_order_is_half_the_inner_product_of_mask_and_gauss_newton(name):
    """½ ⟨C̄, G⟩, C̄ from all masks and G from dense Jacobians."""
    case = CASES[name]
    net, inputs = deep(case), data(case)
    _, relative = reference.moments(case.outcomes())
    expected = torch.zeros(N, dtype=torch.float64)
    for i in range(N):
        h = torch.tanh(inputs[i])

        def through(gates, h=h):
            return net[2:]((h * gates.reshape(h.shape))[None])[0]

        ones = torch.ones(h.numel(), dtype=torch.float64)
        J = torch.autograd.functional.jacobian(through, ones)
        H = softmax_hessian(through(ones).detach())
        expected[i] = 0.5 * (relative * (J.mT @ H @ J)).sum() / N
    found = dl.penalty(net, inputs, cross_entropy, "second_order")
    torch.testing.assert_close(found.per_example.detach(), expected, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize(
    "name", ["channels of an image", "blocks, one mask", "moments given", "path"]
)
def test_the_decomposition_holds_the_enumerated_truth(name):
    case = CASES[name]
    net, inputs = deep(case), data(case)
    probabilities, outputs = outputs_under(net, 1, case, inputs)
    undropped = net.eval()(inputs).detach()
    truth = torch.tensor(
        [
            exact_parts(
                probabilities,
                outputs[:, i],
                undropped[i],
                lambda f, y=int(labels[i]): torch.logsumexp(f, -1) - f[y],
                lambda f: torch.logsumexp(f, -1),
            )
            for i in range(N)
        ]
    ).mean(0)
    found = dl.decompose(net, inputs, labels, cross_entropy, 1500, seed=0)
    for estimate, value in zip((found.gap, found.spread, found.shift), truth.tolist(), strict=True):
        assert abs(estimate.value - value) <= 4.5 * estimate.standard_error


class Attend(nn.Module):
    """Attention weights that drop, read by torch's three ways; affine behind the weights."""

    def __init__(self, how, p=0.3):
        super().__init__()
        torch.manual_seed(0)
        self.how, self.p = how, p
        self.attend = nn.MultiheadAttention(2, 2, dropout=p, batch_first=True)
        self.drop, self.head = nn.Dropout(p), nn.Linear(2, 3)

    def forward(self, x):
        if self.how == "sdpa":
            h = F.scaled_dot_product_attention(x, x, x, dropout_p=self.p * self.training)
        elif self.how == "by hand":
            h = self.drop(torch.softmax(x @ x.mT, -1)) @ x
        else:
            h = self.attend(x, x, x, need_weights=self.how == "with weights")[0]
        return self.head(h.mean(1))


HEADS = {"sdpa": 1, "by hand": 1, "with weights": 2, "without weights": 2}


@pytest.mark.parametrize("how", HEADS)
def test_attention_weights_are_exact_with_squared_loss(how):
    """All masks over the weights of 2 tokens (256 of them with two heads)."""
    net, inputs, y = Attend(how).double(), randn(4, 2, 2, seed=1), randn(4, 3, seed=2)
    coins = 4 * HEADS[how]
    probabilities, z = reference.bernoulli(0.3, (coins,))
    cost = 0.0
    opened = open_gates(net, inputs)
    (gate,) = opened.gates
    # Affine in the gate, so the outputs under a mask follow from the Jacobian at every example.
    base = opened.outputs.detach()
    rows = [
        torch.autograd.grad(c.sum(), gate.tensor, retain_graph=True)[0]
        for c in opened.outputs.unbind(1)
    ]
    jacobian = torch.stack([row.reshape(4, coins) for row in rows], 1)
    for probability, mask in zip(probabilities, z, strict=True):
        step = (mask / 0.7 - 1).expand(4, 1, coins)
        outputs = base + (jacobian * step).sum(-1)
        cost += float(probability) * float((outputs - y).square().mean())
    expected = cost - float((base - y).square().mean())
    for method in METHODS:
        found = dl.penalty(net, inputs, nn.MSELoss(), method)
        assert found.unmeasured == {}
        assert float(found) == pytest.approx(expected, rel=1e-10)
    drawn = dl.decompose(net, inputs, y, nn.MSELoss(), 800, seed=0)
    assert abs(drawn.spread.value - expected) <= 4.5 * drawn.spread.standard_error
    assert abs(drawn.shift.value) <= 4.5 * drawn.shift.standard_error


class Mixed(nn.Module):
    """Six sites of six laws, with a transformer layer among them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.channels = nn.Conv2d(1, 4, 3, padding=1), nn.Dropout2d(0.1)
        self.blocks, self.groups = dl.nn.DropBlock2d(0.2, 2), dl.nn.GroupedDropout(0.3, 2)
        self.path = dl.nn.DropPath(0.2)
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, 0.25, batch_first=True)
        self.head = dl.nn.drop_connect(nn.Linear(4, 3), "weight", 0.4)

    def forward(self, x):
        h = self.blocks(self.channels(torch.tanh(self.conv(x))))
        tokens = self.groups(h.flatten(2).mT)
        tokens = tokens + self.path(torch.tanh(tokens))
        return self.head(self.layer(tokens).mean(1))


def test_many_sites_together_add_up_in_second_order():
    """Each example alone, with a dense Jacobian in the gates of every site and its dense C̄."""
    net, inputs = Mixed().double(), randn(2, 1, 3, 3, seed=3)
    expected = {}
    for i in range(2):
        opened = open_gates(net, inputs[i : i + 1])
        (f,) = opened.outputs
        H = softmax_hessian(f.detach())
        for gate in opened.gates:
            rows = [torch.autograd.grad(c, gate.tensor, retain_graph=True)[0] for c in f]
            J = torch.stack(rows).flatten(1)
            relative = gate.law.covariance(gate.tensor.shape[1:]).dense()
            part = 0.5 * float((relative * (J.mT @ H @ J)).sum()) / 2
            expected[gate.name] = expected.get(gate.name, 0.0) + part
    found = dl.penalty(net, inputs, cross_entropy, "second_order")
    assert len(expected) == 9
    assert {k: float(v.detach()) for k, v in found.by_site.items()} == pytest.approx(
        expected, rel=1e-9
    )
    assert float(found) == pytest.approx(sum(expected.values()), rel=1e-9)
    drawn = dl.penalty(net, inputs, cross_entropy, "sampled", draws=400, seed=0)
    assert abs(float(drawn) - float(found)) <= 4.5 * drawn.standard_error


@pytest.mark.parametrize("method", METHODS)
def test_the_gradient_through_many_sites_is_that_of_finite_differences(method):
    net, inputs = Mixed().double(), randn(2, 1, 3, 3, seed=3)
    value = dl.penalty(net, inputs, cross_entropy, method).total
    parameters = list(net.parameters())
    gradients = torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)
    steps = [randn(*p.shape, seed=k) for k, p in enumerate(parameters)]
    slope = sum(float((g * s).sum()) for g, s in zip(gradients, steps, strict=True))
    moved = []
    for size in (1e-5, -2e-5):
        with torch.no_grad():
            for p, s in zip(parameters, steps, strict=True):
                p += size * s
            moved.append(float(dl.penalty(net, inputs, cross_entropy, method)))
    assert slope == pytest.approx((moved[0] - moved[1]) / 2e-5, rel=1e-5)
