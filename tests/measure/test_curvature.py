"""Curvature of a network's predictions, against whole Jacobians and enumerated masks."""

import itertools
import math
from inspect import signature

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

import droplens as dl
from droplens import measure
from droplens.estimates import mean_estimate
from droplens.measure import _curvature, _predictor
from tests.reference_measure import dense_curvature, flat_parameters, mean_metric, unflatten

CE = nn.CrossEntropyLoss()
F64 = torch.float64


def network(activation=nn.Tanh, dtype=F64):
    torch.manual_seed(0)
    layers = (nn.Linear(2, 3), activation(), nn.Dropout(0.5), nn.Linear(3, 3))
    return nn.Sequential(*layers).to(dtype).eval()


def points(n=14, dtype=F64):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 2, generator=generator, dtype=F64).to(dtype)


def step(model, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(p.shape, generator=generator, dtype=F64)
        for name, p in model.named_parameters()
    }


def dense(model, x, v, connection, loss, average=None):
    """κ and the parameter effects along v, from dense derivatives."""
    names, theta = flat_parameters(model)

    def f(t):
        state = unflatten(model, names, t)
        if average is None:
            return functional_call(model, state, (x,))
        return average(state)

    def z(t):
        mean = f(t)
        if average is None and connection == "m" and loss == "ce":
            mean = mean.softmax(-1)
        return mean.flatten()

    at = f(theta)
    if average is not None and connection == "m":
        at = at.log()
    metric = mean_metric(at, connection, loss)
    flat = torch.cat([v[name].flatten() for name in names])
    return dense_curvature(z, metric, theta, flat)


@pytest.fixture(params=["formed", "in products"])
def jacobian(request, monkeypatch):
    """How J enters the solves: as a matrix where few numbers move, else by its products alone."""
    if request.param == "in products":
        monkeypatch.setattr(_curvature, "_FORMED", 0)


@pytest.mark.usefixtures("jacobian")
@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
@pytest.mark.parametrize("connection", ["e", "m"])
@pytest.mark.parametrize("name", ["ce", "mse"])
def test_equals_the_dense_split(activation, connection, name):
    model, x = network(activation), points()
    loss = CE if name == "ce" else nn.MSELoss()
    v = step(model)
    found = measure.curvature(model, x, loss, connection, [v])
    kappa, effects = dense(model, x, v, connection, name)
    assert found.intrinsic.value == pytest.approx(kappa, rel=1e-8)
    assert found.parameter_effects.value == pytest.approx(effects, rel=1e-8)
    assert found.residual < 1e-8
    assert found.outputs == 14 * (2 if name == "ce" else 3)
    assert (found.masks, found.draws, found.mask_bias) == ("off", None, None)


@pytest.mark.parametrize(
    ("loss", "mean", "variance"),
    [
        (nn.BCEWithLogitsLoss(), torch.sigmoid, lambda m: m * (1 - m)),
        (nn.PoissonNLLLoss(), torch.exp, lambda m: m),
    ],
)
@pytest.mark.parametrize("connection", ["e", "m"])
def test_elementwise_families(loss, mean, variance, connection):
    model, x = network(), points()
    names, theta = flat_parameters(model)
    v = step(model)

    def f(t):
        return functional_call(model, unflatten(model, names, t), (x,)).flatten()

    H = variance(mean(f(theta))) / (14 * 3)
    metric = torch.diag(H if connection == "e" else 1 / (H * (14 * 3) ** 2))
    kappa, _ = dense_curvature(
        f if connection == "e" else lambda t: mean(f(t)),
        metric,
        theta,
        torch.cat([v[name].flatten() for name in names]),
    )
    found = measure.curvature(model, x, loss, connection, [v])
    assert found.intrinsic.value == pytest.approx(kappa, rel=1e-8)


@pytest.mark.parametrize("connection", ["e", "m"])
def test_a_loss_of_ones_own_agrees_with_torchs(connection):
    from droplens import losses

    own = losses.from_log_partition(lambda f: torch.logsumexp(f, -1), layout="classes")
    model, x = network(), points()
    v = step(model)
    theirs = measure.curvature(model, x, CE, connection, [v])
    found = measure.curvature(model, x, own, connection, [v])
    assert found.intrinsic.value == pytest.approx(theirs.intrinsic.value, rel=1e-7)


def test_a_logistic_regression_is_flat_in_logits_alone():
    torch.manual_seed(0)
    model = nn.Linear(2, 3).double()
    e = measure.curvature(model, points(), CE, "e", 3, seed=0)
    m = measure.curvature(model, points(), CE, "m", 3, seed=0)
    assert e.intrinsic.value == e.parameter_effects.value == 0
    assert m.intrinsic.value > 0.01


