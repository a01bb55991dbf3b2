"""Sites whose rows are not the examples in their order: each example costs what it costs alone."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import droplens as dl
from droplens.gates import open_gates
from tests.penalties.test_drop_connect import dense_second_order
from tests.penalties.test_penalty import METHODS, cross_entropy, randn

connect = dl.nn.drop_connect
PADDING = -9.0


def sequences(lengths=(2, 4, 1, 4, 3)):
    data = randn(len(lengths), 4, 3, seed=4)
    for row, length in zip(data, lengths, strict=True):
        row[length:] = PADDING
    return data


class Packed(nn.Module):
    """A recurrent network over sequences of several lengths, sorted by torch or not at all."""

    def __init__(self, layer, features, sort=True, padded=True):
        super().__init__()
        self.layer, self.sort, self.padded = layer, sort, padded
        self.head = nn.Linear(features, 3)

    def forward(self, x):
        lengths = (x[..., 0] != PADDING).sum(1)
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=not self.sort)
        out, last = self.layer(packed)
        if self.padded:
            return self.head(torch.tanh(pad_packed_sequence(out, batch_first=True)[0].sum(1)))
        return self.head((last[0] if isinstance(last, tuple) else last)[-1])


class Sorted(nn.Module):
    """Examples sorted by hand, masked, and put back."""

    def __init__(self):
        super().__init__()
        self.inner, self.drop, self.head = nn.Linear(3, 4), nn.Dropout(0.4), nn.Linear(4, 3)

    def forward(self, x):
        order = x[:, 0].argsort(descending=True)
        return self.head(self.drop(torch.tanh(self.inner(x[order]))))[order.argsort()]


class Turned(Sorted):
    def forward(self, x):
        return self.head(self.drop(torch.tanh(self.inner(x.flip(0))))).flip(0)


class Routed(nn.Module):
    """Two experts with dropout, of which each token meets one."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(p), nn.Linear(4, 3))
            for p in (0.3, 0.5)
        )

    def forward(self, x):
        tokens = x.flatten(0, 1)
        first = tokens[:, 0] > 0
        out = torch.zeros_like(tokens)
        out[first] = self.experts[0](tokens[first])
        out[~first] = self.experts[1](tokens[~first])
        return torch.tanh(out.view_as(x)).sum(1)


def lstm(**options):
    return nn.LSTM(3, 4, **options)


NETWORKS = {
    "packed, dropout between layers": lambda: Packed(lstm(num_layers=2, dropout=0.4), 4),
    "packed both ways": lambda: Packed(
        nn.GRU(3, 2, 3, dropout=0.3, bidirectional=True), 2, padded=False
    ),
    "sorted by hand": Sorted,
    "turned": Turned,
    "routed to experts": Routed,
}


def data_of(name):
    if "packed" in name:
        return sequences()
    return randn(6, 5, 3, seed=2) if name == "routed to experts" else randn(5, 3, seed=2)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NETWORKS)
def test_examples_cost_what_they_cost_alone(name, method):
    torch.manual_seed(0)
    net, data = NETWORKS[name]().double(), data_of(name)
    with torch.no_grad():
        found = dl.penalty(net, data, cross_entropy, method)
        alone = [dl.penalty(net, data[i : i + 1], cross_entropy, method) for i in range(len(data))]
    assert found.unmeasured == {}
    expected = torch.stack([one.per_example[0] for one in alone]) / len(data)
    torch.testing.assert_close(found.per_example, expected, rtol=1e-9, atol=1e-12)
    assert float(expected.min()) > 0


def test_packed_dropout_against_masks():
    torch.manual_seed(0)
    net = Packed(lstm(num_layers=2, dropout=0.2), 4, padded=False).double()
    with torch.no_grad():
        for weight in net.parameters():
            weight.mul_(0.5)  # little noise, so that the second order is near
    exact = float(dl.penalty(net, sequences(), nn.MSELoss()).total.detach())
    labels = randn(5, 3, seed=1)
    drawn = dl.decompose(net, sequences(), labels, nn.MSELoss(), 4000, seed=0).spread
    assert abs(drawn.value - exact) <= 4.5 * drawn.standard_error + 0.02 * exact


CONNECTED = {
    "LSTM": (lambda: connect(lstm(), "weight_hh_l0", 0.3), {"features": 4}),
    "LSTM, projected": (
        lambda: connect(lstm(proj_size=2), "weight_hr_l0", 0.3),
        {"features": 2, "padded": False},
    ),
    "GRU both ways": (
        lambda: connect(nn.GRU(3, 2, 2, bidirectional=True), "weight_hh_l1_reverse", 0.3),
        {"features": 4},
    ),
    "RNN without bias": (
        lambda: connect(nn.RNN(3, 4, bias=False), "weight_ih_l0", 0.3),
        {"features": 4},
    ),
    "LSTM, its bias": (lambda: connect(lstm(), "bias_ih_l0", 0.3), {"features": 4}),
    "LSTM, sorted before": (
        lambda: connect(lstm(), "weight_ih_l0", 0.3),
        {"features": 4, "sort": False},
    ),
}


@pytest.mark.parametrize("name", CONNECTED)
def test_drop_connect_on_packed_sequences_against_a_dense_jacobian(name):
    torch.manual_seed(0)
    make, options = CONNECTED[name]
    net = Packed(make(), **options).double().eval()
    data = sequences((4, 3, 3, 1)) if name == "LSTM, sorted before" else sequences()
    with torch.no_grad():
        found = dl.penalty(net, data, cross_entropy, "second_order")
    assert found.unmeasured == {}
    expected = dense_second_order(net, data)
    assert {k: float(v) for k, v in found.by_site.items()} == pytest.approx(expected, rel=1e-10)


