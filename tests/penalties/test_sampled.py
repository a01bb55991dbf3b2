"""The one-probe penalty: unbiased for the second order, with an honest error."""

import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import droplens as dl
from droplens.estimates import Estimate
from tests.penalties.test_penalty import cross_entropy, deep_network, labels, randn, tail_network, x

binary = nn.BCEWithLogitsLoss()
weighted = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 0.5, 3.0], dtype=torch.float64))


def sampled(net, loss=cross_entropy, **options):
    with torch.no_grad():
        return dl.penalty(net, x, loss, "sampled", **options)


@pytest.mark.parametrize(
    ("loss", "targets"),
    [(cross_entropy, None), (nn.MSELoss(), None), (binary, None), (weighted, labels)],
    ids=["cross-entropy", "squared", "binary", "class weights"],
)
def test_unbiased_for_the_second_order(loss, targets):
    """3,000 draws against the exact sum over classes: z-bound of 4.5."""
    net = deep_network()
    with torch.no_grad():
        exact = dl.penalty(net, x, loss, "second_order", targets=targets)
    found = sampled(net, loss, targets=targets, draws=3000, seed=0)
    assert abs(float(found) - float(exact)) <= 4.5 * found.standard_error
    for name, value in exact.by_site.items():
        assert float(found.by_site[name]) == pytest.approx(float(value), rel=0.2)


def test_the_standard_error_is_that_of_repeats():
    net = deep_network()
    runs = [sampled(net, draws=4, seed=s) for s in range(400)]
    spread = torch.tensor([float(r) for r in runs]).std()
    mean_error = sum(r.standard_error**2 for r in runs) / len(runs)
    assert mean_error**0.5 == pytest.approx(float(spread), rel=0.15)


@pytest.mark.parametrize("draws", [2, 4])
def test_sites_and_examples_have_errors_of_their_own(draws):
    """Examples are independent, so their squares add up; a site alone has its own."""
    net = deep_network()
    found = sampled(net, draws=draws, seed=0)
    assert float(found.example_errors.norm()) == pytest.approx(found.standard_error)
    assert list(found.site_errors) == list(found.by_site) == ["2", "5"]
    for name, error in found.site_errors.items():
        alone = sampled(net, draws=draws, seed=0, sites=[name])
        assert error == pytest.approx(alone.standard_error)
    exact = dl.penalty(net, x, cross_entropy)
    assert exact.site_errors == {}
    assert exact.example_errors is None


def test_errors_over_a_loader_are_those_of_its_batches():
    net = deep_network()
    whole = dl.penalty(net, TensorDataset(x, labels), cross_entropy, "sampled", draws=4, seed=0)
    batches = DataLoader(TensorDataset(x, labels), batch_size=2)
    found = dl.penalty(net, batches, cross_entropy, "sampled", draws=4, seed=0)
    assert float(found.example_errors.norm()) == pytest.approx(found.standard_error)
    assert len(found.example_errors) == len(whole.example_errors) == len(x)
    for name, error in found.site_errors.items():
        assert error == pytest.approx(whole.site_errors[name], rel=0.7)


def test_one_draw_gives_an_upper_bound():
    net, many = deep_network(), randn(16, x.shape[1])
    with torch.no_grad():
        runs = [dl.penalty(net, many, cross_entropy, "sampled", seed=s) for s in range(400)]
    spread = float(torch.tensor([float(r) for r in runs]).std())
    bound = (sum(r.standard_error**2 for r in runs) / len(runs)) ** 0.5
    assert bound >= spread
    assert bool(runs[0].example_errors.isnan().all())
    assert not any(math.isnan(error) for error in runs[0].site_errors.values())


def test_one_draw_of_few_examples_tells_no_error():
    found = sampled(deep_network(), seed=0)
    assert math.isnan(found.standard_error)
    assert all(math.isnan(error) for error in found.site_errors.values())
    assert bool(found.example_errors.isnan().all())
    idle = sampled(deep_network(0.0), seed=0)
    assert (float(idle), idle.standard_error) == (0.0, 0.0)