def test_copied_inputs_change_nothing_and_scale_free_values_forget_the_outputs_scale():
    model, x = network(), points()
    v = step(model)
    once = measure.curvature(model, x, CE, "e", [v])
    twice = measure.curvature(model, torch.cat([x, x]), CE, "e", [v])
    assert twice.intrinsic.value == pytest.approx(once.intrinsic.value, rel=1e-8)
    assert twice.length == pytest.approx(once.length)
    assert once.scale_free.value == pytest.approx(once.intrinsic.value * once.length)
    mse = measure.curvature(model, x, nn.MSELoss(), "e", [v])
    model[3].weight.data *= 3
    model[3].bias.data *= 3
    v = {name: part * (3 if name.startswith("3") else 1) for name, part in v.items()}
    scaled = measure.curvature(model, x, nn.MSELoss(), "e", [v])
    assert scaled.intrinsic.value == pytest.approx(mse.intrinsic.value / 3, rel=1e-8)
    assert scaled.scale_free.value == pytest.approx(mse.scale_free.value, rel=1e-8)


@pytest.mark.usefixtures("jacobian")
@pytest.mark.parametrize("draws", [None, 4])
def test_pieces_and_loaders_change_nothing(draws, monkeypatch):
    model, x = network(), points()
    v = [step(model)]
    whole = measure.curvature(model, x, CE, "m", v, draws, seed=5)
    again = measure.curvature(model, x, CE, "m", v, draws, seed=5)
    assert again.intrinsic.value == whole.intrinsic.value
    if draws is None:
        loader = DataLoader(TensorDataset(x, torch.zeros(14).long()), batch_size=4, shuffle=True)
        assert measure.curvature(model, loader, CE, "m", v).intrinsic.value == pytest.approx(
            whole.intrinsic.value, rel=1e-8
        )
        monkeypatch.setattr(_predictor, "EXAMPLES", 5)
        monkeypatch.setattr(_curvature, "EXAMPLES", 5)
        parts = measure.curvature(model, x, CE, "m", v)
        assert parts.intrinsic.value == pytest.approx(whole.intrinsic.value, rel=1e-8)


def enumerated(model, x, connection):
    """The mean over all masks of three units, of logits or probabilities, given parameters."""

    def average(state):
        h = torch.tanh(x @ state["0.weight"].mT + state["0.bias"])
        total = 0
        for coins in itertools.product((0.0, 2.0), repeat=3):
            f = (h * torch.tensor(coins, dtype=F64)) @ state["3.weight"].mT + state["3.bias"]
            total = total + (f if connection == "e" else f.softmax(-1)) / 8
        return total

    return average


@pytest.mark.usefixtures("jacobian")
@pytest.mark.parametrize("connection", ["e", "m"])
@pytest.mark.parametrize(("draws", "masks_named"), [(1, "fixed"), (4, "averaged")])
def test_the_average_over_given_masks_equals_the_dense_one(connection, draws, masks_named):
    """The masks that the seed draws, put into the formula by hand."""
    model, x = network(), points()
    v = step(model)
    found = measure.curvature(model, x, CE, connection, [v], draws, seed=3)
    masks = torch.Generator().manual_seed(_predictor._mixed(3, 0, draws, 0))
    shape = (draws * 14, 3)
    z = dl.masks.Bernoulli(0.5).sample(shape, masks, dtype=F64).view(draws, 14, 3)

    def average(state):
        h = torch.tanh(x @ state["0.weight"].mT + state["0.bias"])
        f = (h * z) @ state["3.weight"].mT + state["3.bias"]
        return (f if connection == "e" else f.softmax(-1)).mean(0)

    kappa, effects = dense(model, x, v, connection, "ce", average)
    assert found.intrinsic.value == pytest.approx(kappa, rel=1e-8)
    assert found.parameter_effects.value == pytest.approx(effects, rel=1e-8)
    assert found.masks == masks_named
    assert (found.mask_bias is None) == (draws == 1)


@pytest.mark.slow
@pytest.mark.parametrize("connection", ["e", "m"])
def test_more_masks_near_the_average_over_all_of_them(connection):
    model, x = network(), points(60)
    v = step(model)
    kappa, _ = dense(model, x, v, connection, "ce", enumerated(model, x, connection))

    def errors(draws):
        runs = [measure.curvature(model, x, CE, connection, [v], draws, seed=s) for s in range(2)]
        raw = sum(r.intrinsic.value for r in runs) / 2
        return raw - kappa, raw - sum(r.mask_bias.value for r in runs) / 2 - kappa

    few, many = errors(4), errors(32)
    # Noise bends: too high, less so with more masks, and less so without what halving adds.
    assert few[0] > many[0] > 0
    assert abs(many[1]) < many[0]


