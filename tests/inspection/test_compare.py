"""Sets of networks side by side: who wins is what the error bars allow."""

import math

import pytest
import torch
from torch import nn

import droplens as dl
from droplens.batches import as_batches
from droplens.calling import ForwardError
from droplens.estimates import Estimate
from droplens.inspection import Cost, SiteCost
from droplens.inspection._cost import pooled_cost
from droplens.inspection._cost_verdicts import approximation_verdict, cost_verdict, split_verdict
from droplens.inspection._flatness import Scaled, outputs_of, scale_to_loss, scaled_loss
from droplens.inspection._verdicts import (
    Sets,
    equalisation_verdict,
    sets_verdict,
)
from tests.inspection.test_inspect import data, network

loss = nn.CrossEntropyLoss()


def cost(gap=0.1, spread=0.09, error=0.001, gaussian=0.088, second_order=0.05, base=0.2):
    def estimate(value):
        return Estimate(value, error, 100)

    return Cost(
        Estimate(base), estimate(gap), estimate(spread), estimate(gap - spread), gaussian,
        second_order, {"2": SiteCost(estimate(gap), estimate(spread), estimate(0.0), 1.0, 2.0)},
        100, 0, {},
    )  # fmt: skip


def test_cost_verdicts_follow_their_error_bars():
    assert cost_verdict(cost(), "nats").outcome == "yes"
    assert "33% of the loss under dropout" in cost_verdict(cost(), "nats").sentence
    assert cost_verdict(cost(gap=-0.1), "nats").outcome == "no"
    assert cost_verdict(cost(error=0.06), "nats").outcome == "cannot conclude"
    at_the_bound = cost(gap=0.1, error=0.1 / 1.99)
    assert cost_verdict(at_the_bound, "nats").outcome == "yes"
    assert cost_verdict(cost(gap=0.1, error=0.1 / 1.98), "nats").outcome == "cannot conclude"


def test_split_and_approximation_verdicts():
    assert split_verdict(cost(spread=0.099), "nats").outcome == "no"
    assert split_verdict(cost(spread=0.05), "nats").outcome == "yes"
    assert "takes from" in split_verdict(cost(gap=0.1, spread=0.2), "nats").sentence
    assert split_verdict(cost(spread=0.09), "nats").outcome == "cannot conclude"
    near = approximation_verdict(cost())
    assert near.outcome == "yes"
    assert "Gaussian value is 2.2% too low" in near.sentence
    assert "second-order value 44% too low" in near.sentence
    assert approximation_verdict(cost(gaussian=0.06)).outcome == "no"
    assert approximation_verdict(cost(spread=0.0)).outcome == "cannot conclude"


def test_equalisation_verdict():
    assert equalisation_verdict("2", "3", 9.5, 10).outcome == "yes"
    assert equalisation_verdict("2", "3", 8.9, 10).outcome == "no"


def judged(first, second, networks):
    return sets_verdict(
        Sets(("a", "b"), first, second, networks),
        better="flatter", quantity="loss increase", unit="nats", key="flatness",
    )  # fmt: skip


def test_sets_are_told_apart_only_beyond_their_error_bars():
    low, high = [1.0, 1.1, 0.9], [2.0, 2.1, 1.9]
    assert judged(low, high, (3, 3)).outcome == "yes"
    assert judged(high, low, (3, 3)).outcome == "no"
    overlap = judged(low, [0.5, 1.2, 1.6], (3, 3))
    assert overlap.outcome == "cannot conclude"
    assert "the error bars overlap" in overlap.sentence
    alone = judged(low, [5.0], (3, 1))
    assert alone.outcome == "cannot conclude"
    assert "one network in a set has no error bar" in alone.sentence


def test_two_networks_are_called_these_two():
    paired = judged([1.0, 1.2, 0.8], [1.5, 1.72, 1.29], (1, 1))
    assert paired.outcome == "yes"
    assert paired.sentence.startswith("Of these two networks, 'a' is flatter")
    assert "over directions" in paired.rule
    assert judged([1.0], [2.0], (1, 1)).outcome == "yes"
    assert judged([1.0], [1.0], (1, 1)).outcome == "cannot conclude"


def test_false_alarms_of_the_set_verdict_stay_at_their_level():
    """2,000 comparisons of equal sets of five: about 5% conclude, z-bound of 5."""
    generator = torch.Generator().manual_seed(0)
    runs = torch.randn(2000, 2, 5, generator=generator).tolist()
    concluded = sum(judged(a, b, (5, 5)).outcome != "cannot conclude" for a, b in runs)
    assert concluded <= 2000 * 0.05 + 5 * math.sqrt(2000 * 0.05 * 0.95)
    assert concluded > 0


