"""Variance against flatness on the page: what a copy of the network does when trained on."""

import html
import json
import math
import re
import tempfile
from pathlib import Path

import pytest
import torch
from torch import nn

import droplens as dl
from droplens import measure
from droplens.batches import Batch
from droplens.inspection import _wandering
from droplens.measure._risk import Loss
from droplens.measure._trajectory import principal_directions
from droplens.report._landscape import LANDSCAPE
from tests.inspection.test_inspect import data, loss, network, quick

NAME = "variance_flatness"
TITLE = "Do the weights wander more where the loss is steep?"


@pytest.fixture(autouse=True)
def little(monkeypatch):
    """Fewer steps than a page takes, on fewer examples."""
    monkeypatch.setattr(_wandering, "_CHECKPOINTS", 8)
    monkeypatch.setattr(_wandering, "_EXAMPLES", 10)


def asked(model, given=None):
    return quick(model, given or data(), measures=[NAME])


def trained(model, seed=0, criterion=loss):
    subject = type("Subject", (), {"model": model, "seed": seed})
    x, y = data()
    batch = Batch(x.to(next(model.parameters()).dtype), y)
    with tempfile.TemporaryDirectory() as folder:
        paths = _wandering._trained(subject, [batch], Loss(criterion), Path(folder))
        return [torch.load(path, weights_only=True) for path in paths]


def test_it_joins_the_result_the_page_and_the_twin(tmp_path):
    found = asked(network())
    page = html.unescape(found.to_html(tmp_path / "page.html").read_text("utf-8"))
    assert TITLE in page
    own = json.loads((tmp_path / "page.json").read_text("utf-8"))["numbers"]["extras"][NAME]
    result = found.extras[NAME]
    assert own["found"]["variance"] == result.found.variance.tolist()
    assert own["found"]["slope"]["value"] == result.found.slope.value
    assert "directions" not in own["found"]
    assert (own["steps"], own["step_size"], own["batch"]) == (40, 0.01, 10)
    assert own["examples"] == len(data()[0])
    assert "took 40 steps of gradient descent of size 0.01" in page


def test_it_is_repeated_by_its_seed_and_leaves_model_and_streams_alone():
    model = network().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    stream = torch.get_rng_state()
    first, again = asked(model), asked(model)
    torch.testing.assert_close(first.extras[NAME].found.variance, again.extras[NAME].found.variance)
    assert torch.equal(torch.get_rng_state(), stream)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("fails", [None, "variance_flatness", "labelled"])
def test_no_checkpoint_is_left_behind(monkeypatch, tmp_path, fails):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    seen = []

    def refuse(*_):
        seen.extend(tmp_path.iterdir())
        raise ValueError("on purpose")

    if fails:
        monkeypatch.setattr(_wandering, fails, refuse)
    found = asked(network())
    assert (NAME in found.extras) == (fails is None)
    assert bool(seen) == bool(fails)
    assert list(tmp_path.iterdir()) == []


def test_a_straight_path_has_nothing_left_and_what_bends_stays():
    time = torch.linspace(-1, 1, 9, dtype=torch.float64)
    bend = time.square() - time.square().mean()
    states = [
        {"w": torch.tensor([3 + 5 * t, 1 - 2 * t + b], dtype=torch.float64)}
        for t, b in zip(time.tolist(), bend.tolist(), strict=True)
    ]
    left = torch.stack([state["w"] for state in _wandering._without_drift(states)])
    torch.testing.assert_close(left[:, 0], torch.full_like(time, 3))
    torch.testing.assert_close(left[:, 1], 1 + bend)