def test_dropconnect_draws_a_mask_a_pass():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    dl.nn.drop_connect(model[2], "weight", 0.5)
    runs = [
        measure.curvature(model, points(40), CE, "e", 2, draws, parameters=5, seed=1).intrinsic
        for draws in (2, 6)
    ]
    # As many masks as asked for, and not one for all of them.
    assert runs[0].value != runs[1].value
    assert all(math.isfinite(run.value) for run in runs)


def test_a_drawn_slice_moves_that_many_numbers_and_says_which():
    model, x = network(), points(40)
    found = measure.curvature(model, x, CE, "e", 2, parameters=7, seed=1)
    assert sum(found.parameters.values()) == 7
    assert (
        found.parameters == measure.curvature(model, x, CE, "m", 1, parameters=7, seed=1).parameters
    )
    named = measure.curvature(model, x, CE, "e", 2, parameters=["0.weight"], seed=1)
    assert named.parameters == {"0.weight": 6}
    names, theta = flat_parameters(model)
    v = {**step(model), "0.bias": torch.zeros(3), "3.weight": torch.zeros(3, 3)}
    v["3.bias"] = torch.zeros(3)
    own = measure.curvature(model, x, CE, "e", [v], parameters=["0.weight"])

    def z(w):
        held = {name: p.detach() for name, p in model.named_parameters()}
        return functional_call(model, {**held, "0.weight": w.view(3, 2)}, (x,)).flatten()

    metric = mean_metric(model(x).detach(), "e", "ce")
    flat = v["0.weight"].flatten()
    kappa, _ = dense_curvature(z, metric, model[0].weight.detach().flatten(), flat)
    assert own.intrinsic.value == pytest.approx(kappa, rel=1e-8)
    assert len(names) == 4
    assert len(theta) == 21


def test_single_precision_models_are_measured_in_double():
    v = step(network())
    coarse = measure.curvature(
        network(dtype=torch.float32), points(dtype=torch.float32), CE, "e", [v]
    )
    fine = measure.curvature(network(), points(), CE, "e", [v])
    assert coarse.intrinsic.value == pytest.approx(fine.intrinsic.value, rel=1e-5)
    assert coarse.residual < 1e-8


class Stubborn(nn.Module):
    """A model that makes its own single-precision numbers, and so refuses double."""

    def __init__(self):
        super().__init__()
        self.inner = network(dtype=torch.float32)

    def forward(self, x):
        return self.inner(x @ torch.eye(2))


@pytest.mark.usefixtures("jacobian")
def test_a_model_that_refuses_double_is_measured_in_its_own_precision():
    v = step(network())
    inner = {f"inner.{name}": part for name, part in v.items()}
    x = points(dtype=torch.float32)
    found = measure.curvature(Stubborn(), x, CE, "e", [inner])
    plain = measure.curvature(network(dtype=torch.float32), x, CE, "e", [v])
    assert found.intrinsic.value == pytest.approx(plain.intrinsic.value, rel=1e-3)


