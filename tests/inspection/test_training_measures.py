"""What dropout does to training, on request and with held-out data, in numbers and on pages."""

import json

import pytest
import torch
from torch import nn

import droplens as dl
from droplens.inspection import _training
from tests.inspection.test_inspect import data, loss, network

x, y = data()
apart = (x[:10].flip(0), y[:10].flip(0))
ASKED = (
    "gradient_noise",
    "alignment",
    "modified_loss",
    "frozen_mask_order",
    "penalty_curve",
    "equivalent_rates",
)


@pytest.fixture(scope="module")
def found():
    return dl.inspect(
        network(), (x, y), loss, held_out=apart, draws=5, directions=1, measures=ASKED, seed=0
    )


def test_held_out_data_bring_the_gap_and_its_verdict(found):
    gap = found.extras["gap"]
    direct = dl.explain_gap(network(), (x, y), apart, loss, 50, seed=0)
    assert gap == direct
    assert "mc-dropout" in [verdict.id for verdict in found.verdicts]
    assert "gap" not in found.not_measured


def test_measures_on_request(found):
    assert set(found.extras) == {*ASKED, "gap"}
    noise = found.extras["gradient_noise"]
    assert noise == dl.gradient_noise(network(), x, y, loss, 50, seed=0)
    assert noise.examples == len(x)
    rates = found.extras["equivalent_rates"]
    assert rates.cost == pytest.approx(dl.penalty(network(), x, loss).total.item(), rel=1e-5)
    assert all(0 < rate < 1 for rate in rates.rates.values())
    assert rates.rates["a normal factor per unit (GaussianDropout)"] == pytest.approx(
        rates.rates["a coin per unit (Dropout)"], rel=1e-5
    )
    connect = {"c": dl.masks.Weight(0.1)}
    direct = dl.equivalent_rates(network(), x, loss, connect).rates["c"]
    assert rates.rates["a coin per weight (DropConnect)"] == direct
    assert found.extras["modified_loss"] == dl.modified_loss(network(), x, y, loss, 0.1, 50, seed=0)
    order = dl.dynamics.frozen_mask_order(network(), x, y, loss, seed=0)
    assert found.extras["frozen_mask_order"] == order
    curve = found.extras["penalty_curve"]
    at = curve.rates.index(0.5)
    expected = dl.penalty_curve(network(), x, loss, [0.5])
    assert curve.total[at].item() == pytest.approx(expected.total.item())
    assert curve.second_order[at].item() == pytest.approx(expected.second_order.item())


def test_noise_is_of_many_batches_together_and_says_of_how_many(monkeypatch):
    loader = [(x[k : k + 7], y[k : k + 7]) for k in range(0, len(x), 7)]
    asked = {"draws": 5, "directions": 1, "measures": ("gradient_noise", "alignment"), "seed": 0}
    found = dl.inspect(network(), loader, loss, **asked).extras
    whole = dl.gradient_noise(network(), x, y, loss, 2000, seed=1)
    noise = found["gradient_noise"]
    assert noise.examples == found["alignment"].examples == len(x)
    for one, other in ((noise.trace, whole.trace), (noise.signal, whole.signal)):
        error = (one.standard_error**2 + other.standard_error**2) ** 0.5
        assert abs(one.value - other.value) < 4 * error
    aligned = dl.dynamics.noise_alignment(network(), x, y, loss, 512, 10**6, seed=1)
    for name in ("value", "trace_noise"):
        one, other = getattr(found["alignment"], name), getattr(aligned, name)
        error = (one.standard_error**2 + other.standard_error**2) ** 0.5
        assert abs(one.value - other.value) < 4 * error
    monkeypatch.setattr(_training, "_MOST_EXAMPLES", 9)
    few = dl.inspect(network(), loader, loss, **asked).extras
    assert few["gradient_noise"].examples == few["alignment"].examples == 9


def test_pages_and_json(found, tmp_path):
    page = found.to_html(tmp_path / "page.html").read_text()
    for title in (
        "Why is the training loss not the held-out loss?",
        "How noisy does dropout make the gradient?",
        "Does the noise lie along the curvature?",
        "What does training with dropout descend?",
        "Does the modified loss describe descent with one mask?",
        "What would other rates cost?",
        "Which other dropout would cost the same?",
    ):
        assert title in page
    numbers = json.loads((tmp_path / "page.json").read_text())["numbers"]["extras"]
    parts = [numbers["gap"][p]["value"] for p in ("spread", "shift", "norm_mode", "generalization")]
    assert sum(parts) == pytest.approx(numbers["gap"]["gap"]["value"], abs=1e-12)
    assert numbers["alignment"]["parameters"] > 0
    assert numbers["modified_loss"]["implicit"]["value"] > 0
    assert len(numbers["penalty_curve"]["total"]) == len(numbers["penalty_curve"]["rates"])


def test_without_held_out_data_the_page_says_what_is_missing():
    plain = dl.inspect(network(), (x, y), loss, draws=5, directions=1, seed=0)
    assert "with held_out=" in plain.not_measured["gap"]
    assert "not asked for" in plain.not_measured["alignment"]
    asked = dl.inspect(network(), (x, y), loss, draws=5, directions=1, measures=("gap",), seed=0)
    assert "pass held_out=" in asked.not_measured["gap"]


def test_a_network_without_dropout_has_a_gap_and_no_noise():
    plain = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    assert x.shape[1] == 6
    found = dl.inspect(
        plain, (x, y), loss, held_out=apart, directions=1, measures=("alignment",), seed=0
    )
    assert found.extras["gap"].spread.value == 0
    assert "no site of the model drops anything" in found.not_measured["alignment"]
    assert "mc-dropout" not in [verdict.id for verdict in found.verdicts]


def test_comparisons_tell_the_gap_of_every_set(tmp_path):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    sets = {"with": [network(), network()], "without": plain}
    found = dl.compare(
        sets, (x, y), loss, held_out=apart, draws=5, directions=1, measures=ASKED, seed=0
    )
    assert all("gap" in i.extras for each in found.sets.values() for i in each)
    page = found.to_html(tmp_path / "page.html").read_text()
    assert "Why is the training loss not the held-out loss?" in page
    assert "How noisy does dropout make the gradient?" in page


def test_a_set_that_has_a_measure_is_shown_beside_one_that_has_not(tmp_path):
    plain = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    sets = {"with": network(), "without": plain}
    found = dl.compare(sets, (x, y), loss, draws=5, directions=1, measures=("alignment",), seed=0)
    page = found.to_html(tmp_path / "page.html").read_text()
    assert "Does the noise lie along the curvature?" in page
    assert f"Both of {len(x)} examples together" in page
    assert "no site of the model drops anything" in found.not_measured["alignment (without)"]
