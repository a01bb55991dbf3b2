import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from droplens import measure
from tests.reference_measure import (
    dense_empirical_fisher,
    dense_fisher,
    dense_hessian,
    flat_parameters,
)

LAYER, AUTOGRAD = "layer by layer", "example by example"


class Sequence(nn.Module):
    """A linear layer that sees an example at several positions, and layer norm."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 4)
        self.norm = nn.LayerNorm(4)
        self.last = nn.Linear(4, 3)

    def forward(self, x):  # (n, 6) as two positions of three
        return self.last(torch.tanh(self.norm(self.inner(x.unflatten(1, (2, 3))))).mean(1))


class SequenceFirst(Sequence):
    def forward(self, x):
        rows = x.unflatten(1, (2, 3)).transpose(0, 1)
        return self.last(torch.tanh(self.norm(self.inner(rows))).mean(0))


class Folded(Sequence):
    def forward(self, x):
        hidden = torch.tanh(self.inner(x.reshape(-1, 3)))
        return self.last(hidden.unflatten(0, (-1, 2)).mean(1))


class Images(nn.Module):
    def __init__(self, dims=2, **options):
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        self.dims = dims
        self.conv = conv(1 if dims > 1 else 2, 4, 2, **options)
        self.norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1](4)
        self.last = nn.LazyLinear(3)

    def forward(self, x):  # (n, 6)
        shape = {1: (-1, 2, 3), 2: (-1, 1, 2, 3), 3: (-1, 1, 1, 2, 3)}[self.dims]
        x = x.reshape(shape)
        if self.dims == 3:
            x = torch.cat([x, x**2], 2)
        # In place: the layer's output tensor is overwritten.
        hidden = nn.functional.relu(self.norm(self.conv(x)), inplace=True)
        return self.last(hidden.flatten(1))


class Shared(nn.Module):
    """One layer used twice, and a weight used outside of any layer."""

    def __init__(self, bypass=False):
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.last = nn.Linear(6, 3)
        self.scale = nn.Parameter(torch.tensor(1.3))
        self.bypass = bypass

    def forward(self, x):
        hidden = torch.tanh(self.layer(torch.tanh(self.layer(x))))
        if self.bypass:
            hidden = hidden + nn.functional.linear(x, self.layer.weight)
        return self.last(self.scale * hidden)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.GRU(3, 4, batch_first=True)
        self.last = nn.Linear(4, 3)

    def forward(self, x):
        return self.last(self.cell(x.unflatten(1, (2, 3)))[0][:, -1])


def mlp(activation=nn.ReLU):
    return nn.Sequential(
        nn.Linear(6, 5), activation(), nn.Dropout(0.5), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)
    )


NETWORKS = {
    "relu mlp": (mlp, {}),
    "in-place relu": (lambda: mlp(lambda: nn.ReLU(inplace=True)), {}),
    "positions": (Sequence, {}),
    "positions first": (SequenceFirst, {}),
    "folded positions": (Folded, {"norm.weight": AUTOGRAD, "norm.bias": AUTOGRAD}),
    "conv1d": (lambda: Images(1, padding=1, dilation=2, groups=2, bias=False), {}),
    "conv2d": (lambda: Images(2, padding=1, padding_mode="circular", stride=2), {}),
    "conv3d": (lambda: Images(3, padding=(0, 1, 0)), {}),
    "used twice": (Shared, {"scale": AUTOGRAD}),
    "used outside": (lambda: Shared(True), {"scale": AUTOGRAD, "layer.weight": AUTOGRAD}),
    "recurrent": (
        Recurrent,
        {f"cell.{name}_l0": AUTOGRAD for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")},
    ),
    "embedding": (
        lambda: nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(18, 3)),
        {},
    ),
}


def make(name):
    torch.manual_seed(0)
    model = NETWORKS[name][0]().double()
    model.eval()
    with torch.no_grad():
        model(inputs_for(name))  # lets lazy layers take shape
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    return model


def inputs_for(name, n=7):
    generator = torch.Generator().manual_seed(1)
    if name == "embedding":
        return torch.randint(5, (n, 6), generator=generator)
    return torch.randn(n, 6, generator=generator, dtype=torch.float64)


def labels(n=7):
    return torch.randint(3, (n,), generator=torch.Generator().manual_seed(2))


def flat(diagonal, model):
    names, _ = flat_parameters(model)
    return torch.cat([diagonal[name].flatten() for name in names])


@pytest.mark.parametrize("name", NETWORKS)
def test_exact_equals_the_dense_matrix(name):
    model, x, y = make(name), inputs_for(name), labels()
    loss = nn.CrossEntropyLoss()
    result = measure.fisher(model, x, loss)
    expected = dense_fisher(model, x, y, loss)
    torch.testing.assert_close(
        flat(result.diagonal, model), expected.diagonal(), rtol=1e-8, atol=1e-12
    )
    assert float(result.trace) == pytest.approx(float(expected.trace()), rel=1e-9)
    assert result.trace.standard_error == 0
    how = dict.fromkeys(result.diagonal, LAYER) | NETWORKS[name][1]
    assert result.how == how
    assert result.seed is None


LOSSES = {
    "squared": (nn.MSELoss(), torch.randn(7, 3, dtype=torch.float64)),
    "squared, summed": (nn.MSELoss(reduction="sum"), torch.randn(7, 3, dtype=torch.float64)),
    "summed": (nn.CrossEntropyLoss(reduction="sum"), labels()),
    "weighted": (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 5.0]).double()), labels()),
    "ignoring": (nn.CrossEntropyLoss(ignore_index=1), labels()),
    "logistic": (nn.BCEWithLogitsLoss(), torch.rand(7, 3, dtype=torch.float64)),
    "poisson": (nn.PoissonNLLLoss(), torch.rand(7, 3, dtype=torch.float64)),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("form", ["pair", "uneven batches", "targets="])
def test_every_loss_in_its_own_units(name, form):
    loss, y = LOSSES[name]
    model, x = make("relu mlp"), inputs_for("relu mlp")
    expected = dense_fisher(model, x, y, loss)
    if form == "targets=":
        result = measure.fisher(model, x, loss, targets=y)
    else:
        result = measure.fisher(
            model, (x, y) if form == "pair" else [(x[:5], y[:5]), (x[5:], y[5:])], loss
        )
    torch.testing.assert_close(flat(result.diagonal, model), expected.diagonal())


@pytest.mark.parametrize("name", ["relu mlp", "positions", "recurrent"])
def test_sampled_is_unbiased(name):
    model, x = make(name), inputs_for(name)
    loss = nn.CrossEntropyLoss()
    exact = measure.fisher(model, x, loss)
    draws = 60 if name == "recurrent" else 300
    result = measure.fisher(model, x, loss, "sampled", draws=draws, seed=0)
    assert result.trace.n == draws
    assert result.trace.over == "labels"
    assert result.seed == 0
    z = (float(result.trace) - float(exact.trace)) / result.trace.standard_error
    assert abs(z) < 4
    error = flat(result.standard_error, model)
    difference = (flat(result.diagonal, model) - flat(exact.diagonal, model))[error > 0]
    scores = difference / error[error > 0]
    assert scores.abs().max() < 6
    assert scores.square().mean() < 2


def test_sampled_over_batches_has_the_error_of_the_whole():
    model, x, y = make("relu mlp"), inputs_for("relu mlp"), labels()
    loss = nn.CrossEntropyLoss()
    runs = [
        measure.fisher(model, data, loss, "sampled", draws=400, seed=0)
        for data in (x, [(x[:3], y[:3]), (x[3:], y[3:])])
    ]
    # A standard error from 400 draws is itself known to 1/√800 = 3.5% if they were normal.
    one, other = (run.trace.standard_error for run in runs)
    assert one == pytest.approx(other, rel=0.2)
    one, other = (flat(run.standard_error, model).sum() for run in runs)
    assert float(one) == pytest.approx(float(other), rel=0.1)


def test_squared_loss_samples_to_its_own_units():
    model, x = make("relu mlp"), inputs_for("relu mlp")
    exact = measure.fisher(model, x, nn.MSELoss())
    result = measure.fisher(model, x, nn.MSELoss(), "sampled", draws=300, seed=1)
    z = (float(result.trace) - float(exact.trace)) / result.trace.standard_error
    assert abs(z) < 4


@pytest.mark.parametrize("name", ["relu mlp", "positions", "recurrent", "conv2d"])
def test_empirical_takes_the_labels_given(name):
    model, x, y = make(name), inputs_for(name), labels()
    loss = nn.CrossEntropyLoss()
    result = measure.fisher(model, (x, y), loss, "empirical")
    expected = dense_empirical_fisher(model, x, y, loss).diagonal()
    torch.testing.assert_close(flat(result.diagonal, model), expected)
    assert result.method == "empirical"


def test_trace_equals_the_hessians_for_rectified_networks():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    x, y = inputs_for("relu mlp"), labels()
    H = dense_hessian(model, x, y, nn.CrossEntropyLoss())
    trace = float(measure.fisher(model, x, nn.CrossEntropyLoss()).trace)
    assert trace == pytest.approx(float(H.trace()), rel=1e-8)


def test_tokens_and_pixels_are_terms_of_their_own():
    torch.manual_seed(0)
    model = nn.Conv1d(2, 3, 2).double()
    x = torch.randn(4, 2, 5, dtype=torch.float64)
    y = torch.randint(3, (4, 4))
    loss = nn.CrossEntropyLoss(ignore_index=2)
    expected = dense_fisher(model, x, y, loss).diagonal()
    result = measure.fisher(model, (x, y), loss)
    torch.testing.assert_close(flat(result.diagonal, model), expected)
    drawn = measure.fisher(model, (x, y), loss, "sampled", draws=200, seed=0)
    z = (float(drawn.trace) - float(result.trace)) / drawn.trace.standard_error
    assert abs(z) < 4


def test_frozen_and_unused_parameters():
    model = make("relu mlp")
    model[0].weight.requires_grad_(False)
    model.spare = nn.Parameter(torch.ones(2, dtype=torch.float64))
    model.forward = lambda x: nn.Sequential.forward(model, x) if False else run(model, x)
    result = measure.fisher(model, inputs_for("relu mlp"), nn.CrossEntropyLoss())
    assert "0.weight" not in result.diagonal
    assert not result.diagonal["spare"].any()


def run(model, x):
    for layer in list(model)[:6]:
        x = layer(x)
    return x


def test_everything_is_left_as_it_was_and_dropout_is_off():
    model = make("relu mlp").train()
    x = inputs_for("relu mlp")
    stream = torch.get_rng_state()
    runs = [measure.fisher(model, x, nn.CrossEntropyLoss()) for _ in range(2)]
    assert float(runs[0].trace) == float(runs[1].trace)
    assert model.training
    assert torch.equal(stream, torch.get_rng_state())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    with torch.no_grad():
        assert float(measure.fisher(model, x, nn.CrossEntropyLoss()).trace) == float(runs[0].trace)


def test_a_loader_is_streamed():
    model, x, y = make("relu mlp"), inputs_for("relu mlp"), labels()
    loader = DataLoader(TensorDataset(x, y), batch_size=3, shuffle=True)
    loss = nn.CrossEntropyLoss()
    whole, parts = measure.fisher(model, x, loss), measure.fisher(model, loader, loss)
    torch.testing.assert_close(flat(whole.diagonal, model), flat(parts.diagonal, model))


class Detached(nn.Linear):
    def forward(self, x):
        return super().forward(x).detach()


X, Y = inputs_for("relu mlp"), labels()


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((X, nn.L1Loss()), {}, TypeError, "L1Loss is not one whose A"),
        ((X, nn.CrossEntropyLoss(), "exakt"), {}, ValueError, "method has to be one of"),
        ((X, nn.CrossEntropyLoss(), "empirical"), {}, ValueError, "needs the data's labels"),
        ((X, nn.CrossEntropyLoss(ignore_index=1)), {}, ValueError, "pass targets="),
        ((X, nn.CrossEntropyLoss(), "sampled"), {"draws": 0}, ValueError, "draws has to be at"),
        ((X * math.nan, nn.CrossEntropyLoss()), {}, ValueError, "inputs holds NaN or Inf"),
        (((X, Y + 1), nn.CrossEntropyLoss()), {}, ValueError, "holds the label 3"),
    ],
)
def test_bad_input_is_refused(arguments, options, error, message):
    with pytest.raises(error, match=message):
        measure.fisher(make("relu mlp"), *arguments, **options)


def test_bad_models_are_refused():
    loss = nn.CrossEntropyLoss()
    with pytest.raises(ValueError, match="predictions do not depend on its trainable"):
        measure.fisher(Detached(6, 3).double(), X, loss)
    with pytest.raises(ValueError, match="no parameters that require gradients"):
        measure.fisher(make("relu mlp").requires_grad_(False), X, loss)
    model = make("relu mlp")
    with torch.no_grad():
        model[0].bias[0] = math.nan
    with pytest.raises(ValueError, match=r"weight '0\.bias' holds NaN"):
        measure.fisher(model, X, loss)


class Centred(nn.Module):
    """Every example's features less half of the batch's mean."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        h = self.layer(x)
        return h - 0.5 * h.mean(0)


@pytest.mark.parametrize("method", ["exact", "sampled", "empirical"])
def test_examples_that_mix_are_refused(method):
    x, y = torch.randn(6, 4), torch.randint(3, (6,))
    with pytest.raises(ValueError, match="change with the examples beside them"):
        measure.fisher(Centred(), x, nn.CrossEntropyLoss(), method, targets=y)
    # One alone mixes with none, and products do not ask whose.
    measure.fisher(Centred(), x[:1], nn.CrossEntropyLoss(), method, targets=y[:1])
    net = Centred()
    found = measure.fisher_spectrum(net, x, nn.CrossEntropyLoss(), top=0)
    truth = dense_fisher(net, x, y, nn.CrossEntropyLoss()).trace()
    assert float(found.trace) == pytest.approx(float(truth), rel=1e-5)


def test_complex_weights_are_refused():
    net = nn.Linear(3, 2)
    net.phase = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    with pytest.raises(TypeError, match="'phase' holds complex numbers"):
        measure.fisher(net, torch.randn(4, 3), nn.MSELoss())
