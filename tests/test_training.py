import copy
import math

import pytest
import torch
from torch import nn

from droplens import data, training

PLAN = training.Plan(epochs=3, batch_size=5, learning_rate=0.01)


def mlp(p=0.0, activation=nn.ReLU, bias=True, d_in=4, d_out=3, dtype=torch.float64):
    return nn.Sequential(
        nn.Linear(d_in, 7, bias=bias),
        activation(),
        nn.Dropout(p),
        nn.Sequential(nn.Linear(7, 6, bias=bias), activation(), nn.Dropout(p)),
        nn.Linear(6, d_out, bias=bias),
    ).to(dtype)


def examples(n=13, d_in=4, classes=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(n, d_in, generator=generator, dtype=dtype)
    return inputs, torch.randint(classes, (n,), generator=generator)


def regression(n=13, d_in=4, d_out=3):
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(n, d, generator=generator, dtype=torch.float64) for d in (d_in, d_out))


def by_hand(network, pair, loss, plan, orders=None):
    """The loop that anybody would write, on one network."""
    network = copy.deepcopy(network)
    kind = torch.optim.Adam if plan.optimizer == "adam" else torch.optim.SGD
    optimizer = kind(network.parameters(), lr=plan.learning_rate, weight_decay=plan.weight_decay)
    inputs, targets = pair
    size = plan.batch_size or len(inputs)
    history = []
    for epoch in range(plan.epochs):
        order = torch.arange(len(inputs)) if orders is None else orders[epoch]
        sums = 0.0
        for rows in order.split(size):
            value = loss(network(inputs[rows]), targets[rows])
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            sums += value.item() * len(rows)
        history.append(sums / len(inputs))
    return network, history


def weights(network):
    return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])


class Residual(nn.Module):
    """Not a plain sequence: runs through vmap."""

    def __init__(self, p=0.0):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.drop = nn.Dropout(p)
        self.last = nn.Linear(4, 3)

    def forward(self, x):
        return self.last(x + self.drop(torch.tanh(self.first(x))))


ARCHITECTURES = {
    "relu": lambda: mlp(),
    "tanh": lambda: mlp(activation=nn.Tanh),
    "gelu": lambda: mlp(activation=nn.GELU),
    "no bias": lambda: mlp(bias=False),
    "rectified output": lambda: nn.Sequential(nn.Linear(4, 3), nn.ReLU()).double(),
    "leading flatten and identity": lambda: nn.Sequential(
        nn.Flatten(), nn.ReLU(), nn.Linear(4, 1), nn.Identity(), nn.Linear(1, 3)
    ).double(),
    "not plain": lambda: Residual().double(),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize(
    "plan",
    [
        training.Plan(4, None, 0.01),
        training.Plan(4, None, 0.05, "sgd", weight_decay=0.1),
    ],
    ids=["adam", "sgd"],
)
def test_full_batch_equals_a_loop(name, plan):
    networks = training.initialise(ARCHITECTURES[name], 3, seed=0)
    result = training.train(networks, examples(), nn.CrossEntropyLoss(), plan, seed=0)
    for s, network in enumerate(networks):
        expected, history = by_hand(network, examples(), nn.CrossEntropyLoss(), plan)
        torch.testing.assert_close(weights(result.networks[s]), weights(expected))
        torch.testing.assert_close(result.history[:, s].tolist(), history, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["relu", "not plain"])
def test_minibatches_equal_a_loop_over_the_same_orders(name):
    networks = training.initialise(ARCHITECTURES[name], 2, seed=0)
    result = training.train(networks, examples(), nn.CrossEntropyLoss(), PLAN, seed=5)
    seeds = torch.Generator().manual_seed(5)
    for s, network in enumerate(networks):
        child = int(torch.randint(2**53, (), generator=seeds))
        stream = torch.Generator().manual_seed(child)
        orders = [torch.randperm(13, generator=stream) for _ in range(PLAN.epochs)]
        expected, history = by_hand(network, examples(), nn.CrossEntropyLoss(), PLAN, orders)
        torch.testing.assert_close(weights(result.networks[s]), weights(expected))
        torch.testing.assert_close(result.history[:, s].tolist(), history, rtol=1e-6, atol=0)


LOSSES = {
    "squared": (nn.MSELoss(), regression()),
    "squared, summed": (nn.MSELoss(reduction="sum"), regression()),
    "smoothed": (nn.CrossEntropyLoss(label_smoothing=0.1), examples()),
    "weighted": (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2, 3]).double()), examples()),
    "ignoring": (nn.CrossEntropyLoss(ignore_index=1), examples()),
    "of shares": (nn.CrossEntropyLoss(), (examples()[0], regression()[1].softmax(1))),
    "logistic": (nn.BCEWithLogitsLoss(), (examples()[0], regression()[1].sigmoid())),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("build", [mlp, lambda: Residual().double()], ids=["plain", "mapped"])