def test_its_gradient_is_unbiased_too():
    """300 gradients of 4 probes each against the exact one: 5 standard errors at every weight."""
    net = tail_network()
    weight = net[3].weight
    value = dl.penalty(net, x, cross_entropy, "second_order").total
    (exact,) = torch.autograd.grad(value, weight)
    runs = []
    for seed in range(300):
        drawn = dl.penalty(net, x, cross_entropy, "sampled", draws=4, seed=seed).total
        runs.append(torch.autograd.grad(drawn, weight)[0])
    gradients = torch.stack(runs)
    error = gradients.std(0) / len(runs) ** 0.5
    assert bool(((gradients.mean(0) - exact).abs() <= 5 * error).all())


def test_seeds():
    net = deep_network()
    state = torch.get_rng_state()
    first = sampled(net)
    assert first.seed is not None
    assert torch.equal(torch.get_rng_state(), state)
    assert float(sampled(net, seed=first.seed)) == float(first)
    assert float(sampled(net)) != float(first)
    assert dl.penalty(net, x, cross_entropy).seed is None
    assert dl.penalty(net, x, cross_entropy).standard_error == 0


def test_no_site_no_cost():
    found = dl.penalty(nn.Linear(2, 3).double(), x, cross_entropy, "sampled")
    assert (float(found), found.standard_error, found.by_site) == (0.0, 0.0, {})


def test_draws_have_to_be_positive():
    with pytest.raises(ValueError, match="draws has to be at least 1, but got 0"):
        sampled(deep_network(), draws=0)


def test_few_strong_units_are_said():
    """Four units before the last layer: the note names the site and sends to Monte Carlo."""
    found = dl.penalty(tail_network(units=4), x, cross_entropy)
    assert 1 <= found.participation["2"] <= 4
    assert "few strong units: the noise at '2'" in found.notes[0]
    assert "trust Monte Carlo" in found.notes[0]
    torch.manual_seed(0)
    many = nn.Sequential(nn.Linear(2, 400), nn.Tanh(), nn.Dropout(0.5), nn.Linear(400, 3)).double()
    wide = dl.penalty(many, x, cross_entropy)
    assert wide.participation["2"] > 100
    assert wide.notes == ()


def test_participation_counts_equal_coins():
    """One unit alone, then k equal ones, then groups of two under one coin."""
    for units, group, expected in ((1, 1, 1), (6, 1, 6), (6, 2, 3)):
        layer = nn.Linear(units, 3, bias=False).double()
        nn.init.constant_(layer.weight, 0.0)
        with torch.no_grad():
            layer.weight[0] = 1.0
        net = nn.Sequential(dl.nn.GroupedDropout(0.5, group), layer)
        ones = torch.ones(4, units, dtype=torch.float64)
        found = dl.penalty(net, ones, cross_entropy)
        assert found.participation == pytest.approx({"0": expected})


def test_attention_is_switched_to_the_maths_kernel_and_said_so():
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 16, 0.1, batch_first=True)
            self.encoder, self.head = nn.TransformerEncoder(layer, 1), nn.Linear(8, 3)

        def forward(self, h):
            return self.head(self.encoder(h).mean(1))

    net = Net().double().eval()
    data = randn(4, 5, 8)
    found = dl.penalty(net, data, cross_entropy, "second_order")
    assert any("maths kernel" in note for note in found.notes)
    gradients = torch.autograd.grad(found.total, list(net.parameters()), allow_unused=True)
    assert all(g is None or bool(torch.isfinite(g).all()) for g in gradients)


RATES = [0.0, 0.1, 0.5, 0.8]