class Attentive(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(1, 2)
        self.attention = nn.MultiheadAttention(2, 1, dropout=0.3, batch_first=True)
        self.last = nn.Linear(2, 3)

    def forward(self, x):
        h = self.inner(x.unsqueeze(-1))
        return self.last(self.attention(h, h, h, need_weights=False)[0].mean(1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.last = nn.GRU(1, 2, 2, dropout=0.4, batch_first=True), nn.Linear(2, 3)

    def forward(self, x):
        return self.last(self.inner(x.unsqueeze(-1))[0][:, -1])


@pytest.mark.parametrize("build", [Attentive, Recurrent])
@pytest.mark.parametrize("draws", [None, 2])
def test_other_layers_are_measured_too_and_left_as_found(build, draws):
    torch.manual_seed(0)
    model, x = build(), points(60, torch.float32)
    model.train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    state = torch.get_rng_state()
    found = measure.curvature(model, x, CE, "e", 2, draws, parameters=10, seed=0)
    assert math.isfinite(found.intrinsic.value)
    assert found.intrinsic.standard_error > 0
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert all(p.grad is None and p.dtype == torch.float32 for p in model.parameters())


def broken():
    model = network()
    model[0].weight.data[0, 0] = math.nan
    return model


def frozen():
    return network().requires_grad_(False)


class Rounded(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = network()

    def forward(self, x):
        return self.inner(x).round()


class Shifting:
    """A loader whose passes differ."""

    def __init__(self):
        self.n = 0

    def __iter__(self):
        self.n += 1
        yield points() + self.n


@pytest.mark.parametrize(
    ("build", "options", "error", "message"),
    [
        (network, {"connection": "a"}, ValueError, "connection has to be 'e' or 'm', but got 'a'"),
        (network, {"draws": 0}, ValueError, "draws has to be a whole number of at least 1"),
        (network, {"directions": 0}, ValueError, "directions has to be at least 1, but got 0"),
        (network, {"directions": []}, ValueError, "directions is empty"),
        (network, {"directions": 1.5}, TypeError, "directions has to be a number or a sequence"),
        (network, {"directions": [{"0.bias": torch.zeros(3)}]}, ValueError, r"\[0\] is zero"),
        (network, {"directions": [{"x": torch.ones(3)}]}, ValueError, "names 'x', which is no"),
        (
            network,
            {"directions": [{"0.bias": torch.ones(3)}], "parameters": ["3.bias"]},
            ValueError,
            r"directions\[0\] moves parameters outside the slice 3.bias",
        ),
        (network, {"parameters": ["x"]}, ValueError, "parameters names 'x', which is no trainable"),
        (network, {"parameters": []}, ValueError, "parameters is empty"),
        (network, {"parameters": "0.bias"}, TypeError, "parameters has to be names"),
        (network, {"parameters": 0}, ValueError, "between 1 and the model's 21 trainable numbers"),
        (network, {"inputs": points(10)}, ValueError, "21 parameters move but .* only 20 free"),
        (network, {"inputs": points() * math.nan}, ValueError, "inputs holds NaN or Inf"),
        (network, {"inputs": Shifting()}, ValueError, "data changes between passes"),
        (network, {"loss": nn.HuberLoss()}, TypeError, "loss HuberLoss is not one whose"),
        (broken, {}, ValueError, "the model's weight '0.weight' holds NaN"),
        (frozen, {}, ValueError, "no parameters that require gradients"),
        (lambda: 3, {}, TypeError, "model has to be a torch module, but got int"),
        (Rounded, {}, ValueError, "does not move the point: J v = 0.*round"),
    ],
)
def test_bad_input_is_refused(build, options, error, message):
    arguments = {"inputs": points(), "loss": CE, "directions": 2, **options}
    with pytest.raises(error, match=message):
        measure.curvature(build(), **arguments)


def test_the_mean_over_masks_of_a_family_of_ones_own_is_refused_for_m():
    from droplens import losses

    own = losses.from_log_partition(lambda f: f.exp().sum(-1))
    with pytest.raises(ValueError, match="leave draws out, or use connection='e'"):
        measure.curvature(network(), points(), own, "m", 1, draws=2)


class Backwards(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x.square()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx, g):
        return 2 * g * ctx.saved_tensors[0]


class OnlyBackwards(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = network()

    def forward(self, x):
        return Backwards.apply(self.inner(x))


def test_an_operation_without_a_forward_rule_is_said():
    with pytest.raises(ValueError, match="cannot be differentiated twice in forward mode"):
        measure.curvature(OnlyBackwards(), points(), CE, "e", 1)


@pytest.mark.slow
def test_intervals_over_directions_cover():
    """93 to 97% of 1,000 intervals from 40 directions hold the mean over 40,000.

    Of a network whose weights are many enough for ‖Jv‖² not to vary by multiples: with 21 of them
    the values are so skewed that 92% do.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 3)).double()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(120, 4, generator=generator, dtype=F64)
    names, theta = flat_parameters(model)

    def z(t):
        return functional_call(model, unflatten(model, names, t), (x,)).flatten()

    def bend(v):
        return torch.func.jvp(lambda t: torch.func.jvp(z, (t,), (v,))[1], (theta,), (v,))

    span = torch.linalg.qr(torch.func.jacfwd(z)(theta))[0]
    steps = torch.randn(40_000, len(theta), generator=generator, dtype=F64)
    bent = [torch.vmap(bend)(part) for part in steps.split(2000)]
    d, a = (torch.cat(part) for part in zip(*bent, strict=True))
    normal = a - a @ span @ span.mT
    # The metric of MSELoss is 2/(120·3) times the identity.
    unit = d.square().sum(1) * math.sqrt(2 / 360)
    kappa, effects = normal.norm(dim=1) / unit, (a - normal).norm(dim=1) / unit
    v = unflatten(model, names, steps[0])
    own = measure.curvature(model, x, nn.MSELoss(), "e", [v])
    # J has singular values down to 1e-9 of the largest, which no solve tells from none.
    assert own.intrinsic.value == pytest.approx(float(kappa[0]), rel=1e-3)
    assert own.parameter_effects.value == pytest.approx(float(effects[0]), rel=1e-3)
    count = signature(measure.curvature).parameters["directions"].default
    for values in (kappa, effects):
        truth, inside = float(values.mean()), 0
        for drawn in values.view(1000, count):
            low, high = mean_estimate(drawn, "directions").interval()
            inside += low <= truth <= high
        assert 930 <= inside <= 970, inside