def test_every_loss_equals_a_loop(name, build):
    loss, pair = LOSSES[name]
    networks = training.initialise(build, 2, seed=0)
    plan = training.Plan(3, None, 0.01)
    result = training.train(networks, pair, loss, plan, seed=0)
    for s, network in enumerate(networks):
        expected, _ = by_hand(network, pair, loss, plan)
        torch.testing.assert_close(weights(result.networks[s]), weights(expected))


def test_an_objective_sees_the_model_itself():
    def decayed(model, inputs, targets):
        norm = sum(parameter.square().sum() for parameter in model.parameters())
        return nn.functional.mse_loss(model(inputs), targets) + 0.05 * norm

    networks = training.initialise(mlp, 2, seed=0)
    decay = training.Plan(3, None, 0.05, "sgd", weight_decay=0.1)
    by_objective = training.train(
        networks, regression(), decayed, training.Plan(3, None, 0.05, "sgd"), seed=0
    )
    by_plan = training.train(networks, regression(), nn.MSELoss(), decay, seed=0)
    for one, other in zip(by_objective.networks, by_plan.networks, strict=True):
        torch.testing.assert_close(weights(one), weights(other))


def test_a_plain_network_does_not_depend_on_its_companions():
    networks = training.initialise(lambda: mlp(0.5), 3, seed=0)
    mixed = [*networks[:2], *training.initialise(mlp, 2, seed=9)]
    alone = training.train(networks[:1], examples(), nn.CrossEntropyLoss(), PLAN, seed=1)
    among = training.train(mixed, examples(), nn.CrossEntropyLoss(), PLAN, seed=1)
    for s in (0,):
        torch.testing.assert_close(weights(alone.networks[s]), weights(among.networks[s]))
    assert not torch.equal(weights(among.networks[0]), weights(among.networks[1]))


def test_initialise_gives_each_network_its_own_weights_and_restores_the_stream():
    before = torch.get_rng_state()
    three = training.initialise(mlp, 3, seed=4)
    two = training.initialise(mlp, 2, seed=4)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(weights(three[1]), weights(two[1]))
    assert not torch.equal(weights(three[0]), weights(three[1]))
    fresh = training.initialise(mlp, 1)[0]
    assert not torch.equal(weights(fresh), weights(training.initialise(mlp, 1)[0]))


@pytest.mark.parametrize("build", [lambda: mlp(0.5), lambda: Residual(0.5).double()])
def test_runs_repeat_by_seed_and_leave_everything_as_it_was(build):
    networks = [network.eval() for network in training.initialise(build, 2, seed=0)]
    kept = [weights(network) for network in networks]
    before = torch.get_rng_state()
    runs = [
        training.train(networks, examples(), nn.CrossEntropyLoss(), PLAN, seed=seed)
        for seed in (1, 1, 2)
    ]
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(weights(runs[0].networks[1]), weights(runs[1].networks[1]))
    assert not torch.equal(weights(runs[0].networks[1]), weights(runs[2].networks[1]))
    for network, own in zip(networks, kept, strict=True):
        assert torch.equal(weights(network), own)
        assert all(parameter.grad is None for parameter in network.parameters())
    assert not any(network.training for network in runs[0].networks)
    unseeded = training.train(networks, examples(), nn.CrossEntropyLoss(), PLAN)
    assert unseeded.seed != runs[0].seed
    again = training.train(networks, examples(), nn.CrossEntropyLoss(), PLAN, seed=unseeded.seed)
    assert torch.equal(weights(unseeded.networks[0]), weights(again.networks[0]))


