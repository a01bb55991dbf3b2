"""Data that a page cannot be made of, however many passes it takes to see that."""

import html
import re

import numpy as np
import pytest
import torch
from torch import nn

import droplens as dl
from tests.inspection.test_inspect import data, loss, network

x, y = data()


class Subset:
    """A loader that shuffles by a stream of its own and drops its last batch."""

    def __init__(self) -> None:
        self.stream = np.random.default_rng(0)

    def __iter__(self):
        order = torch.from_numpy(self.stream.permutation(len(x)))
        for rows in order[:30].split(15):
            yield x[rows], y[rows]


class Shuffled(Subset):
    """The same examples in another order every pass."""

    def __iter__(self):
        order = torch.from_numpy(self.stream.permutation(len(x)))
        for rows in order.split(15):
            yield x[rows], y[rows]


def test_a_loader_that_gives_other_examples_every_pass_is_refused():
    with pytest.raises(ValueError, match=r"data changes between passes .* use shuffle=False"):
        dl.inspect(network(), Subset(), loss, draws=3, directions=1)
    with pytest.raises(ValueError, match="data changes between passes"):
        dl.compare({"a": network(), "b": network(0.1)}, Subset(), loss, draws=3, directions=1)


def test_another_order_of_the_same_examples_is_none_of_our_business():
    seen = dl.inspect(network(), Shuffled(), loss, draws=3, directions=1, seed=0)
    whole = dl.inspect(network(), (x, y), loss, draws=3, directions=1, seed=0)
    assert seen.base == pytest.approx(whole.base, rel=1e-6)
    assert seen.cost.gaussian == pytest.approx(whole.cost.gaussian, rel=1e-5)
    assert seen.hessian is not None


weighted = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]))


@pytest.mark.parametrize(
    "criterion",
    [
        weighted,
        nn.CrossEntropyLoss(ignore_index=0),
        nn.BCEWithLogitsLoss(pos_weight=torch.tensor([2.0])),
    ],
)
def test_targets_are_asked_for_where_they_weigh_examples(criterion):
    with pytest.raises(ValueError, match=r"weighs examples by their targets; pass targets="):
        dl.penalty(network(), x, criterion)
    with pytest.raises(ValueError, match=r"weighs examples by their targets; pass targets="):
        dl.measure.fisher(network(), x, criterion)


def test_weights_that_are_all_zero_are_refused():
    weightless = nn.CrossEntropyLoss(weight=torch.zeros(3))
    with pytest.raises(ValueError, match="the loss weighs every one of the targets by zero"):
        dl.inspect(network(), (x, y), weightless, draws=3, directions=1)


def test_weighted_examples_are_measured_with_their_targets():
    seen = dl.inspect(network(), (x, y), weighted, draws=3, directions=1, seed=0)
    expected = float(dl.penalty(network(), x, weighted, targets=y))
    assert seen.cost.gaussian == pytest.approx(expected, rel=1e-5)


