"""What lies between the networks of a comparison: lines, barriers, and pairs that have none."""

import json

import pytest
import torch
from torch import nn

import droplens as dl
from droplens import measure
from droplens.estimates import mean_estimate

LOSS = nn.CrossEntropyLoss()
OPTIONS = {"draws": 5, "directions": 1, "seed": 0, "measures": ("interpolation",)}


def network(seed=0, width=5, p=0.0, activation=nn.Tanh):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, width), activation(), nn.Dropout(p), nn.Linear(width, 3))


def examples(n=30):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 4, generator=generator), torch.randint(3, (n,), generator=generator)


@pytest.fixture(scope="module")
def comparison():
    sets = {"with": [network(k, p=0.5) for k in range(5)], "without": [network(9), network(8)]}
    return sets, dl.compare(sets, examples(), LOSS, **OPTIONS)


def test_lines_are_those_of_the_measure_over_pairs_that_share_no_network(comparison):
    sets, found = comparison
    between = found.extras["interpolation"].between
    a, b = sets["with"], sets["without"]
    pairs = {
        "with – without": [(a[0], b[0]), (a[1], b[1])],
        "with": [(a[0], a[1]), (a[2], a[3])],
        "without": [(b[0], b[1])],
    }
    assert set(between) == set(pairs)
    for name, members in pairs.items():
        own = [measure.interpolation(m, n, examples(), LOSS) for m, n in members]
        barriers = [line.barrier for line in own]
        line = between[name]
        assert [pair.barrier for pair in line.pairs] == barriers
        if len(own) > 1:
            expected = mean_estimate(barriers)
            assert line.barrier.standard_error == expected.standard_error > 0
            at = mean_estimate([float(one.loss[10]) for one in own])
            assert (line.loss[10].value, line.loss[10].n) == (at.value, 2)
        else:
            assert line.barrier.standard_error == 0
        assert line.barrier.value == pytest.approx(sum(barriers) / len(barriers))


def test_page_and_json_show_them_with_the_caveat(comparison, tmp_path):
    _, found = comparison
    page = found.to_html(tmp_path / "page.html").read_text()
    assert "What lies between the networks?" in page
    assert "change places without changing the function" in page
    assert "Bands are 95% intervals over pairs" in page
    numbers = json.loads((tmp_path / "page.json").read_text())["numbers"]["extras"]
    line = numbers["interpolation"]["between"]["with – without"]
    assert line["barrier"]["n"] == 2
    assert len(line["loss"]) == len(line["alphas"]) == 21


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (network(1, width=6), "share an architecture, but differ in '0.bias'"),
        (network(1, activation=nn.ReLU), "the architectures differ: the first network has a loss"),
    ],
)
def test_networks_without_a_line_are_listed_with_the_reason(other, reason):
    found = dl.compare({"a": network(), "b": other}, examples(), LOSS, **OPTIONS)
    assert not found.extras
    assert reason in found.not_measured["interpolation (a – b)"]
    assert "no two networks" in found.not_measured["interpolation"]


def test_a_loss_that_is_not_finite_on_the_way_is_said():
    class Root(nn.Module):
        def __init__(self, sign):
            super().__init__()
            self.w = nn.Parameter(torch.full((3,), sign))

        def forward(self, x):
            return x[:, :3] * torch.log(self.w.abs())  # infinite at α = ½, between 1 and −1

    found = dl.compare({"a": Root(1.0), "b": Root(-1.0)}, examples(), LOSS, **OPTIONS)
    assert "NaN or infinite at 1 of 21" in found.not_measured["interpolation (a – b)"]


def test_it_is_offered_in_a_comparison_and_refused_for_one_network():
    plain = dl.compare({"a": network(), "b": network(1)}, examples(), LOSS, directions=1, seed=0)
    assert plain.not_measured["interpolation"].startswith("not asked for; measures=('interp")
    alone = dl.inspect(network(), examples(), LOSS, **OPTIONS)
    assert "takes several networks" in alone.not_measured["interpolation"]
    with pytest.raises(ValueError, match="'interpolation'"):
        dl.inspect(network(), examples(), LOSS, measures=("line",))