@pytest.mark.parametrize("build", [mlp, lambda p=0.0: Residual(p).double()])
def test_rates_may_differ_between_networks(build):
    networks = [build(p=p) for p in (0.0, 0.5, 1.0)]
    for network in networks[1:]:
        network.load_state_dict(networks[0].state_dict())
    plan = training.Plan(2, None, 0.01)
    result = training.train(networks, examples(), nn.CrossEntropyLoss(), plan, seed=0)
    undropped, _ = by_hand(networks[0], examples(), nn.CrossEntropyLoss(), plan)
    torch.testing.assert_close(weights(result.networks[0]), weights(undropped))
    assert not torch.allclose(weights(result.networks[1]), weights(undropped))
    # Everything dropped: the objective is that of the output's bias, log 3 up to its size.
    rates = [m.p for m in result.networks[2].modules() if isinstance(m, nn.Dropout)]
    assert set(rates) == {1.0}
    torch.testing.assert_close(weights(result.networks[2])[0], weights(networks[2])[0])


@pytest.mark.parametrize("build", [nn.Sequential, lambda *layers: Wrapped(nn.Sequential(*layers))])
def test_masks_have_the_law_of_dropout(build):
    """A linear network on input 1: each step's objective is the mean of z/μ over many units."""
    p, units = 0.3, 20_000
    network = build(nn.Linear(1, units, bias=False), nn.Dropout(p))
    with torch.no_grad():
        next(network.parameters()).fill_(1.0)
    other = copy.deepcopy(network)
    plan = training.Plan(1, None, 1e-12, "sgd")
    targets = torch.zeros(1, units)
    first = training.train(
        [network, other], (torch.ones(1, 1), targets), nn.MSELoss(), plan, seed=0
    )
    values = first.history[0].double()
    # E (z/μ)² = 1/(1 − p); the variance of one unit's square is p/(1 − p)³.
    z = (values - 1 / (1 - p)) / math.sqrt(p / (1 - p) ** 3 / units)
    assert z.abs().max() < 4.4  # two tests at 1e-5
    assert values[0] != values[1]


class Wrapped(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


def test_frozen_parameters_and_buffers():
    def build():
        network = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
        network[0].weight.requires_grad_(False)
        return network.double()

    networks = training.initialise(build, 2, seed=0)
    plan = training.Plan(3, None, 0.01)
    result = training.train(networks, examples(), nn.CrossEntropyLoss(), plan, seed=0)
    for network, trained in zip(networks, result.networks, strict=True):
        expected, _ = by_hand(network, examples(), nn.CrossEntropyLoss(), plan)
        for name, value in expected.state_dict().items():
            torch.testing.assert_close(trained.state_dict()[name], value)
        assert torch.equal(trained[0].weight, network[0].weight)
        assert not trained[0].weight.requires_grad


def test_shared_layers_stay_shared():
    def build():
        layer = nn.Linear(4, 4)
        return nn.Sequential(layer, nn.Tanh(), layer, nn.Linear(4, 3)).double()

    networks = training.initialise(build, 2, seed=0)
    plan = training.Plan(3, None, 0.01)
    result = training.train(networks, examples(), nn.CrossEntropyLoss(), plan, seed=0)
    expected, _ = by_hand(networks[1], examples(), nn.CrossEntropyLoss(), plan)
    torch.testing.assert_close(weights(result.networks[1]), weights(expected))
    assert result.networks[1][0] is result.networks[1][2]


def test_hooks_are_honoured():
    networks = training.initialise(mlp, 2, seed=0)
    for network in networks:
        network[0].register_forward_hook(lambda module, args, output: output * 2)
    plan = training.Plan(2, None, 0.01)
    result = training.train(networks, examples(), nn.CrossEntropyLoss(), plan, seed=0)
    expected, _ = by_hand(networks[0], examples(), nn.CrossEntropyLoss(), plan)
    torch.testing.assert_close(weights(result.networks[0]), weights(expected))


def test_progress_is_told_after_every_step():
    told = []
    networks = training.initialise(mlp, 1, seed=0)
    training.train(
        networks,
        examples(),
        nn.CrossEntropyLoss(),
        PLAN,
        seed=0,
        on_step=lambda done, total: told.append((done, total)),
    )
    assert told == [(i, 9) for i in range(1, 10)]


def test_divergence_is_visible():
    networks = training.initialise(lambda: mlp(activation=nn.Identity), 2, seed=0)
    with torch.no_grad():
        networks[1][0].weight.mul_(1e200)
    plan = training.Plan(3, None, 1.0, "sgd")
    result = training.train(networks, regression(), nn.MSELoss(), plan, seed=0)
    assert result.diverged == (1,)


def test_digits_are_learned():
    split = data.digits()
    networks = training.initialise(
        lambda: nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 10)),
        2,
        seed=0,
    )
    plan = training.Plan(15, 32, 3e-3)
    result = training.train(networks, split.train, nn.CrossEntropyLoss(), plan, seed=0)
    for network in result.networks:
        hits = network.eval()(split.test.inputs).argmax(1) == split.test.targets
        assert hits.float().mean() > 0.9