class ManyClasses(nn.Module):
    """More natural parameters than an exact penalty goes through in passing."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.drop, self.layer = nn.Dropout(0.5), nn.Linear(6, 2100)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(self.drop(x))


def test_what_takes_too_many_passes_is_named(tmp_path):
    seen = dl.inspect(ManyClasses(), (x[:4], y[:4]), loss, draws=3, directions=1, seed=0)
    assert seen.cost.gaussian is None
    assert seen.cost.gap.value != 0
    reason = seen.not_measured["Gaussian value of the spread"]
    assert "it takes 2,100 backward passes over every batch" in reason
    exact = float(dl.penalty(ManyClasses(), x[:4], loss, "second_order"))
    assert seen.cost.second_order_error > 0
    assert abs(seen.cost.second_order - exact) <= 4 * seen.cost.second_order_error
    assert seen.fisher.method == "sampled"
    assert seen.fisher.trace.standard_error > 0
    page = seen.to_html(tmp_path / "page.html").read_text("utf-8")
    assert "Over labels drawn from the model" in page
    assert "2,100 backward passes" in page
    assert {v.id for v in seen.verdicts} >= {"cost", "split"}
    assert "approximation" not in {v.id for v in seen.verdicts}


def test_large_outputs_are_drawn_in_parts(monkeypatch):
    """Parts have masks of their own; everything that draws none is the same."""
    from droplens.inspection import _sizes

    whole = dl.inspect(network(), (x, y), loss, draws=50, directions=1, seed=0)
    monkeypatch.setattr(_sizes, "_MOST_NUMBERS", 50 * 3 * 7)
    parts = dl.inspect(network(), (x, y), loss, draws=50, directions=1, seed=0)
    assert parts.cost.gaussian == pytest.approx(whole.cost.gaussian, rel=1e-5)
    assert parts.cost.base.value == pytest.approx(whole.cost.base.value, rel=1e-5)
    error = (parts.cost.gap.standard_error**2 + whole.cost.gap.standard_error**2) ** 0.5
    assert 0 < abs(parts.cost.gap.value - whole.cost.gap.value) <= 4 * error


def test_many_sites_share_a_sentence():
    blocks = [nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Dropout(0.1)) for _ in range(6)]
    net = nn.Sequential(*blocks, nn.Linear(6, 3))
    seen = dl.inspect(net, (x, y), loss, draws=3, directions=1, seed=0)
    (verdict,) = [v for v in seen.verdicts if v.id.startswith("equalisation")]
    shares = [e.participation / len(e.scores) for e in seen.equalization.values()]
    assert len(shares) == 6
    assert verdict.measured.value == pytest.approx(min(shares))
    assert f"at {sum(s >= 0.9 for s in shares)} of 6 sites" in verdict.sentence


def test_few_strong_units_are_named():
    net = network(0.4)
    with torch.no_grad():
        net[6].weight.mul_(6)
        net[6].weight[:, 2:] = 0
    seen = dl.inspect(net, (x, y), loss, draws=200, directions=1, seed=0)
    assert seen.cost.participation["5"] < 3
    (verdict,) = [v for v in seen.verdicts if v.id == "approximation"]
    assert re.search(r"noise at '5' is that of about \d\.\d equal coins", verdict.sentence)


def test_few_masks_may_not_see_the_spread():
    from dataclasses import replace

    from droplens.estimates import Estimate
    from droplens.inspection._cost_verdicts import approximation_verdict

    cost = dl.inspect(network(), (x, y), loss, draws=3, directions=1, seed=0).cost
    unseen = replace(cost, spread=Estimate(-1e-4, 2e-4, 3))
    verdict = approximation_verdict(unseen)
    assert verdict.outcome == "cannot conclude"
    assert "cannot be told from zero" in verdict.sentence
    assert "nan" not in verdict.sentence


class Bag(nn.Module):
    """Classes from the mean of a few tokens."""

    def __init__(self, table, mean):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.mean = table, mean
        self.drop, self.layer = nn.Dropout(0.2), nn.Linear(6, 3)

    def forward(self, tokens):
        h = self.table(tokens)
        return self.layer(self.drop(h.mean(1) if self.mean else h))


REASONS = {
    "bag": (
        nn.EmbeddingBag(9, 6), False, "which torch cannot do through nn.EmbeddingBag",
        "with an nn.Embedding of the same weight",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REASONS.values(), ids=REASONS)
def test_a_missing_second_derivative_is_told_in_our_words(case, tmp_path):
    table, mean, reason, advice = case
    tokens = torch.randint(9, (len(y), 4), generator=torch.Generator().manual_seed(0))
    asked = ("spectral_density", "gradient_noise")
    found = dl.inspect(
        Bag(table, mean), (tokens, y), loss, draws=3, directions=1, measures=asked, seed=0
    )
    for name in ("Hessian", *asked):
        said = found.not_measured.get(name)
        if name == "gradient_noise" and not mean:  # it takes one derivative, which a bag has
            assert said is None
            continue
        assert reason in said
        assert advice in said
        assert said.endswith(")")
        assert len(said) < 300
    assert re.search(r"not implemented[^()]*\)$", found.not_measured["Hessian"])
    assert found.cost is not None
    page = found.to_html(tmp_path / "page.html").read_text("utf-8")
    assert reason in html.unescape(page)


def test_sparse_gradients_are_measured_as_dense_ones():
    tokens = torch.randint(9, (len(y), 4), generator=torch.Generator().manual_seed(0))
    asked = ("spectral_density", "gradient_noise", "alignment", "modified_loss")
    pages = []
    for sparse in (True, False):
        torch.manual_seed(1)
        net = Bag(nn.Embedding(9, 6, sparse=sparse), True)
        found = dl.inspect(net, (tokens, y), loss, draws=8, directions=2, measures=asked, seed=0)
        assert net.table.sparse is sparse
        assert {"Hessian", *asked}.isdisjoint(found.not_measured)
        pages.append(found.to_dict()["numbers"])
    assert pages[0] == pages[1]


def test_other_refusals_are_kept_and_told_apart():
    from droplens.inspection._attempt import attempt

    def raises(error):
        raise error

    said = {}
    for name, error in {
        "own": RuntimeError("5 did not converge"),
        "once": RuntimeError("its backward is marked once_differentiable"),
        "value": ValueError("sparse targets"),
    }.items():
        assert attempt(said, name, lambda error=error: raises(error)) is None
    assert said["own"] == "it cannot be computed for this network: 5 did not converge"
    assert said["once"].startswith("it differentiates the network twice, which torch cannot")
    assert said["once"].endswith("(its backward is marked once_differentiable)")
    assert said["value"] == "sparse targets"