@pytest.mark.parametrize("loss", [cross_entropy, nn.MSELoss(), binary], ids=str)
def test_the_curve_is_the_penalty_at_every_rate(loss):
    net = deep_network(0.3)
    curve = dl.penalty_curve(net, x, loss, RATES)
    for k, p in enumerate(RATES):
        net[2].p = net[5].p = p
        with torch.no_grad():
            gaussian = dl.penalty(net, x, loss)
            second = dl.penalty(net, x, loss, "second_order")
        assert float(curve.total[k]) == pytest.approx(float(gaussian), rel=1e-9, abs=1e-12)
        assert float(curve.second_order[k]) == pytest.approx(float(second), rel=1e-9, abs=1e-12)
        for name, value in gaussian.by_site.items():
            assert float(curve.by_site[name][k]) == pytest.approx(float(value), rel=1e-9, abs=1e-12)
    assert curve.rates == tuple(RATES)
    assert not curve.total.requires_grad


def test_the_curve_of_laws_that_are_not_proportional():
    """A grid DropBlock has another C̄ at every rate."""
    torch.manual_seed(0)
    block = dl.nn.DropBlock2d(0.2, 2)
    net = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), block, nn.Flatten(), nn.Linear(32, 3))
    images = torch.randn(3, 1, 4, 4)
    curve = dl.penalty_curve(net, images, cross_entropy, [0.1, 0.4])
    for k, p in enumerate((0.1, 0.4)):
        net[1].p = p
        with torch.no_grad():
            assert float(curve.total[k]) == pytest.approx(
                float(dl.penalty(net, images, cross_entropy)), rel=1e-5
            )


def test_the_curve_of_a_network_without_dropout_and_of_a_law_without_a_rate():
    flat = dl.penalty_curve(nn.Linear(2, 3).double(), x, cross_entropy, [0.5])
    assert flat.total.tolist() == [0.0]
    moments = torch.ones(2), torch.eye(2)
    net = nn.Sequential(dl.nn.Masked(dl.masks.Custom(*moments)), nn.Linear(2, 3)).double()
    curve = dl.penalty_curve(net, x, cross_entropy, [0.5])
    assert curve.unmeasured == {"0": "Custom has no rate p"}


@pytest.mark.parametrize(
    ("rates", "error", "message"),
    [
        ([], ValueError, "rates is empty"),
        ([0.5, 1.5], ValueError, "probability has to be between 0 and 1, but got 1.5"),
        ([float("nan")], ValueError, "probability has to be between 0 and 1, but got nan"),
        ([1.0], ValueError, "p = 1 drops every unit"),
        (["half"], TypeError, "p has to be a number"),
    ],
    ids=str,
)
def test_bad_rates_are_named(rates, error, message):
    with pytest.raises(error, match=message):
        dl.penalty_curve(deep_network(), x, cross_entropy, rates)


def covered(draws, inputs=x):
    """Out of 1,000 repeats: how often an interval holds the second-order value of what."""
    net = deep_network(0.3)
    n = range(len(inputs))
    with torch.no_grad():
        exact = dl.penalty(net, inputs, cross_entropy, "second_order")
        runs = [
            dl.penalty(net, inputs, cross_entropy, "sampled", draws=draws, seed=seed)
            for seed in range(1000)
        ]
    held = dict.fromkeys(("total", *exact.by_site, *n), 0)
    for found in runs:
        rows = [
            ("total", found.total, found.standard_error, exact.total),
            *((s, v, found.site_errors[s], exact.by_site[s]) for s, v in found.by_site.items()),
            *((k, found.per_example[k], found.example_errors[k], exact.per_example[k]) for k in n),
        ]
        for name, value, error, truth in rows:
            low, high = Estimate(float(value), float(error), draws).interval()
            held[name] += low <= float(truth) <= high
    return held


@pytest.mark.slow
def test_intervals_cover_the_exact_value_at_their_level():
    """1,000 repeats of 20 probes: the 95% interval holds the second-order value in 93–97%.

    Of the total, of every site, and of every example.
    """
    held = covered(20)
    assert all(930 <= count <= 970 for count in held.values()), held


@pytest.mark.slow
def test_one_probes_error_is_an_upper_bound():
    """1,000 repeats of the default's single probe: intervals hold the truth in 93% at least."""
    held = covered(1, randn(16, x.shape[1]))
    assert all(held[name] >= 930 for name in ("total", "2", "5")), held
