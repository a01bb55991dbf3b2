"""Noise that is no dropout call: off where dropout is off, and where its masks are ours."""

import random

import numpy as np
import pytest
import torch
from torch import nn

import droplens as dl
from droplens.gates import draw_masks, masks_held, masks_off, masks_replaced, open_gates

x = torch.randn(6, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
labels = torch.arange(6) % 2
cross_entropy = nn.CrossEntropyLoss()


class Noisy(nn.Module):
    """Noise written by hand around a layer, in train mode only."""

    def __init__(self, draw, around=None):
        super().__init__()
        self.draw, self.around = draw, around or nn.Identity()

    def forward(self, h):
        h = self.around(h)
        return h + self.draw(h) if self.training else h


class Own(nn.Module):
    """Noise from generators of the module's own."""

    def __init__(self):
        super().__init__()
        self.numpy, self.python = np.random.default_rng(0), random.Random(0)
        self.torch = torch.Generator().manual_seed(0)

    def forward(self, h):
        return h + self.numpy.random() if self.training else h

    def state(self):
        numpy = self.numpy.bit_generator.state["state"]
        return numpy, self.python.getstate(), self.torch.get_state().tolist()


class Newer(Noisy):
    def __init__(self, *args):
        super().__init__(*args)
        self.own = np.random.default_rng(0)
        self.draw = lambda h: self.own.random()


class Beside(Noisy):
    """Noise beside a dropout function, both under one flag; the twin has a module for it."""

    def forward(self, h):
        h = torch.tanh(nn.functional.dropout(h, self.around[0].p, self.training))
        return h + self.draw(h) if self.training else h


class BesideAttention(Noisy):
    """The same, of an attention that is told a rate of 0 at test time."""

    def forward(self, h):
        h = attention(h, self.around.p if self.training else 0.0)
        return h + self.draw(h) if self.training else h


class Attention(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, h):
        return attention(h, self.p * self.training)


def attention(h, p):
    h = h.unflatten(1, (2, 2))
    return nn.functional.scaled_dot_product_attention(h, h, h, dropout_p=p).flatten(1)


def spectral(normalise):
    net = nn.Sequential(normalise(nn.Linear(3, 4)), nn.Tanh(), nn.Dropout(0.3), nn.Linear(4, 2))
    with torch.no_grad():
        net[3].weight.mul_(5)
    return net


NETWORKS = {
    "rand": lambda: noisy(lambda h: torch.rand(len(h), 1, dtype=h.dtype)),
    "randn_like": lambda: noisy(torch.randn_like),
    "bernoulli_": lambda: noisy(lambda h: torch.empty_like(h).bernoulli_(0.5)),
    "normal": lambda: noisy(lambda h: torch.normal(0.0, 1.0, h.shape, dtype=h.dtype)),
    "Python's random": lambda: noisy(lambda h: h * (random.random() < 0.5)),
    "NumPy's": lambda: noisy(lambda h: torch.from_numpy(np.random.normal(size=h.shape))),
    "NumPy's newer": lambda: noisy(None, kind=Newer),
    "native": lambda: noisy(lambda h: torch.native_dropout(h, 0.5, train=True)[0]),
    "aten": lambda: noisy(lambda h: torch.ops.aten.native_dropout(h, 0.5, True)[0]),
    "around dropout": lambda: noisy(torch.randn_like, nn.Dropout(0.4)),
    "beside dropout": lambda: noisy(
        torch.randn_like, nn.Sequential(nn.Dropout(0.4), nn.Tanh()), Beside
    ),
    "beside attention": lambda: noisy(torch.randn_like, Attention(0.4), BesideAttention),
    "spectral norm": lambda: spectral(nn.utils.parametrizations.spectral_norm),
    "old spectral norm": lambda: spectral(nn.utils.spectral_norm),
}


def noisy(draw, around=None, kind=Noisy):
    return nn.Sequential(
        nn.Linear(3, 4), kind(draw, around), nn.Tanh(), nn.Dropout(0.3), nn.Linear(4, 2)
    )


@pytest.fixture(params=NETWORKS)
def net(request):
    torch.manual_seed(0)
    return NETWORKS[request.param]().double()


def without_noise(net):
    """A copy that has none to begin with."""
    return nn.Sequential(
        *(child.around if isinstance(child, Noisy) else child for child in net)
    ).eval()


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_off_is_what_eval_is(net, mode):
    expected = net.eval()(x)
    net.train(mode)
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    with masks_off(net):
        for _ in range(2):
            # Attention spelt out rounds otherwise than torch's kernel.
            torch.testing.assert_close(net(x), expected, rtol=1e-12, atol=1e-12)
    assert all(module.training is mode for module in net.modules())
    assert all(torch.equal(before[name], buffer) for name, buffer in net.named_buffers())
    assert not net._forward_hooks


def test_noise_is_listed_where_it_is_drawn(net):
    found = [site for site in dl.sites(net.train(), x) if site.law is None]
    if not isinstance(net[1], Noisy):
        assert not found
        return
    (site,) = found
    assert site.name == f"1.{site.kind}"
    assert site.active
    assert site.reason == f"it draws random numbers by {site.kind}, outside any dropout call"
    assert site.name in dl.decompose(net, x, labels, cross_entropy, draws=2).unmeasured
    assert not any(site.active for site in dl.sites(net.eval(), x))


@pytest.mark.parametrize("draw", [random.random, np.random.normal], ids=["Python", "NumPy"])
def test_streams_outside_torch_are_put_back(draw):
    net, found = noisy(lambda h: h * draw()).double(), []
    for broken in (False, True):
        random.seed(3)
        np.random.seed(3)
        if broken:
            net[4].weight = nn.Parameter(net[4].weight[:, :3])
            with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
                dl.predict(net, x, 2)
        else:
            dl.sites(net, x)
            dl.decompose(net, x, labels, cross_entropy, draws=4)
            dl.penalty(net, x, cross_entropy)
            first, again = (dl.predict(net, x, 4, seed=0) for _ in range(2))
            assert torch.equal(first.mean, again.mean)
        found.append((random.random(), np.random.normal()))
    random.seed(3)
    np.random.seed(3)
    assert found == [(random.random(), np.random.normal())] * 2


def test_a_global_stream_of_another_kind_is_put_back():
    net, before = noisy(lambda h: h * np.random.normal()).double(), np.random.get_bit_generator()
    np.random.set_bit_generator(np.random.PCG64(3))
    try:
        kinds = {site.kind for site in dl.sites(net, x)}
        dl.penalty(net, x, cross_entropy)
        following = np.random.normal()
    finally:
        np.random.set_bit_generator(before)
    assert "numpy.random" in kinds
    assert following == np.random.RandomState(np.random.PCG64(3)).normal()


def test_generators_that_a_module_owns_are_put_back():
    own = Own()

    class Every(nn.Module):
        def __init__(self):
            super().__init__()
            self.own = own

        def forward(self, h):
            if self.training:
                h = h * own.python.random() + torch.rand(1, generator=own.torch)
            return own(h)

    net = nn.Sequential(nn.Linear(3, 4), Every(), nn.Dropout(0.3), nn.Linear(4, 2)).double()
    before = own.state()
    found = {site.name for site in dl.sites(net, x) if site.law is None}
    assert found == {"1.random.Random", "1.rand", "1.own.numpy.random.Generator"}
    dl.decompose(net, x, labels, cross_entropy, draws=2)
    dl.predict(net, x, 2)
    assert own.state() == before


def test_masks_are_all_the_noise_there_is(net):
    """The first pass is run again without the module's noise, with masks of its own."""
    twin = without_noise(net)
    found, expected = [], []
    for model, into in ((net, found), (twin, expected)):
        with masks_held(model, 0) as held:
            for draw in (0, 1, 0):
                held.hold(draw, 0)
                into.append(model(x))
    assert all(map(torch.equal, found, expected))
    assert torch.equal(found[0], found[2])
    source = torch.Generator().manual_seed(0)
    with masks_replaced(net, draw_masks(source)):
        assert not torch.equal(net(x), net(x))


def test_gates_are_met_once(net):
    opened, expected = open_gates(net.train(), x), open_gates(without_noise(net), x)
    assert torch.equal(opened.outputs, expected.outputs)
    shapes = [[gate.tensor.shape for gate in gates] for gates in (opened.gates, expected.gates)]
    assert shapes[0] == shapes[1]
    values = [float(dl.penalty(model, x, cross_entropy)) for model in (net, without_noise(net))]
    assert values[0] == values[1]


def test_what_is_measured_does_not_follow_the_global_stream(net):
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        found.append(dl.decompose(net, x, labels, cross_entropy, draws=8, seed=0))
    assert found[0] == found[1]
    assert found[0].base.value == pytest.approx(cross_entropy(net.eval()(x), labels).item())


def test_noise_stays_where_eval_would_pass_over_a_dropout():
    class Both(nn.Module):
        def forward(self, h):
            if not self.training:
                return h
            return nn.functional.dropout(h, 0.5) + torch.randn_like(h)

    net = nn.Sequential(nn.Linear(3, 4), Both()).double()
    with masks_off(net):
        assert not torch.equal(net(x), net(x))
    assert [site.law is None for site in dl.sites(net, x)] == [False, True]
    assert [gate.name for gate in open_gates(net, x).gates] == ["1.dropout"]


class Skipping(nn.Module):
    """A residual branch, with a dropout of its own, that chance passes over (LayerDrop)."""

    def __init__(self):
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.3))

    def forward(self, h):
        h = nn.functional.dropout(h, 0.2, self.training)
        return h if self.training and torch.rand([]) < 0.9 else h + self.branch(h)


