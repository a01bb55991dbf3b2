"""DropConnect: coins on weights, against dense Jacobians in every entry and all their masks."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import droplens as dl
from droplens.gates import open_gates
from tests.penalties.test_penalty import METHODS, cross_entropy, randn
from tests.reference import all_coins, exact_parts, softmax_hessian

connect = dl.nn.drop_connect


class Run(nn.Module):
    """Modules and a forward pass that a function describes."""

    def __init__(self, forward, **modules):
        super().__init__()
        self.run = forward
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, *inputs):
        return self.run(self, *inputs)


def linear(p):
    return nn.Sequential(connect(nn.Linear(3, 4), "weight", p), nn.Tanh(), nn.Linear(4, 3))


def tokens(p):
    layer = connect(nn.Linear(3, 4), "weight", p)
    return Run(
        lambda m, x: m.head(torch.tanh(m.inner(x)).mean(1)), inner=layer, head=nn.Linear(4, 3)
    )


def tokens_first(p):
    def forward(m, x):
        return m.head(torch.tanh(m.inner(x.transpose(0, 1))).mean(0))

    return Run(forward, inner=connect(nn.Linear(3, 4), "weight", p), head=nn.Linear(4, 3))


def folded(p):
    def forward(m, x):
        return m.head(torch.tanh(m.inner(x.flatten(0, 1))).unflatten(0, (len(x), -1)).mean(1))

    return Run(forward, inner=connect(nn.Linear(3, 4), "weight", p), head=nn.Linear(4, 3))


def bias(p):
    layer = nn.Linear(3, 4)
    connect(connect(layer, "bias", p), "weight", p / 2)
    return Run(
        lambda m, x: m.head(torch.tanh(m.inner(x)).mean(1)), inner=layer, head=nn.Linear(4, 3)
    )


def conv(layer, axes):
    return lambda p: Run(
        lambda m, x: m.head(torch.tanh(m.conv(x)).flatten(2).mean(2)),
        conv=connect(layer(), "weight", p),
        head=nn.Linear(axes, 3),
    )


def conv_bias(p):
    layer = connect(nn.Conv1d(2, 4, 2), "bias", p)
    return Run(lambda m, x: m.head(torch.tanh(m.conv(x)).mean(2)), conv=layer, head=nn.Linear(4, 3))


def twice(p):
    """One weight read at two places, the second time turned."""

    def forward(m, x):
        h = torch.tanh(m.inner(x))
        return m.head(torch.tanh(h @ m.inner.weight) + x)

    class Once(nn.Module):  # keeps one mask for the pass, as a running module does
        def __init__(self):
            super().__init__()
            self.inner = connect(nn.Linear(3, 4), "weight", p)
            self.head = nn.Linear(3, 3)

        def forward(self, x):
            weight = self.inner.weight
            return self.head(torch.tanh(torch.tanh(F.linear(x, weight)) @ weight) + x)

    return Once()


def attention(name, cross=False, owner=None):
    def make(p):
        layer = nn.MultiheadAttention(4, 2, batch_first=True)
        connect(getattr(layer, owner) if owner else layer, name, p)

        def forward(m, x):
            query = x[:, :2] if cross else x
            return m.head(m.attend(query, x, x, need_weights=False)[0].mean(1))

        return Run(forward, attend=layer, head=nn.Linear(4, 3))

    return make


def recurrent(layer, name, features, batch_first=True):
    def make(p):
        def forward(m, x):
            return m.head(m.layer(x)[0].mean(1 if batch_first else 0))

        return Run(forward, layer=connect(layer(), name, p), head=nn.Linear(features, 3))

    return make


def cell(layer):
    def make(p):
        def forward(m, x):
            state = None
            for now in x.unbind(1):
                state = m.cell(now, state)
            return m.head(state[0] if isinstance(state, tuple) else state)

        # Read at every step, so every step draws its own mask: sites "#2", "#3".
        return Run(forward, cell=connect(layer(), "weight_hh", p), head=nn.Linear(4, 3))

    return make


def embedding(p):
    table = connect(nn.Embedding(5, 3), "weight", p)
    return Run(
        lambda m, x: m.head(torch.tanh(m.table(x)).mean(1)), table=table, head=nn.Linear(3, 3)
    )


def per_example(p):
    layer = connect(nn.Linear(3, 4), "weight", p, per_example=True)
    return Run(
        lambda m, x: m.head(torch.tanh(m.inner(x)).mean(1)), inner=layer, head=nn.Linear(4, 3)
    )


def encoder(p):
    layer = nn.TransformerEncoderLayer(4, 2, 6, 0.0, batch_first=True)
    connect(layer.linear1, "weight", p)
    connect(layer.self_attn, "in_proj_weight", p / 2)
    return Run(lambda m, x: m.head(m.layer(x).mean(1)), layer=layer, head=nn.Linear(4, 3))


vectors, series, wide = (5, 3), (4, 6, 3), (3, 4, 4)
CASES = {
    "vectors": (linear, vectors),
    "tokens": (tokens, series),
    "tokens, sequence first": (tokens_first, series),
    "tokens folded into the batch": (folded, series),
    "bias and weight": (bias, series),
    "conv1d": (conv(lambda: nn.Conv1d(2, 4, 3, 2, 1), 4), (3, 2, 7)),
    "conv1d, same": (conv(lambda: nn.Conv1d(2, 4, 4, padding="same", dilation=2), 4), (3, 2, 9)),
    "conv2d": (conv(lambda: nn.Conv2d(2, 4, (2, 3), (1, 2), (1, 0)), 4), (3, 2, 5, 6)),
    "conv2d, groups": (conv(lambda: nn.Conv2d(4, 6, 2, groups=2, dilation=2), 6), (2, 4, 5, 5)),
    "conv2d, depthwise": (
        conv(lambda: nn.Conv2d(3, 3, 3, groups=3, padding="valid"), 3),
        (2, 3, 5, 5),
    ),
    "conv2d, circular": (
        conv(lambda: nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular"), 2),
        (2, 1, 4, 4),
    ),
    "conv3d": (conv(lambda: nn.Conv3d(2, 3, 2), 3), (2, 2, 3, 4, 3)),
    "conv_transpose1d": (
        conv(lambda: nn.ConvTranspose1d(2, 4, 3, 2, 1, 1), 4),
        (3, 2, 5),
    ),
    "conv_transpose1d, padded beyond its stride": (
        conv(lambda: nn.ConvTranspose1d(2, 4, 2, 2, 3, 3, dilation=4), 4),
        (3, 2, 6),
    ),
    "conv_transpose2d": (
        conv(lambda: nn.ConvTranspose2d(4, 6, (2, 3), (3, 2), (1, 2), (2, 0), groups=2), 6),
        (2, 4, 3, 4),
    ),
    "conv_transpose2d, depthwise": (
        conv(lambda: nn.ConvTranspose2d(3, 3, 3, groups=3, dilation=2), 3),
        (2, 3, 3, 3),
    ),
    "conv_transpose3d": (
        conv(lambda: nn.ConvTranspose3d(2, 3, 2, (1, 2, 1), (0, 1, 0), (0, 1, 0)), 3),
        (2, 2, 2, 3, 2),
    ),
    "bias of a convolution": (conv_bias, (3, 2, 5)),
    "one weight at two places": (twice, vectors),
    "self-attention": (attention("in_proj_weight"), wide),
    "cross-attention": (attention("in_proj_weight", cross=True), wide),
    "attention's way out": (attention("weight", owner="out_proj"), wide),
    "LSTM": (recurrent(lambda: nn.LSTM(3, 4, batch_first=True), "weight_hh_l0", 4), series),
    "LSTM, projected": (
        recurrent(lambda: nn.LSTM(3, 4, batch_first=True, proj_size=2), "weight_hr_l0", 2),
        series,
    ),
    "GRU both ways": (
        recurrent(lambda: nn.GRU(3, 2, 2, bidirectional=True), "weight_ih_l1_reverse", 4, False),
        (6, 4, 3),
    ),
    "RNN without bias": (
        recurrent(lambda: nn.RNN(3, 4, bias=False, batch_first=True), "weight_ih_l0", 4),
        series,
    ),
    "embedding": (embedding, (4, 6)),
    "a mask for each example": (per_example, series),
    "transformer layer": (encoder, wide),
}


def data_of(shape, make):
    if make is embedding:
        return torch.randint(5, shape, generator=torch.Generator().manual_seed(0))
    return randn(*shape, seed=4)


def dense_second_order(net, inputs, axis=0):
    """½ λ Σ_c ‖j_c‖² of the mean loss, j from a dense Jacobian of each example alone."""
    found = {}
    n = inputs.shape[axis]
    for i in range(n):
        opened = open_gates(net, inputs.narrow(axis, i, 1))
        (f,) = opened.outputs
        h = softmax_hessian(f.detach())
        for gate in opened.gates:
            rows = [torch.autograd.grad(value, gate.tensor, retain_graph=True)[0] for value in f]
            jacobian = torch.stack(rows).flatten(1)
            half = 0.5 * gate.law.p / (1 - gate.law.p) * torch.trace(jacobian.mT @ h @ jacobian)
            found[gate.name] = found.get(gate.name, 0.0) + float(half) / n
    return found


@pytest.mark.parametrize("name", CASES)
def test_second_order_against_a_dense_jacobian_in_every_entry(name):
    torch.manual_seed(0)
    make, shape = CASES[name]
    net, inputs = make(0.3).double().eval(), data_of(shape, make)
    with torch.no_grad():
        found = dl.penalty(net, inputs, cross_entropy, "second_order")
    assert found.unmeasured == {}
    expected = dense_second_order(net, inputs, axis=1 if name == "GRU both ways" else 0)
    assert {k: float(v) for k, v in found.by_site.items()} == pytest.approx(expected, rel=1e-10)
    assert all(value > 0 for name, value in expected.items() if "dropout" not in name)


NAMES = {
    "vectors": "0.parametrizations.weight.original",
    "tokens": "inner.bias",
    "conv2d, groups": "conv.parametrizations.weight.original",
    "one weight at two places": "inner.parametrizations.weight.original",
}


@pytest.mark.parametrize("name", NAMES)
def test_output_noise_and_its_gradient(name):
    """Squared loss: gaussian = second order; each differentiates as finite differences do."""
    torch.manual_seed(0)
    make, shape = CASES[name]
    net, inputs = make(0.3).double(), data_of(shape, make)
    values = [float(dl.penalty(net, inputs, nn.MSELoss(), m)) for m in METHODS]
    assert values[0] == pytest.approx(values[1], rel=1e-12)
    weight = dict(net.named_parameters())[NAMES[name]]
    for method in METHODS:
        value = dl.penalty(net, inputs, cross_entropy, method).total
        (gradient,) = torch.autograd.grad(value, weight)
        direction = randn(*weight.shape, seed=9)
        moved = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                weight += step * direction
                moved.append(float(dl.penalty(net, inputs, cross_entropy, method)))
                weight -= step * direction
        slope = (moved[0] - moved[1]) / 2e-5
        assert float((gradient * direction).sum()) == pytest.approx(slope, rel=1e-6)


def test_chunks_change_nothing(monkeypatch):
    torch.manual_seed(0)
    net, inputs = tokens(0.3).double(), data_of(series, tokens)
    whole = dl.penalty(net, inputs, cross_entropy)
    weight = next(net.parameters())
    (gradient,) = torch.autograd.grad(whole.total, weight)
    monkeypatch.setattr("droplens.penalties._sources._CHUNK_NUMBERS", 1)
    parts = dl.penalty(net, inputs, cross_entropy)
    torch.testing.assert_close(parts.total, whole.total)
    torch.testing.assert_close(torch.autograd.grad(parts.total, weight)[0], gradient)
    assert parts.participation == pytest.approx(whole.participation)


def enumerated(outputs_of, n_coins, p, inputs, labels):
    """gap, spread and shift of the mean cross-entropy by summing over every mask."""
    masks = list(all_coins(n_coins, p))
    probabilities = torch.tensor([w for w, _ in masks], dtype=torch.float64)
    outputs = torch.stack([outputs_of(z / (1 - p)) for _, z in masks])
    undropped = outputs_of(torch.ones(n_coins, dtype=torch.float64))
    parts = [
        exact_parts(
            probabilities, outputs[:, i], undropped[i],
            lambda f, y=y: torch.logsumexp(f, -1) - f[y], lambda f: torch.logsumexp(f, -1),
        )
        for i, y in enumerate(labels.tolist())
    ]  # fmt: skip
    return torch.tensor(parts, dtype=torch.float64).mean(0).tolist()


def test_squared_loss_is_exact_at_the_last_layer():
    """All 2⁶ masks of a weight that every token reads: the factorised form would be 40% off."""
    torch.manual_seed(0)
    layer = nn.Linear(3, 2).double()
    inputs, y = randn(4, 6, 3, seed=2), randn(4, 2, seed=3)
    net = Run(lambda m, x: m.inner(x).mean(1), inner=connect(layer, "weight", 0.4))
    weight, offset = layer.parametrizations.weight.original.detach(), layer.bias.detach()

    def cost(z):
        out = F.linear(inputs, weight * z.reshape(2, 3), offset).mean(1)
        return float(((out - y) ** 2).mean())

    truth = sum(w * cost(z / 0.6) for w, z in all_coins(6, 0.4)) - cost(torch.ones(6))
    for method in METHODS:
        assert float(dl.penalty(net, inputs, nn.MSELoss(), method)) == pytest.approx(
            truth, rel=1e-12
        )


@pytest.mark.parametrize("one_each", [False, True], ids=["a mask a batch", "a mask an example"])
def test_the_decomposition_is_that_of_all_masks(one_each):
    """Examples that share a mask have the spread of examples that do not."""
    torch.manual_seed(0)
    layer = nn.Linear(2, 3).double()
    inputs, labels = randn(5, 2, seed=2), torch.tensor([0, 2, 1, 1, 0])
    head = nn.Linear(3, 3).double()
    net = nn.Sequential(connect(layer, "weight", 0.4, per_example=one_each), nn.Tanh(), head)
    weight, offset = layer.parametrizations.weight.original.detach(), layer.bias.detach()

    def outputs(z):
        return head(torch.tanh(F.linear(inputs, weight * z.reshape(3, 2), offset))).detach()

    truth = enumerated(outputs, 6, 0.4, inputs, labels)
    found = dl.decompose(net, inputs, labels, cross_entropy, 4000, seed=0)
    for estimate, value in zip((found.gap, found.spread, found.shift), truth, strict=True):
        assert abs(estimate.value - value) <= 4.5 * estimate.standard_error
    assert list(found.by_site) == ["0.weight" if one_each else "0.parametrizations.weight.0"]


def test_beside_activations_and_over_rates():
    torch.manual_seed(0)
    net = nn.Sequential(
        connect(nn.Linear(3, 4), "weight", 0.2), nn.Tanh(), nn.Dropout(0.3), nn.Linear(4, 3)
    ).double()
    inputs = randn(5, 3)
    both = dl.penalty(net, inputs, cross_entropy, "second_order")
    assert list(both.by_site) == ["0.parametrizations.weight.0", "2"]
    assert float(both) == pytest.approx(sum(float(v.detach()) for v in both.by_site.values()))
    curve = dl.penalty_curve(net, inputs, cross_entropy, [0.1, 0.4])
    for k, p in enumerate((0.1, 0.4)):
        net[0].parametrizations.weight[0].p = net[2].p = p
        with torch.no_grad():
            assert float(curve.total[k]) == pytest.approx(
                float(dl.penalty(net, inputs, cross_entropy)), rel=1e-9
            )
    drawn = dl.penalty(net, inputs, cross_entropy, "sampled", draws=3000, seed=0)
    exact = dl.penalty(net, inputs, cross_entropy, "second_order")
    assert abs(float(drawn) - float(exact)) <= 4.5 * drawn.standard_error


def test_a_weight_that_is_read_in_an_unknown_way_is_named():
    torch.manual_seed(0)
    net = Run(
        lambda m, x: m.head(m.pair(x, x)),
        pair=connect(nn.Bilinear(3, 3, 4), "weight", 0.3),
        head=nn.Linear(4, 3),
    ).double()
    found = dl.penalty(net, randn(5, 3), cross_entropy)
    (reason,) = found.unmeasured.values()
    assert "masks a weight that 'bilinear' reads" in reason
    assert "droplens.decompose draws its masks all the same" in reason
    parts = dl.decompose(net, randn(5, 3), torch.tensor([0, 2, 1, 1, 0]), cross_entropy, 20, seed=0)
    assert parts.spread.value > 0


def test_a_weight_that_is_dropped_twice_is_named():
    torch.manual_seed(0)
    net = Run(
        lambda m, x: m.head(F.linear(x, F.dropout(m.inner.weight, 0.5, m.training))),
        inner=connect(nn.Linear(3, 4), "weight", 0.3),
        head=nn.Linear(4, 3),
    ).double()
    found = dl.penalty(net, randn(5, 3), cross_entropy)
    assert "masks a weight that 'F.dropout' reads" in " ".join(found.unmeasured.values())


def test_p_of_one_is_refused_by_name():
    net = linear(1.0).double()
    with pytest.raises(ValueError, match=r"site '0\.parametrizations\.weight\.0': p = 1 drops"):
        dl.penalty(net, randn(5, 3), cross_entropy)
