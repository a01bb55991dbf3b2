"""R_S, R_1 and R_2 against sums over all masks."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import droplens as dl
from droplens.dynamics import _gradients, _modified
from tests.covering import Covering
from tests.discovery.test_sites import Raises, assert_same_state, state_of
from tests.reference_dynamics import WrittenLoss, covariance, gradients, network, randn

x, targets, labels = randn(2, 2), randn(2, 2, seed=1), torch.tensor([0, 1])
LOSSES = [(nn.MSELoss(), targets), (nn.CrossEntropyLoss(), labels)]
EPSILON = 0.1


def truth(net, rows, y, loss):
    """R_S, R_1, R_2, its drift and its diffusion by enumeration."""
    weights, losses, found = gradients(net, rows, y, loss)
    risk = loss(net.eval()(rows), y).item()
    square = weights @ found.square().sum(1)
    noise = covariance(weights, found).trace()
    parts = EPSILON / 4 * torch.stack([square, square - noise, noise])
    return risk, float(weights @ losses) - risk, *parts.tolist()


def z(estimate, value):
    return (estimate.value - value) / estimate.standard_error


@pytest.mark.parametrize(("loss", "y"), LOSSES, ids=["squared", "cross entropy"])
def test_terms_hold_the_enumerated_truth(loss, y):
    net = network()
    found = dl.modified_loss(net, x, y, loss, EPSILON, 600, seed=0)
    risk, explicit, *parts = truth(net, x, y, loss)
    assert found.risk.value == pytest.approx(risk, rel=1e-12)
    assert found.risk.standard_error == 0
    for estimate, value in zip((found.implicit, found.drift, found.diffusion), parts, strict=True):
        assert abs(z(estimate, value)) <= 4
        assert (estimate.n, estimate.over) == (600, "masks")
    if found.method == "closed form":
        assert found.explicit.value == pytest.approx(explicit, rel=1e-12)
        assert found.explicit.standard_error == 0
    else:
        assert abs(z(found.explicit, explicit)) <= 4
    assert found.method == ("closed form" if isinstance(loss, nn.MSELoss) else "masks")
    assert abs(z(found.total, risk + explicit + parts[0])) <= 4


def test_parts_add_up_to_rounding():
    found = dl.modified_loss(network(), x, labels, nn.CrossEntropyLoss(), EPSILON, 50, seed=3)
    assert found.implicit.value == pytest.approx(
        found.drift.value + found.diffusion.value, rel=1e-12
    )
    assert found.total.value == pytest.approx(
        found.risk.value + found.explicit.value + found.implicit.value, rel=1e-12
    )


@pytest.mark.parametrize(("loss", "y"), LOSSES, ids=["squared", "cross entropy"])
def test_a_loader_is_one_large_batch(loss, y):
    """One example a batch; the enumeration knows both at once."""
    loader = DataLoader(TensorDataset(x, y), batch_size=1)
    found = dl.modified_loss(network(), loader, None, loss, EPSILON, 600, seed=0)
    risk, explicit, *parts = truth(network(), x, y, loss)
    assert found.risk.value == pytest.approx(risk, rel=1e-12)
    if found.method == "closed form":
        assert found.explicit.value == pytest.approx(explicit, rel=1e-12)
    else:
        assert abs(z(found.explicit, explicit)) <= 4
    for estimate, value in zip((found.implicit, found.drift, found.diffusion), parts, strict=True):
        assert abs(z(estimate, value)) <= 4
    assert dl.gradient_noise(network(), loader, None, loss, 4).examples == 2


def test_batches_count_by_what_their_means_divide_by():
    """Class weights, one of them zero, and an ignored label; without dropout numbers are exact."""
    y = torch.tensor([0, 0, -100, 1, 2])
    batches = [(randn(5, 2)[k : k + 2], y[k : k + 2]) for k in (0, 2, 4)]
    weight = torch.tensor([0.0, 3.0, 1.0]).double()
    net = network(0.0, classes=3)
    for reduction in ("mean", "sum"):
        loss = nn.CrossEntropyLoss(weight, reduction=reduction)
        parts = dl.modified_loss(net, iter_again(batches), None, loss, EPSILON)
        whole = dl.modified_loss(net, randn(5, 2), y, loss, EPSILON)
        assert parts.risk.value == pytest.approx(whole.risk.value, rel=1e-12)
        assert parts.implicit.value == pytest.approx(whole.implicit.value, rel=1e-12)
    with pytest.raises(ValueError, match="the loss weighs every one of the targets by zero"):
        dl.modified_loss(net, x, y[:2], nn.CrossEntropyLoss(weight), EPSILON)


def iter_again(batches):
    """A loader; a list would be taken for a tuple of inputs."""
    return DataLoader(batches, batch_size=None)


def rarely_dropped():
    """No mask anyone will ever draw drops a unit of this one."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Dropout(1e-6), nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 2)
    ).double()  # fmt: skip