def test_sites_that_chance_passes_over_are_found():
    net = nn.Sequential(nn.Linear(3, 4), Skipping(), nn.Linear(4, 2)).double()
    for _ in range(5):
        found = {site.name: site.active for site in dl.sites(net.train(), x)}
        assert found == {"1.dropout": True, "1.branch.1": True, "1.rand": True}
    assert not any(site.active for site in dl.sites(net.eval(), x))
    found = dl.decompose(net, x, labels, cross_entropy, draws=4)
    assert found.base.value == pytest.approx(cross_entropy(net(x), labels).item())
    assert all(parts.gap.standard_error > 0 for parts in found.by_site.values())
    assert set(found.by_site) == {"1.dropout", "1.branch.1"}


def test_noise_in_eval_too_is_the_networks_own():
    class Always(nn.Module):
        def forward(self, h):
            return h + torch.randn_like(h)

    net = nn.Sequential(nn.Linear(3, 4), Always(), nn.Dropout(0.5)).double()
    with masks_off(net):
        assert not torch.equal(net(x), net(x))


def test_auxiliary_outputs_of_train_mode_are_left_out():
    """As Inception has them."""

    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5))
            self.head, self.side = nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, inputs):
            h = self.body(inputs)
            return (self.head(h), self.side(h)) if self.training else self.head(h)

    net = Auxiliary().double()
    found = dl.decompose(net, x, labels, cross_entropy, draws=8, seed=0)
    assert found.base.value == pytest.approx(cross_entropy(net.eval()(x), labels).item())
    assert found.gap.standard_error > 0
    assert dl.penalty(net, x, cross_entropy).total > 0
    both = dl.compare({"a": net, "b": Auxiliary().double()}, (x, labels), cross_entropy, seed=0)
    assert both.sets["a"][0].base == pytest.approx(found.base.value)


def test_auxiliary_outputs_beside_a_dropout_function_are_left_out():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, inputs):
            h = nn.functional.dropout(self.body(inputs), 0.5, self.training)
            return (self.head(h), h) if self.training else self.head(h)

    net = Auxiliary().double()
    alone = nn.Sequential(net.body, nn.Dropout(0.5), net.head)
    found = []
    for model in (net, alone):
        with masks_held(model, 0) as held:
            held.hold(1, 0)
            found.append(model(x))
    assert torch.equal(*found)
    found = dl.decompose(net, x, labels, cross_entropy, draws=8, seed=0)
    assert found.base.value == pytest.approx(cross_entropy(alone.eval()(x), labels).item())
    assert found.gap.standard_error > 0


def test_several_outputs_in_eval_too_are_refused():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, inputs):
            return self.drop(inputs), inputs

    with pytest.raises(TypeError, match="the model returned a tuple of 2"):
        dl.penalty(Pair().double(), x, cross_entropy)
