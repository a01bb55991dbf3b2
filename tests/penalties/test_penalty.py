"""Penalties against dense Gauss–Newton matrices, enumerated masks and finite differences."""

import math

import pytest
import torch
from torch import nn

import droplens as dl
from tests.reference import (
    all_coins,
    exact_parts,
    gate_gauss_newton,
    softmax_hessian,
)

METHODS = ["gaussian", "second_order"]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tail_network(p=0.3, units=4, classes=3):
    """Dropout before the last linear layer only: affine in the gates."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(2, units), nn.Tanh(), nn.Dropout(p), nn.Linear(units, classes)
    ).double()


def deep_network(p=0.3):
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Linear(2, 4), nn.Tanh(), nn.Dropout(p), nn.Linear(4, 4), nn.Tanh(), nn.Dropout(p),
        nn.Linear(4, 3),
    ).double()  # fmt: skip


x = randn(5, 2)
labels = torch.tensor([0, 2, 1, 1, 0])
cross_entropy = nn.CrossEntropyLoss()


def lam(p):
    return p / (1 - p)


def test_squared_loss_before_the_last_layer_is_exact():
    """E ℓ(f_z) − ℓ(f_1) over all masks equals the penalty to rounding (theory head)."""
    net = tail_network()
    y = randn(5, 3, seed=3)
    hidden = torch.tanh(net[0](x))
    expected = 0.0
    for probability, z in all_coins(4, 0.3):
        f = net[3](hidden * z / 0.7)
        expected += probability * ((f - y) ** 2).mean().detach().item()
    expected -= ((net[3](hidden) - y) ** 2).mean().detach().item()
    for method in METHODS:
        value = dl.penalty(net, x, nn.MSELoss(), method)
        assert float(value) == pytest.approx(expected, rel=1e-12)
        assert "exact" in value.approximation


class Last(nn.Module):
    """A dropout, and what `read` makes of it and a last layer."""

    def __init__(self, read, law):
        super().__init__()
        torch.manual_seed(4)
        self.read, self.drop = read, law
        self.first, self.last = nn.Linear(2, 4), nn.Linear(4, 4)

    def forward(self, inputs):
        return self.read(self.last, self.drop(torch.tanh(self.first(inputs))))


LAST = {
    "a layer": lambda layer, h: layer(h),
    "no bias": lambda layer, h: h @ layer.weight.T,
    "a layer and its input": lambda layer, h: layer(h) + h,
    "a bias of the input": lambda layer, h: torch.addmm(h.square(), h, layer.weight.T),
    "a bias of the example": lambda layer, h: torch.addmm(h.detach(), h, layer.weight.T),
    "a bent layer": lambda layer, h: torch.tanh(layer(h)),
    "a layer of its square": lambda layer, h: layer(h * h),
}


@pytest.mark.parametrize("read", LAST.values(), ids=LAST)
@pytest.mark.parametrize("law", [nn.Dropout(0.1), dl.nn.GaussianDropout(0.1), dl.nn.DropPath(0.1)])
def test_every_example_of_a_batch_has_the_value_it_has_alone(read, law):
    """Whether or not all examples share their Jacobian; of narrow noise, which has one rule."""
    net, loss = Last(read, law).double(), nn.CrossEntropyLoss(reduction="sum")
    together = dl.penalty(net, x, loss)
    alone = [dl.penalty(net, row[None], loss) for row in x]
    for found, parts in (
        (together.per_example, torch.cat([part.per_example for part in alone])),
        (together.by_site["drop"], sum(part.by_site["drop"] for part in alone)),
    ):
        torch.testing.assert_close(found, parts, rtol=1e-10, atol=1e-14)
    parameters = [p for p in net.parameters() if p.requires_grad]
    found, parts = (
        torch.autograd.grad(total, parameters, allow_unused=True, materialize_grads=True)
        for total in (together.total, sum(part.total for part in alone))
    )
    for ours, theirs in zip(found, parts, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


def test_second_order_is_half_the_inner_product_of_mask_and_gauss_newton():
    """½ ⟨C̄, G⟩ with G from dense Jacobians in all gates of both layers."""
    net = deep_network()
    expected = {"2": 0.0, "5": 0.0}
    for row in x:

        def through(gates, row=row):
            h = torch.tanh(net[0](row)) * gates[:4]
            return net[6](torch.tanh(net[3](h)) * gates[4:])

        g = gate_gauss_newton(through, 8, softmax_hessian)
        expected["2"] += 0.5 * lam(0.3) * g[:4, :4].trace().item() / 5
        expected["5"] += 0.5 * lam(0.3) * g[4:, 4:].trace().item() / 5
    value = dl.penalty(net, x, cross_entropy, "second_order")
    assert {k: float(v.detach()) for k, v in value.by_site.items()} == pytest.approx(
        expected, rel=1e-10
    )
    assert float(value) == pytest.approx(sum(expected.values()), rel=1e-10)


def test_channel_masks_square_the_sum_over_the_group():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), nn.Dropout2d(0.4), nn.Flatten(), nn.Linear(48, 3)
    ).double()
    images = randn(2, 1, 4, 4)
    expected = 0.0
    for image in images:
        hidden = torch.tanh(net[0](image[None]))[0]

        def through(gates, hidden=hidden):
            return net[4]((hidden * gates[:, None, None]).flatten())

        g = gate_gauss_newton(through, 3, softmax_hessian)
        expected += 0.5 * lam(0.4) * float(torch.trace(g)) / 2
    value = dl.penalty(net, images, cross_entropy, "second_order")
    assert float(value) == pytest.approx(expected, rel=1e-10)


def test_gaussian_value_against_monte_carlo_of_its_own_definition():
    """E_ε[A(f+ε) − A(f) − ∇Aᵀε] with ε ~ N(0, K), K from a dense Jacobian; 6 s.e. + 1%."""
    net = tail_network(p=0.5)
    total, variance = 0.0, 0.0
    draws = 40_000
    for row in x:
        hidden = torch.tanh(net[0](row))
        jacobian = net[3].weight * hidden  # (C, units)
        covariance = lam(0.5) * jacobian @ jacobian.mT
        f = net[3](hidden)
        factor = torch.linalg.cholesky(covariance + 1e-12 * torch.eye(3))
        steps = randn(draws, 3, seed=7) @ factor.mT
        values = (
            torch.logsumexp(f + steps, -1) - torch.logsumexp(f, -1)
            - steps @ torch.softmax(f, -1)
        )  # fmt: skip
        total += float(values.detach().mean()) / 5
        variance += float(values.detach().var()) / draws / 25
    value = float(dl.penalty(net, x, cross_entropy))
    assert abs(value - total) <= 6 * math.sqrt(variance) + 0.01 * total


def test_gaussian_spread_is_the_true_spread_under_gaussian_masks_at_the_tail():
    """Gaussian masks before the last layer make the output noise Gaussian: only the point set errs.

    The mask law is given by a module whose dropout is replaced, so compare with Monte Carlo.
    """
    net = tail_network(p=0.5, units=6)
    hidden = torch.tanh(net[0](x))
    generator = torch.Generator().manual_seed(3)
    draws = 20_000
    masks = 1 + torch.randn(draws, 5, 6, generator=generator, dtype=torch.float64)
    outputs = net[3](hidden * masks)
    centre = net[3](hidden)
    excess = (
        torch.logsumexp(outputs, -1) - torch.logsumexp(centre, -1)
        - ((outputs - centre) * torch.softmax(centre, -1)).sum(-1)
    ).mean(1).detach()  # fmt: skip
    error = float(excess.std()) / math.sqrt(draws)
    value = float(dl.penalty(net, x, cross_entropy))
    assert abs(value - float(excess.mean())) <= 6 * error + 0.01 * value


def test_both_methods_agree_as_the_noise_shrinks():
    values = {m: float(dl.penalty(tail_network(p=1e-4), x, cross_entropy, m)) for m in METHODS}
    assert values["gaussian"] == pytest.approx(values["second_order"], rel=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_the_gradient_is_that_of_finite_differences(method):
    net = deep_network()
    value = dl.penalty(net, x, cross_entropy, method).total
    weight = net[3].weight
    (gradient,) = torch.autograd.grad(value, weight)
    for entry in ((0, 0), (2, 3)):
        values = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                weight[entry] += step
            values.append(float(dl.penalty(net, x, cross_entropy, method)))
            with torch.no_grad():
                weight[entry] -= step
        slope = (values[0] - values[1]) / 2e-5
        assert float(gradient[entry]) == pytest.approx(slope, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_without_gradients_no_graph_is_kept(method):
    with torch.no_grad():
        value = dl.penalty(deep_network(), x, cross_entropy, method)
    assert not value.total.requires_grad
    assert not any(v.requires_grad for v in value.by_site.values())
    assert dl.penalty(deep_network(), x, cross_entropy, method).total.requires_grad


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("loss", [nn.MSELoss(), cross_entropy], ids=["squared", "cross-entropy"])
def test_degenerate_rates_and_weights(method, loss):
    assert float(dl.penalty(tail_network(p=0.0), x, loss, method)) == pytest.approx(0, abs=1e-12)
    dead = tail_network()
    nn.init.zeros_(dead[3].weight)
    value = dl.penalty(dead, x, loss, method)
    assert float(value) == pytest.approx(0, abs=1e-12)
    (gradient,) = torch.autograd.grad(value.total, dead[3].weight)
    assert bool(torch.isfinite(gradient).all())
    one = dl.penalty(tail_network(units=1), x[:1], loss, method)
    assert float(one) >= 0
    with pytest.raises(ValueError, match="site '2': p = 1 drops every unit"):
        dl.penalty(tail_network(p=1.0), x, loss, method)


def test_the_mode_does_not_matter_and_is_kept():
    net = deep_network()
    train = float(dl.penalty(net.train(), x, cross_entropy))
    assert net.training
    evaluated = float(dl.penalty(net.eval(), x, cross_entropy))
    assert train == evaluated
    assert not net.training


def test_a_subset_of_sites():
    net = deep_network()
    whole = dl.penalty(net, x, cross_entropy)
    part = dl.penalty(net, x, cross_entropy, sites=["5"])
    assert list(part.by_site) == ["5"]
    torch.testing.assert_close(part.total, whole.by_site["5"])
    with pytest.raises(ValueError, match="sites holds '9', which the forward pass does not meet"):
        dl.penalty(net, x, cross_entropy, sites=["9"])


def test_sites_in_layouts_other_than_batch_first():
    """Sequence-first, and rows of (example, position) folded either way, give the same number."""

    class Layout(nn.Module):
        def __init__(self, how, first=False):
            super().__init__()
            self.how, self.first, self.drop = how, first, nn.Dropout(0.3)
            torch.manual_seed(0)
            self.inner, self.head = nn.Linear(2, 4), nn.Linear(4, 3)

        def forward(self, sequence):  # (n, T, 2)
            n, length, _ = sequence.shape
            h = torch.tanh(self.inner(sequence))
            if self.how == "batch first":
                h = self.drop(h)
            elif self.how == "sequence first":
                h = self.drop(h.transpose(0, 1)).transpose(0, 1)
            elif self.how == "folded":
                h = self.drop(h.reshape(n * length, -1)).reshape(n, length, -1)
            else:
                h = self.drop(h.transpose(0, 1).reshape(n * length, -1))
                h = h.reshape(length, n, -1).transpose(0, 1)
            return self.head(h[:, 0] if self.first else h.mean(1))

    layouts = ("batch first", "sequence first", "folded", "folded by position")
    for shape in ((5, 3, 2), (4, 4, 2), (2, 6, 2)):
        data = randn(*shape)
        for method in METHODS:
            # Where only the first position is read, the first example alone tells too little.
            for first in (False, True):
                values = [
                    float(dl.penalty(Layout(how, first).double(), data, cross_entropy, method))
                    for how in layouts
                ]
                assert values == pytest.approx([values[0]] * 4, rel=1e-10)


def test_a_mask_that_mixes_examples_is_not_counted_and_refused_by_name():
    class Mixes(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, h):
            return h * self.drop(h.new_ones(1, 2))

    value = dl.penalty(Mixes(), x, cross_entropy)
    assert value.by_site == {}
    assert "its mask mixes examples" in value.unmeasured["drop"]
    with pytest.raises(ValueError, match="its mask mixes examples"):
        dl.penalty(Mixes(), x, cross_entropy, sites=["drop"])


def test_terms_of_one_example_add_up():
    """Token-wise cross-entropy: (n, C, T) outputs against a loop over terms."""
    torch.manual_seed(0)

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop, self.head = nn.Dropout(0.3), nn.Linear(4, 6)

        def forward(self, h):
            return self.head(self.drop(h)).unflatten(1, (3, 2))

    net, data = Tokens().double(), randn(5, 4)

    class One(nn.Module):
        def __init__(self, t):
            super().__init__()
            self.t = t

        def forward(self, h):
            return net(h)[:, :, self.t]

    for method in METHODS:
        whole = float(dl.penalty(net, data, cross_entropy, method))
        parts = []
        for t in range(2):
            one = One(t)
            one.net = net
            parts.append(float(dl.penalty(one, data, cross_entropy, method)))
        assert whole == pytest.approx(sum(parts) / 2, rel=1e-10)


@pytest.mark.parametrize("method", [*METHODS, "sampled"])
def test_parts_by_example_are_the_penalties_of_single_examples(method):
    net = deep_network()
    whole = dl.penalty(net, x, cross_entropy, method, seed=0)
    torch.testing.assert_close(whole.per_example.sum(), whole.total)
    assert whole.per_example.shape == (5,)
    if method != "sampled":
        alone = [float(dl.penalty(net, x[i : i + 1], cross_entropy, method)) for i in range(5)]
        assert (5 * whole.per_example).tolist() == pytest.approx(alone, rel=1e-9)


def test_class_weights_need_targets_and_weigh_examples():
    net = tail_network()
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 0.0, 3.0], dtype=torch.float64))
    with pytest.raises(ValueError, match="pass targets="):
        dl.penalty(net, x, loss)
    for method in METHODS:
        value = float(dl.penalty(net, x, loss, method, targets=labels))
        each = [float(dl.penalty(net, x[i : i + 1], cross_entropy, method)) for i in range(5)]
        weights = [1.0, 3.0, 0.0, 0.0, 1.0]
        expected = sum(w * v for w, v in zip(weights, each, strict=True)) / 5
        assert value == pytest.approx(expected, rel=1e-10)


def test_single_precision_is_close_to_double():
    net = deep_network(p=0.5)
    wide = float(dl.penalty(net, x, cross_entropy))
    assert float(dl.penalty(net.float(), x.float(), cross_entropy)) == pytest.approx(wide, rel=1e-4)


def test_bad_arguments_are_named():
    net = tail_network()
    with pytest.raises(ValueError, match=r"method has to be one of 'gaussian', .* but got 'x'"):
        dl.penalty(net, x, cross_entropy, "x")
    with pytest.raises(TypeError, match="loss L1Loss is not one"):
        dl.penalty(net, x, nn.L1Loss())
    with pytest.raises(ValueError, match="label 7, but the outputs have 3 classes"):
        dl.penalty(net, x, cross_entropy, targets=torch.full((5,), 7))
    for draws in (2.5, True, "3"):
        with pytest.raises(TypeError, match="draws has to be an int, but got"):
            dl.penalty(net, x, cross_entropy, "sampled", draws=draws)
    with pytest.raises(TypeError, match="sites has to be a list of names, but got a string"):
        dl.penalty(net, x, cross_entropy, sites="1")
    with pytest.raises(TypeError, match="targets has to be a tensor, but got ndarray"):
        dl.penalty(net, x, cross_entropy, targets=labels.numpy())
    with pytest.raises(TypeError, match="rates has to be a list of numbers, but got float"):
        dl.penalty_curve(net, x, cross_entropy, 0.1)
    nn.init.constant_(net[0].bias, torch.nan)
    with pytest.raises(ValueError, match=r"weight '0\.bias' holds NaN or Inf"):
        dl.penalty(net, x, cross_entropy)


MEASURES = {
    "sites": lambda model: dl.sites(model, x),
    "penalty": lambda model: dl.penalty(model, x, cross_entropy),
    "sampled": lambda model: dl.penalty(model, x, cross_entropy, "sampled"),
    "curve": lambda model: dl.penalty_curve(model, x, cross_entropy, [0.1]),
    "decompose": lambda model: dl.decompose(model, x, labels, cross_entropy),
    "predict": lambda model: dl.predict(model, x),
    "inspect": lambda model: dl.inspect(model, (x, labels), cross_entropy),
}


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
def test_what_is_no_network_is_refused(measure):
    with pytest.raises(TypeError, match="model has to be a torch module, but got function"):
        measure(lambda inputs: inputs)
    with pytest.raises(TypeError, match="model has to be a network, but got the class; write Lin"):
        measure(nn.Linear)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_gap_is_spread_plus_shift_over_all_masks(p):
    """Enumeration of all 2⁸ masks of two layers, one tanh layer after the first (theory §3.1)."""
    net = deep_network(p)
    for row, label in zip(x, labels, strict=True):
        probabilities, outputs = [], []
        for probability, z in all_coins(8, p):
            h = torch.tanh(net[0](row)) * z[:4] / (1 - p)
            outputs.append(net[6](torch.tanh(net[3](h)) * z[4:] / (1 - p)).detach())
            probabilities.append(probability)
        gap, spread, shift = exact_parts(
            torch.tensor(probabilities, dtype=torch.float64),
            torch.stack(outputs),
            net.eval()(row).detach(),
            lambda f, label=label: torch.logsumexp(f, -1) - f[label],
            lambda f: torch.logsumexp(f, -1),
        )
        assert abs(gap - spread - shift) <= 1e-12
        assert spread > 0


@pytest.mark.parametrize(
    "last",
    [
        lambda h, weight, bias: torch.addmm(bias, h, weight, alpha=2.5),
        lambda h, weight, bias: torch.addmm(bias, h, weight.detach(), alpha=2.5),
        lambda h, weight, bias: torch.mm(h, 2.5 * weight) + bias,
    ],
    ids=["scaled", "frozen", "product"],
)
def test_a_last_matrix_is_seen_through(last):
    """Values start at its slope where it is recognised, gradients do not: they have to agree."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.drop = nn.Linear(5, 7), nn.Dropout(0.4)
            self.weight, self.bias = (nn.Parameter(torch.randn(*s)) for s in ((7, 3), (3,)))

        def forward(self, x):
            return last(self.drop(torch.tanh(self.first(x))), self.weight, self.bias)

    torch.manual_seed(0)
    net, x = Net().double(), randn(6, 5)
    linear = nn.Sequential(net.first, nn.Tanh(), net.drop, nn.Linear(7, 3).double())
    linear[3].weight.data, linear[3].bias.data = 2.5 * net.weight.data.T, net.bias.data
    expected = float(dl.penalty(linear, x, cross_entropy))
    with torch.no_grad():
        assert float(dl.penalty(net, x, cross_entropy)) == pytest.approx(expected, rel=1e-12)
    assert float(dl.penalty(net, x, cross_entropy)) == pytest.approx(expected, rel=1e-12)