@pytest.mark.parametrize(
    ("net", "closed"),
    [
        (network(), True),
        (network(sites=2), False),
        (network(sites=2, activation=nn.Identity), False),  # products of gates
        (network(sites=1, activation=nn.Identity), True),
        (nn.Sequential(nn.Dropout(0.3), nn.ReLU(), nn.Linear(2, 2)).double(), True),
        (nn.Sequential(dl.nn.GaussianDropout(0.3), nn.ReLU(), nn.Linear(2, 2)).double(), False),
        (rarely_dropped(), False),
    ],
    ids=["tail", "deep", "two linear", "linear", "relu of masks", "relu of normals", "rare"],
)
def test_the_closed_form_is_used_exactly_where_it_is_exact(net, closed):
    found = dl.modified_loss(net, x, targets, nn.MSELoss(), EPSILON, 10, seed=1)
    assert (found.method == "closed form") is bool(closed)


def test_the_step_size_scales_the_implicit_term_alone():
    small, large = (
        dl.modified_loss(network(), x, targets, nn.MSELoss(), step, 20, seed=1)
        for step in (0.1, 0.2)
    )
    assert large.implicit.value == pytest.approx(2 * small.implicit.value, rel=1e-12)
    assert large.explicit == small.explicit


def test_a_network_that_drops_nothing_has_no_explicit_term():
    for net in (network(p=0.0), nn.Linear(2, 2).double()):
        found = dl.modified_loss(net, x, targets, nn.MSELoss(), EPSILON, seed=0)
        assert (found.explicit.value, found.diffusion.value) == (0, 0)
        gradient = torch.autograd.grad(nn.MSELoss()(net(x), targets), list(net.parameters()))
        square = sum(float(g.square().sum()) for g in gradient)
        assert found.implicit.value == pytest.approx(EPSILON / 4 * square, rel=1e-12)
        assert found.implicit.standard_error == 0


def test_a_loss_without_a_family_is_measured_by_masks():
    found = dl.modified_loss(network(), x, targets, nn.HuberLoss(), EPSILON, 40, seed=0)
    assert found.method == "masks"


def test_seeds_repeat_and_fresh_calls_differ():
    def measure(**options):
        return dl.modified_loss(network(), x, labels, nn.CrossEntropyLoss(), EPSILON, 40, **options)

    state = torch.get_rng_state()
    first, second = measure(), measure()
    assert first.seed != second.seed
    assert repr(measure(seed=first.seed)) == repr(first)  # an error may be NaN
    assert torch.equal(torch.get_rng_state(), state)


def test_nothing_is_left_behind_also_after_an_error():
    model = Raises().eval()
    before = state_of(model)
    with pytest.raises(RuntimeError, match="the forward is broken"):
        dl.modified_loss(model, torch.zeros(2, 1, 4, 4), labels, nn.CrossEntropyLoss(), EPSILON)
    assert_same_state(before, state_of(model))
    net = network()
    net(x).sum().backward()
    grads = [p.grad.clone() for p in net.parameters()]
    dl.modified_loss(net, x, labels, nn.CrossEntropyLoss(), EPSILON, 4)
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), grads, strict=True))