def test_the_steps_are_those_of_gradient_descent(monkeypatch):
    """One batch holds all, nothing drops: the copy follows torch's own optimiser."""
    monkeypatch.setattr(_wandering, "_EXAMPLES", 1000)
    model, (x, y) = network(0.0).double(), data()
    states = trained(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(40):
        optimizer.zero_grad()
        loss(model(x.double()), y).backward()
        optimizer.step()
        if step % 5 == 4:
            for name, weight in model.named_parameters():
                torch.testing.assert_close(states[step // 5][name], weight.detach())


def test_the_variance_is_of_the_path_less_its_drift():
    model = network()
    states = trained(model)
    found = asked(model).extras[NAME].found
    kept, _ = principal_directions(_wandering._without_drift(states), 20)
    whole, _ = principal_directions(states, 20)
    torch.testing.assert_close(found.variance, kept)
    assert float(whole[0]) > 1.5 * float(kept[0])


def test_the_copy_keeps_its_dropout(monkeypatch):
    """With all examples in every batch, masks are all that chance has left."""
    monkeypatch.setattr(_wandering, "_EXAMPLES", 1000)
    same = [trained(network(0.0).double(), seed)[-1]["0.weight"] for seed in (0, 1)]
    masked = [trained(network(0.5).double(), seed)[-1]["0.weight"] for seed in (0, 1)]
    torch.testing.assert_close(*same)
    assert float((masked[0] - masked[1]).norm()) > 1e-3 * float(masked[0].norm())


def test_a_sum_over_examples_steps_as_their_mean_does():
    model = network().double()
    mean, total = trained(model), trained(model, criterion=nn.CrossEntropyLoss(reduction="sum"))
    for first, second in zip(mean, total, strict=True):
        torch.testing.assert_close(first, second)


def test_every_example_comes_once_an_epoch():
    x, y = torch.arange(23.0)[:, None], torch.arange(23)
    source = torch.Generator().manual_seed(0)
    batches = _wandering._drawn([Batch(x, y)], Loss(nn.MSELoss()), source)
    epochs = [torch.cat([next(batches)[1] for _ in range(3)]) for _ in range(2)]
    for epoch in epochs:
        assert epoch.sort().values.tolist() == list(range(23))
    assert not torch.equal(*epochs)


def test_flatness_is_that_of_the_network_as_it_came():
    model = network()
    found = asked(model).extras[NAME].found
    x, y = data()
    with torch.no_grad():
        assert found.base == pytest.approx(float(loss(model.eval()(x), y)), rel=1e-5)
        step, end = found.directions[0], float(found.ends[0, 1])
        assert math.isfinite(end)
        for name, move in step.items():
            model.get_parameter(name).add_(end * move)
        assert float(loss(model(x), y)) == pytest.approx(math.e * found.base, rel=1e-3)


def frozen():
    return network().requires_grad_(False)


@pytest.mark.parametrize(
    ("model", "given", "reason"),
    [
        (frozen, data, "model has no parameters that require gradients"),
        (network, lambda: tuple(t[:9] for t in data()), "batches of 10 examples.*data has only 9"),
    ],
)
def test_what_cannot_be_trained_has_one_reason_on_the_page(model, given, reason):
    found = asked(model(), given())
    assert NAME not in found.extras
    assert re.search(reason, found.not_measured[NAME])


def test_too_many_weights_and_a_descent_that_diverges_are_refused(monkeypatch):
    monkeypatch.setattr(_wandering, "_STEP_SIZE", 1e30)
    assert "of step size 1e+30 diverges" in asked(network()).not_measured[NAME]
    monkeypatch.setattr(_wandering, "_MOST_NUMBERS", 10)
    assert "8 checkpoints are too large for a page" in asked(network()).not_measured[NAME]


def test_networks_side_by_side(tmp_path):
    sets = {"with": [network(0.5, seed=0), network(0.5, seed=1)], "without": network(0.0, seed=2)}
    found = dl.compare(sets, data(), loss, draws=5, directions=2, seed=0, measures=(NAME,))
    page = html.unescape(found.to_html(tmp_path / "page.html").read_text("utf-8"))
    assert TITLE in page
    assert "Of the first network of each set." in page


def test_a_loss_that_never_rises_e_fold_has_a_section_without_a_figure():
    """Nothing is found where no direction leaves the interval: the table says so with dashes."""
    far = measure.VarianceFlatness(
        torch.ones(3), torch.full((3,), math.inf), torch.full((3, 2), math.inf),
        dl.estimates.Estimate(math.nan, math.nan, 2), (), 1.0, math.e, 8, "off", 0, None,
    )  # fmt: skip
    told = LANDSCAPE[NAME]({"a": [_wandering.Wandering(far, 40, 0.01, 10, 30)]}, "nats")
    assert [type(block).__name__ for block in told.blocks] == ["Table"]
