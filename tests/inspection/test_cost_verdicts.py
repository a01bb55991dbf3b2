"""Sentences on a cost: what is left out, exact zeros, and why a value is off."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import droplens as dl
from droplens.inspection._cost_verdicts import (
    approximation_verdict,
    cost_verdict,
    cost_verdicts,
)
from tests.inspection.test_compare import cost
from tests.inspection.test_inspect import data, loss, network, quick


def by_id(found):
    return {verdict.id: verdict for verdict in found.verdicts}


def beside(p, lawless=("1",)):
    """A dropout after layers of alpha dropout, which has no law."""
    alphas = [nn.AlphaDropout(0.2) for _ in lawless]
    return nn.Sequential(nn.Linear(6, 8), *alphas, nn.Dropout(p), nn.Linear(8, 3))


def test_the_headline_names_what_is_left_out(tmp_path):
    found = quick(beside(0.5), data())
    verdict = by_id(found)["cost"]
    assert verdict.sentence.startswith("Dropout without site '1', which has no law, costs 0.")
    assert "without site" in found.to_html(tmp_path / "page.html").read_text("utf-8")
    two = quick(beside(0.5, ("1", "2")), data())
    assert "without sites '1', '2', which have no law" in by_id(two)["cost"].sentence
    assert "without site" not in by_id(quick(network(), data()))["cost"].sentence


@pytest.mark.parametrize("gap", [-0.1, 0.001])
def test_all_outcomes_name_what_is_left_out(gap):
    apart = replace(cost(gap=gap, error=0.01), unmeasured={"a": "why", "2": "no derivative"})
    sentence = cost_verdict(apart, "nats").sentence
    assert "ropout without site 'a', which has no law, " in sentence
    many = replace(apart, unmeasured=dict.fromkeys("abcdefg", "why"))
    assert (
        "without sites 'a', 'b', 'c', 'd' and 3 more, which" in cost_verdict(many, "nats").sentence
    )


def test_no_law_at_all_leaves_the_cost_open(tmp_path):
    net = nn.Sequential(nn.Linear(6, 8), nn.AlphaDropout(0.2), nn.Linear(8, 3))
    found = quick(net, data())
    verdict = by_id(found)["cost"]
    assert verdict.outcome == "cannot conclude"
    assert verdict.sentence.startswith(
        "What dropout costs on this data is not known: site '1' has no law (alpha dropout adds"
    )
    assert "not known" in found.to_html(tmp_path / "page.html").read_text("utf-8")
    two = dl.compare({"alpha": net, "plain": network()}, data(), loss, draws=20, seed=0)
    assert "costs the networks 'alpha' on this data is not known" in " ".join(
        v.sentence for v in two.verdicts
    )
    none = quick(nn.Sequential(nn.Linear(6, 3)), data())
    assert "cost" not in by_id(none)


def test_an_exact_zero_is_said_to_be_one(tmp_path):
    found = quick(network(p=0.0), data())
    assert found.cost.gaussian == 0
    verdicts = by_id(found)
    assert verdicts["cost"].outcome == "no"
    assert verdicts["cost"].sentence == (
        "Dropout costs exactly 0 nats on this data: with p = 0 nothing is dropped."
    )
    assert not {"split", "approximation"} & set(verdicts)
    page = found.to_html(tmp_path / "page.html").read_text("utf-8")
    assert "with p = 0 nothing" in page
    assert "Three evaluations of the spread" not in page
    sentence = by_id(quick(beside(0.0), data()))["cost"].sentence
    assert (
        "without site '1', which has no law, costs exactly 0 nats on this data: with p" in sentence
    )


def test_masks_that_change_nothing_cost_nothing():
    net = network()
    with torch.no_grad():
        net[-1].weight.zero_()
    (verdict,) = [v for v in quick(net, data()).verdicts if v.id == "cost"]
    assert verdict.outcome == "no"
    assert "exactly 0 nats on this data: none of 20 masks changes the loss" in verdict.sentence


def test_no_noise_has_no_coins_and_no_spread():
    net, (x, _) = network(), data()
    net[2].p = 0.0
    found = dl.penalty(net, x, loss)
    assert found.participation["2"] == 0
    assert found.by_site["2"].item() == 0
    assert found.by_site["5"].item() == found.total.item() > 0
    assert not any("'2'" in note for note in found.notes)
    assert any("'5'" in note for note in found.notes)
    net[5].p = 0.0
    still = dl.penalty(net, x, loss)
    assert still.notes == ()
    still.total.backward()
    assert float(net[0].weight.grad.abs().max()) == 0


def test_a_lowered_loss_carries_its_error():
    lower = cost_verdict(cost(gap=-0.1, error=0.002), "nats")
    assert lower.outcome == "no"
    assert "lowers the loss on this data by 0.1000 ± 0.0020 nats" in lower.sentence


def test_agreement_clears_the_loss_and_blames_what_both_share():
    """Both take one linearised covariance: agreeing, they say nothing for it."""
    agreed = approximation_verdict(cost(gaussian=0.06, second_order=0.06))
    assert agreed.outcome == "no"
    assert "They agree, so it is not for the bend of the loss" in agreed.sentence
    assert "noise is small" not in agreed.sentence
    assert "in proportion to the masks" in agreed.sentence
    assert "equal coins" not in agreed.sentence
    few = replace(cost(gaussian=0.06, second_order=0.06), participation={"2": 3.0})
    assert "noise at '2' is that of about 3.0 equal coins" in approximation_verdict(few).sentence
    near = approximation_verdict(cost(gaussian=0.09, second_order=0.09))
    assert near.outcome == "yes"
    assert "the noise is small against the curvature" in near.sentence
    bent = approximation_verdict(cost(gaussian=0.06, second_order=0.05))
    assert "softmax is flat there" in bent.sentence
    assert "in proportion to the masks" in bent.sentence


def test_a_site_that_no_derivative_reaches_is_named():
    class Rounded(nn.Module):
        def forward(self, h):
            return torch.round(4 * h)

    net = nn.Sequential(nn.Linear(6, 12), nn.Dropout(0.3), Rounded(), nn.Linear(12, 3))
    verdict = by_id(quick(net, data()))["approximation"]
    assert verdict.outcome == "no"
    assert "No derivative reaches site '1'" in verdict.sentence
    assert "softmax" not in verdict.sentence


def test_nothing_more_is_said_of_a_zero():
    zero = dl.estimates.exact(0.0)
    found = cost_verdicts(replace(cost(), gap=zero, spread=zero, shift=zero), "nats")
    assert [verdict.id for verdict in found] == ["cost"]


class Centred(nn.Module):
    """Examples that meet behind a dropout, so that its masks mix them."""

    def __init__(self, late):
        super().__init__()
        self.body, self.drop, self.late = nn.Linear(6, 8), nn.Dropout(0.4), nn.Dropout(late)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        h = self.drop(self.body(x))
        return self.head(self.late(h - h.mean(0)))


def test_values_that_leave_out_every_site_are_not_told(tmp_path):
    net = Centred(0.0)
    net.late = nn.Identity()
    found = quick(net, data())
    assert found.cost.gaussian is None
    assert found.cost.second_order is None
    assert found.cost.spread.value > 0
    assert "approximation" not in by_id(found)
    assert found.not_measured["Gaussian value of the spread"].startswith("none of the sites that")
    assert "its mask mixes examples" in found.not_measured["penalty at drop"]
    found.to_html(tmp_path / "page.html")


def test_what_is_left_out_is_not_explained_otherwise():
    sentence = by_id(quick(Centred(0.01), data()))["approximation"].sentence
    assert sentence.endswith(
        "Monte Carlo is the number to use. Both values leave out 'drop', which the masks include."
    )
    assert "What is left" not in sentence