def test_a_packed_networks_gradient_is_that_of_its_value():
    torch.manual_seed(0)
    net = Packed(connect(lstm(num_layers=2, dropout=0.3), "weight_hh_l0", 0.2), 4).double()
    weight = net.layer.parametrizations.weight_hh_l0.original
    value = dl.penalty(net, sequences(), cross_entropy).total
    (gradient,) = torch.autograd.grad(value, weight)
    direction, moved = randn(*weight.shape, seed=9), []
    for step in (1e-5, -1e-5):
        with torch.no_grad():
            weight += step * direction
            moved.append(float(dl.penalty(net, sequences(), cross_entropy)))
            weight -= step * direction
    slope = (moved[0] - moved[1]) / 2e-5
    assert float((gradient * direction).sum()) == pytest.approx(slope, rel=1e-6)


def test_unrolled_packed_sequences_are_torchs():
    """Outputs of a network whose weight is followed, against the fused kernel's."""
    torch.manual_seed(0)
    for layer in (lstm(num_layers=2, bidirectional=True), nn.GRU(3, 8), nn.RNN(3, 8)):
        net = Packed(layer, 8).double().eval()
        expected = net(sequences())
        connect(layer, "weight_hh_l0", 0.3)
        torch.testing.assert_close(open_gates(net, sequences()).outputs, expected)


def test_what_mixes_examples_stays_unmeasured():
    class Pairs(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop, self.head = nn.Dropout(0.3), nn.Linear(3, 3)

        def forward(self, x):
            together = self.drop(x.flatten()[None])  # one row for all
            return self.head(together.view_as(x) + together.mean())

    net = Pairs().double()
    found = dl.penalty(net, randn(5, 3), cross_entropy)
    assert "in which the 5 examples cannot be told apart" in found.unmeasured["drop"]


class Mixed(nn.Module):
    """Examples that meet in a site's own layout: centred by their batch, or a graph's nodes."""

    def __init__(self, meet):
        super().__init__()
        self.layer, self.drop, self.head = nn.Linear(3, 8), nn.Dropout(0.3), nn.Linear(8, 3)
        self.meet, self.late = meet, nn.Dropout(0.2)

    def forward(self, x):
        h = self.meet(self.drop(torch.tanh(self.layer(x))))
        return self.head(self.late(h))


MEETINGS = {
    "centred": lambda h: h - h.mean(0),
    "summed up": lambda h: h.cumsum(0),
    "a graph that knows its nodes": lambda h: torch.ones(5, 5, dtype=h.dtype).triu() @ h,
}


@pytest.mark.parametrize("method", ["gaussian", "second_order", "sampled"])
@pytest.mark.parametrize("meet", MEETINGS.values(), ids=MEETINGS)
def test_what_mixes_examples_in_place_stays_unmeasured(meet, method):
    torch.manual_seed(0)
    net = Mixed(meet).double()
    found = dl.penalty(net, randn(5, 3), cross_entropy, method)
    assert list(found.unmeasured) == ["drop"]
    assert "in which the 5 examples cannot be told apart" in found.unmeasured["drop"]
    assert list(found.by_site) == ["late"]
    with pytest.raises(ValueError, match="its mask mixes examples"):
        dl.penalty(net, randn(5, 3), cross_entropy, method, sites=["drop"])
    alone = dl.penalty(Mixed(lambda h: h).double(), randn(5, 3), cross_entropy, method)
    assert alone.unmeasured == {}


def test_units_that_examples_share_are_not_taken_for_theirs():
    """A weight with as many rows as there are examples, dropped by a function."""

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.Linear(3, 5), nn.Linear(5, 3)

        def forward(self, x):
            weight = nn.functional.dropout(self.layer.weight, 0.3, self.training)
            return self.head(torch.tanh(nn.functional.linear(x, weight, self.layer.bias)))

    for n in (5, 4):
        found = dl.penalty(Shared().double(), randn(n, 3), cross_entropy)
        assert f"in which the {n} examples cannot be told apart" in found.unmeasured["dropout"]


def test_channels_without_a_batch_are_not_taken_for_examples():
    layers = [nn.Conv1d(4, 4, 3, padding=1), nn.Dropout(0.3), nn.Conv1d(4, 4, 3, padding=1)]
    found = dl.penalty(nn.Sequential(*layers).double(), randn(4, 10), nn.MSELoss())
    assert "its mask mixes examples" in found.unmeasured["1"]


def test_a_hook_on_a_plain_layer_may_mix_examples():
    net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.3), nn.Linear(4, 3)).double()
    assert dl.penalty(net, randn(5, 3), cross_entropy).unmeasured == {}
    net[2].register_forward_hook(lambda module, given, result: result - result.mean(0))
    found = dl.penalty(net, randn(5, 3), cross_entropy)
    assert "its mask mixes examples" in found.unmeasured["1"]


def test_a_weight_that_examples_share_puts_none_of_them_in_another_order():
    net = nn.Sequential(dl.nn.drop_connect(nn.Linear(3, 4), "weight", 0.3), nn.Linear(4, 3))
    opened = open_gates(net.double(), randn(6, 3))
    assert [gate.weight is None for gate in opened.gates] == [False]
    assert not opened.reordered  # or every example would have to be asked for


def test_a_way_chosen_by_the_batch_mixes_nothing():
    """Outputs change with the examples beside them, and the noise in them does not."""
    torch.manual_seed(0)
    net = Mixed(lambda h: h * (len(h) > 4)).double()
    found = dl.penalty(net, randn(5, 3), cross_entropy)
    assert found.unmeasured == {}
    torch.manual_seed(0)
    plain = dl.penalty(Mixed(lambda h: h).double(), randn(5, 3), cross_entropy)
    assert float(found) == pytest.approx(float(plain), rel=1e-12)