class Outputs(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.net, self.wrap = network(), wrap

    def forward(self, rows):
        return self.wrap(self.net(rows))


BAD = [
    ({"draws": 3}, ValueError, "draws has to be an even number of at least 4"),
    ({"draws": 2}, ValueError, "draws has to be an even number of at least 4"),
    ({"draws": 4.0}, TypeError, "draws has to be an int, but got float"),
    ({"learning_rate": -1.0}, ValueError, "learning_rate has to be at least 0"),
    ({"learning_rate": "fast"}, TypeError, "learning_rate has to be a number, but got str"),
    ({"learning_rate": float("nan")}, ValueError, "learning_rate has to be at least 0"),
    ({"inputs": x[:0]}, ValueError, "inputs is empty"),
    ({"inputs": x * torch.nan}, ValueError, "inputs holds NaN or Inf"),
    ({"targets": labels + 5}, ValueError, "label 6, but the outputs have 2 classes"),
    ({"loss": nn.CrossEntropyLoss}, TypeError, "loss has to be a loss object"),
    ({"loss": nn.CrossEntropyLoss(reduction="none")}, ValueError, "reduction 'mean' or 'sum'"),
    ({"model": network().bfloat16(), "inputs": x.bfloat16()}, ValueError, "too coarse"),
    ({"model": Outputs(lambda f: (f, f))}, TypeError, "returned a tuple of 2"),
    ({"model": Outputs(lambda f: {"scores": f})}, TypeError, "dict with 'scores'"),
    ({"model": network().requires_grad_(False)}, ValueError, "no parameters that require"),
    ({"model": Outputs(torch.Tensor.detach)}, ValueError, "does not depend on the model's"),
    ({"seed": -1}, ValueError, "seed has to be between 0"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD, ids=[b[2][:25] for b in BAD])
def test_bad_arguments_are_named(arguments, error, message):
    given = {
        "model": network(),
        "inputs": x,
        "targets": labels,
        "loss": nn.CrossEntropyLoss(),
        "learning_rate": 0.1,
        **arguments,
    }
    with pytest.raises(error, match=message):
        dl.modified_loss(**given)


def test_logits_in_a_mapping_frozen_and_shared_weights():
    """Frozen weights are no direction of descent; a weight of two names counts once."""
    model = Outputs(lambda f: {"logits": f, "hidden": None})
    plain = dl.modified_loss(network(), x, labels, nn.CrossEntropyLoss(), 0.1, 10, seed=0)
    assert dl.modified_loss(model, x, labels, nn.CrossEntropyLoss(), 0.1, 10, seed=0) == plain
    net = network()
    net[0].requires_grad_(False)
    frozen = dl.gradient_noise(net, x, labels, nn.CrossEntropyLoss(), 300, seed=0)
    weights, _, found = gradients(net, x, labels, nn.CrossEntropyLoss())
    assert frozen.parameters == found.shape[1] == 8
    assert abs(z(frozen.trace, covariance(weights, found).trace())) <= 4
    shared = nn.Linear(2, 2, bias=False).double()
    tied = nn.Sequential(shared, nn.Tanh(), nn.Dropout(0.4), shared)
    noise = dl.gradient_noise(tied, x, labels, nn.CrossEntropyLoss(), 300, seed=0)
    weights, _, found = gradients(tied, x, labels, nn.CrossEntropyLoss(), units=2)
    assert noise.parameters == 4
    assert abs(z(noise.trace, covariance(weights, found).trace())) <= 4


def test_norm_layers_in_train_mode_stand_in_eval_and_keep_their_statistics():
    net = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout(0.5), nn.Linear(2, 2)).double().train()
    before = state_of(net)
    trained = dl.modified_loss(net, x, labels, nn.CrossEntropyLoss(), 0.1, 10, seed=0)
    assert_same_state(before, state_of(net))
    assert (
        dl.modified_loss(net.eval(), x, labels, nn.CrossEntropyLoss(), 0.1, 10, seed=0) == trained
    )


class InPlace(nn.Module):
    """tanh keeps its output for the backward pass; the addition changes what dropout returned."""

    def __init__(self):
        super().__init__()
        self.net = network(sites=2)

    def forward(self, rows):
        for layer in self.net:
            rows = layer(rows)
            if isinstance(layer, nn.Dropout):
                rows += 1
        return rows


def test_operations_in_place_after_a_site():
    found = dl.gradient_noise(InPlace(), x, labels, nn.CrossEntropyLoss(), 10, seed=0)
    assert list(found.by_site) == ["net.2", "net.5"]
    assert found.trace.value > 0


@pytest.mark.slow
@pytest.mark.parametrize("sites", [1, 2])
@pytest.mark.parametrize("examples", [1, 2])
def test_intervals_cover_the_truth_at_their_level(monkeypatch, examples, sites):
    """1,000 repeats of the default draws: each 95% interval holds the enumerated truth in 93–97%.

    Gradients under all masks are written out.
    """
    net, loss, rows = network(sites=sites), nn.CrossEntropyLoss(), slice(examples)
    names = ("risk", "explicit", "implicit", "drift", "diffusion")
    table = gradients(net, x[rows], labels[rows], loss)
    target = dict(zip(names, truth(net, x[rows], labels[rows], loss), strict=True))
    target["total"] = target["risk"] + target["explicit"] + target["implicit"]
    written = WrittenLoss({frozenset(["2"]): table}, target.pop("risk"))
    monkeypatch.setattr(_gradients, "fresh_masks", lambda source, names: (source, names))
    monkeypatch.setattr(_modified, "MaskedLoss", lambda *_: written)
    covering = Covering(target)
    for seed in range(1000):
        covering.add(dl.modified_loss(net, x, labels, loss, EPSILON, seed=seed))
    covering.assert_at_level()