def nan_network():
    network = mlp()
    with torch.no_grad():
        network[0].weight[0, 0] = math.nan
    return network


INPUTS, TARGETS = examples()
BAD = {
    "no networks": ([], (INPUTS, TARGETS), ValueError, "at least one network"),
    "one module": (mlp(), (INPUTS, TARGETS), TypeError, "put a single one in a list"),
    "two architectures": (
        [mlp(), mlp(activation=nn.Tanh)],
        (INPUTS, TARGETS),
        ValueError,
        "network 1 differs from network 0",
    ),
    "two dtypes": ([mlp(), mlp().float()], (INPUTS, TARGETS), ValueError, "one architecture"),
    "frozen": (
        [mlp().requires_grad_(False)],
        (INPUTS, TARGETS),
        ValueError,
        "no parameters that require gradients",
    ),
    "nan weights": ([nan_network()], (INPUTS, TARGETS), ValueError, r"NaN or Inf in '0.weight'"),
    "nan inputs": ([mlp()], (INPUTS * math.nan, TARGETS), ValueError, "inputs holds NaN or Inf"),
    "no data": ([mlp()], (INPUTS[:0], TARGETS[:0]), ValueError, "inputs is empty"),
    "unequal": ([mlp()], (INPUTS, TARGETS[:-1]), ValueError, "13 examples but targets has 12"),
    "no pair": ([mlp()], INPUTS, TypeError, r"data has to be a pair \(inputs, targets\)"),
    "lists": ([mlp()], ([1], [2]), TypeError, "inputs has to be a tensor, but got list"),
    "device": ([mlp()], (INPUTS.to("meta"), TARGETS), ValueError, "inputs is on meta but"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name):
    networks, pair, error, message = BAD[name]
    with pytest.raises(error, match=message):
        training.train(networks, pair, nn.CrossEntropyLoss(), PLAN, seed=0)


def test_targets_of_another_shape_are_refused():
    pair = (INPUTS, torch.zeros(13, dtype=torch.float64))
    with pytest.raises(ValueError, match="targets has to have the shape of the outputs"):
        training.train([mlp()], pair, nn.MSELoss(), PLAN, seed=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs has to be positive, but got 0"),
        ({"batch_size": -1}, "batch_size has to be positive, but got -1"),
        ({"learning_rate": math.nan}, "learning_rate has to be positive, but got nan"),
        ({"weight_decay": -0.1}, "weight_decay has to be at least 0"),
        ({"optimizer": "lion"}, "optimizer has to be 'adam' or 'sgd', but got 'lion'"),
    ],
)
def test_a_bad_plan_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        training.Plan(**options)


def test_initialise_refuses_no_networks():
    with pytest.raises(ValueError, match="count has to be at least 1, but got 0"):
        training.initialise(mlp, 0)