def test_outputs_are_scaled_to_a_common_loss():
    torch.manual_seed(0)
    x, y = data()
    net = network(0.0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(3)
    outputs = outputs_of(net, as_batches((x, y)))
    start = scaled_loss(outputs, loss, 1.0)
    for target in (start, start * 1.0, max(start, 1.0986) * 0.999 + 0.001 * start):
        scale = scale_to_loss(outputs, loss, target)
        if scale is not None:
            assert 0 < scale <= 1
            assert scaled_loss(outputs, loss, scale) == pytest.approx(target, rel=1e-5)
            with torch.no_grad():
                assert torch.allclose(Scaled(net, scale).eval()(x), scale * net.eval()(x))
    assert scale_to_loss(outputs, loss, start / 2) is None


def test_networks_and_their_scaled_twins_compare_at_one_loss():
    x, y = data(60)
    nets = [network(0.5, seed) for seed in range(2)]
    optimizer = torch.optim.Adam([p for net in nets for p in net.parameters()], 0.02)
    for _ in range(60):
        optimizer.zero_grad()
        sum(loss(net(x), y) for net in nets).backward()
        optimizer.step()
    found = dl.compare(
        {"a": nets, "b": [network(0.0, 5), network(0.0, 6)]}, (x, y), loss,
        held_out=data(20, seed=9), draws=10, directions=2, seed=0,
    )  # fmt: skip
    losses = [i.base for inspections in found.sets.values() for i in inspections]
    if found.equal_loss is not None:
        assert found.equal_loss.loss == pytest.approx(max(losses))
        for flat in (f for curves in found.equal_loss.flatness.values() for f in curves):
            assert flat.base == pytest.approx(found.equal_loss.loss, rel=1e-4)
    assert list(found.costs) == ["a", "b"]
    assert found.costs["a"].gap.over == "networks"
    assert found.costs["b"].gap.value == 0
    assert found.held_out.examples == 20
    assert any("held-out" in v.sentence for v in found.verdicts)
    assert not any(v.id == "cost b" for v in found.verdicts)


def test_one_network_each_and_a_page(tmp_path):
    found = dl.compare(
        {"with": network(0.5), "without": network(0.0, 1)}, data(), loss, draws=10, directions=3,
        seed=1,
    )  # fmt: skip
    assert found.costs["with"].gap.over == "masks"
    sentences = [v.sentence for v in found.verdicts if v.id.startswith("equalisation")]
    assert all("these two" in s for s in sentences)
    page = found.to_html(tmp_path / "page.html")
    assert page.stat().st_size < 2_000_000
    assert "What dropout did to these networks" in str(found)
    again = dl.compare(
        {"with": network(0.5), "without": network(0.0, 1)}, data(), loss, draws=10, directions=3,
        seed=1,
    )  # fmt: skip
    assert again.to_dict()["numbers"] == found.to_dict()["numbers"]


def test_a_pooled_cost_carries_the_error_over_networks():
    pooled = pooled_cost([cost(gap=0.1), cost(gap=0.2), cost(gap=0.3)])
    assert pooled.gap.value == pytest.approx(0.2)
    assert pooled.gap.standard_error == pytest.approx(0.1 / math.sqrt(3))
    assert pooled.gap.n == 3
    assert pooled.by_site["2"].gaussian == 1.0


@pytest.mark.parametrize(
    ("models", "error", "message"),
    [
        ([network()], TypeError, "models has to be a mapping of names to networks"),
        ({}, ValueError, "models is empty"),
        ({"a": []}, ValueError, r"models\['a'\] is empty"),
        ({"a": [3]}, TypeError, r"models\['a'\] has to hold torch modules, but holds a int"),
    ],
    ids=["list", "empty", "empty set", "no module"],
)
def test_bad_sets_are_named(models, error, message):
    with pytest.raises(error, match=message):
        dl.compare(models, data(), loss)


class Short(nn.Sequential):
    """Fails on other data than its own."""

    def forward(self, x):
        if len(x) != 40:
            raise LookupError(f"no table for {len(x)} examples")
        return super().forward(x)


def test_what_is_refused_names_its_network():
    broken = network(seed=1)
    with torch.no_grad():
        broken[0].bias[1] = float("nan")
    refused = r"^'b', network 2 of 2: the model's weight '0.bias' holds NaN or Inf"
    with pytest.raises(ValueError, match=refused):
        dl.compare({"a": network(), "b": [network(), broken]}, data(), loss, draws=3, directions=1)
    with pytest.raises(TypeError, match=r"^'b': the model returned a tuple of 2"):
        dl.compare({"a": network(), "b": nn.LSTM(6, 3)}, data(), loss, draws=3, directions=1)
    with pytest.raises(ForwardError, match=r"^'b': the model's forward raised LookupError"):
        dl.compare({"a": network(), "b": Short(*network())}, data(20), loss, draws=3, directions=1)


def test_a_forward_that_fails_on_held_out_data_names_its_network(monkeypatch):
    from droplens.inspection import _compare

    def fails(model, batches):
        raise ForwardError("no such row")

    monkeypatch.setattr(_compare, "outputs_of", fails)
    with pytest.raises(ForwardError, match=r"^'a', network 1 of 2: no such row"):
        _compare._held_out({"a": [network(), network()]}, data(), loss)
