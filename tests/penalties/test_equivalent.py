"""Equal cost under another mask: closed forms, round trips, and what cannot be."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import droplens as dl
from tests.penalties.test_penalty import cross_entropy, deep_network, labels, randn, tail_network, x


def images_network(layer):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), layer, nn.Flatten(), nn.Linear(108, 3)
    ).double()


images = randn(3, 1, 6, 6)


def test_laws_of_equal_covariance_have_equal_rates():
    found = dl.equivalent_rates(
        deep_network(0.35),
        x,
        cross_entropy,
        {"gaussian": dl.masks.Gaussian(0.1), "groups of one": dl.masks.Grouped(0.1, 1)},
    )
    assert found.rates == pytest.approx({"gaussian": 0.35, "groups of one": 0.35}, abs=2e-6)
    own = dl.penalty(deep_network(0.35), x, cross_entropy)
    assert found.cost == pytest.approx(own.total.item())
    assert found.unreached == {}


def test_a_coin_per_channel_against_the_closed_form():
    """Squared loss: λ Σ j² = λ′ Σ_channels (Σ j)², so λ′ is known."""
    net = images_network(nn.Dropout(0.5))
    ours = dl.penalty(net, images, nn.MSELoss()).total.item()
    whole = dl.penalty(images_network(nn.Dropout2d(0.5)), images, nn.MSELoss()).total.item()
    found = dl.equivalent_rates(net, images, nn.MSELoss(), {"channel": dl.masks.Channel(0.1)})
    ratio = ours / whole  # λ′, as λ = 1
    assert found.rates["channel"] == pytest.approx(ratio / (1 + ratio), abs=2e-6)


def test_a_rate_put_back_costs_the_same():
    net = images_network(nn.Dropout(0.3))
    others = {"block": dl.masks.Block(0.1, 3, dims=2), "path": dl.masks.Path(0.1)}
    found = dl.equivalent_rates(net, images, cross_entropy, others)
    layers = {
        "block": dl.nn.DropBlock2d(found.rates["block"], 3),
        "path": dl.nn.DropPath(found.rates["path"]),
    }
    for layer in layers.values():
        cost = dl.penalty(images_network(layer), images, cross_entropy).total.item()
        assert cost == pytest.approx(found.cost, rel=1e-5)
    assert found.rates["block"] != pytest.approx(0.3, abs=0.01)


def test_drop_connect_as_another_network():
    """Before the last layer, squared loss, no bias dropped: the same λ Σ (W h)²."""
    net = tail_network(0.4)
    other = copy.deepcopy(net)
    other[2].p = 0.0
    dl.nn.drop_connect(other[3], "weight", 0.1)
    found = dl.equivalent_rates(net, x, nn.MSELoss(), {"connect": other})
    assert found.rates["connect"] == pytest.approx(0.4, abs=1e-3)


def test_weight_masks_are_drop_connect_on_every_layer():
    """The rate at which a network of one's own with DropConnect costs the same, and no more."""
    net = images_network(nn.Dropout(0.3))
    before = [name for name, _ in net.named_modules()]
    found = dl.equivalent_rates(net, images, cross_entropy, {"connect": dl.masks.Weight(0.5)})
    other = images_network(nn.Identity())
    dl.nn.drop_connect(other[0], "weight", found.rates["connect"])
    dl.nn.drop_connect(other[4], "weight", found.rates["connect"], per_example=True)
    cost = dl.penalty(other, images, cross_entropy).total.item()
    assert cost == pytest.approx(found.cost, rel=1e-4)
    itself = dl.equivalent_rates(other, images, cross_entropy, {"connect": dl.masks.Weight(0.5)})
    assert itself.rates["connect"] == pytest.approx(found.rates["connect"], rel=1e-4)
    assert [name for name, _ in net.named_modules()] == before
    with pytest.raises(ValueError, match="no linear or convolution layer for DropConnect"):
        dl.equivalent_rates(
            nn.Sequential(nn.Dropout(0.3)), x, nn.MSELoss(), {"connect": dl.masks.Weight(0.5)}
        )


def test_loaders_are_streamed_and_sites_chosen():
    net = deep_network(0.35)
    loader = DataLoader(TensorDataset(x, labels), batch_size=2)
    others = {"grouped": dl.masks.Grouped(0.1, 2)}
    whole = dl.equivalent_rates(net, x, cross_entropy, others, sites=["5"])
    parts = dl.equivalent_rates(net, loader, cross_entropy, others, sites=["5"])
    assert parts.rates == pytest.approx(whole.rates, abs=1e-5)
    every = dl.equivalent_rates(net, x, cross_entropy, others)
    assert every.rates["grouped"] != whole.rates["grouped"]


def test_nothing_to_match_and_nothing_that_matches():
    others = {"gaussian": dl.masks.Gaussian(0.1)}
    assert dl.equivalent_rates(tail_network(0.0), x, cross_entropy, others).rates["gaussian"] == 0
    deaf = tail_network(0.3)
    nn.init.zeros_(deaf[3].weight)
    found = dl.equivalent_rates(tail_network(0.3), x, cross_entropy, {"deaf": deaf})
    assert math.isnan(found.rates["deaf"])
    assert "at p = 0.99 it still costs less than" in found.unreached["deaf"]


@pytest.mark.parametrize(
    ("others", "error", "message"),
    [
        ({}, ValueError, "others is empty"),
        ({"a": 0.3}, TypeError, r"others\['a'\] has to be a mask law or a torch module, .* float"),
        (
            {"a": dl.masks.Custom(torch.ones(4), torch.eye(4))},
            ValueError,
            r"others\['a'\] is a Custom, which has no rate p",
        ),
        ({"a": dl.masks.Grouped(0.1, 3)}, ValueError, "site '2'.*3"),
    ],
    ids=["none", "number", "custom", "size"],
)
def test_bad_arguments_are_named(others, error, message):
    with pytest.raises(error, match=message):
        dl.equivalent_rates(tail_network(), x, cross_entropy, others)


def test_a_law_of_units_at_a_weight_is_refused():
    net = tail_network(0.0)
    dl.nn.drop_connect(net[3], "weight", 0.3)
    with pytest.raises(ValueError, match="masks a weight, where no law of units fits"):
        dl.equivalent_rates(net, x, cross_entropy, {"a": dl.masks.Gaussian(0.1)})
