"""Costs of which a part cannot be told: a loss without A(f), a network without derivatives."""

import html
import json
import math

import pytest
import torch
from torch import nn

import droplens as dl
from droplens.inspection._cost_verdicts import cost_verdicts

torch.manual_seed(0)
X = torch.randn(30, 6)
Y = X[:, :3].argmax(1)
Z = torch.rand(30, 3) * 4


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(6, 12), nn.Tanh(), nn.Dropout(0.3), nn.Linear(12, 8), nn.Dropout(0.1),
        nn.Linear(8, 3),
    )  # fmt: skip


def softmax_hessian(f: torch.Tensor) -> torch.Tensor:
    pi = torch.softmax(f, -1)
    return torch.diag_embed(pi) - pi.unsqueeze(-1) * pi.unsqueeze(-2)


def by_hessian(reduction: str = "mean") -> nn.Module:
    """Cross-entropy, of which the library is told the Hessian alone."""
    return dl.losses.from_output_hessian(
        nn.CrossEntropyLoss(reduction=reduction),
        softmax_hessian,
        layout="classes",
        reduction=reduction,
    )


HUBER = dl.losses.from_output_hessian(nn.HuberLoss(), lambda f: torch.ones_like(f).unsqueeze(-1))


class TestALossWithoutItsPartition:
    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    def test_its_gap_is_that_of_the_same_loss_with_it(self, reduction: str):
        net, known = network(), nn.CrossEntropyLoss(reduction=reduction)
        found = dl.decompose(net, X, Y, by_hessian(reduction), 20, seed=3)
        truth = dl.decompose(net, X, Y, known, 20, seed=3)
        assert found.base.value == pytest.approx(truth.base.value, rel=1e-12)
        rows = zip([found, *found.by_site.values()], [truth, *truth.by_site.values()], strict=True)
        for one, other in rows:
            assert one.gap.value == pytest.approx(other.gap.value, rel=1e-9)
            assert one.gap.standard_error == pytest.approx(other.gap.standard_error, rel=1e-9)
            assert one.gap.n == 20
            assert all(math.isnan(part.value) for part in (one.spread, one.shift))
            assert all(math.isnan(part.standard_error) for part in (one.spread, one.shift))
        assert "without the A(f)" in found.notes[0]
        assert truth.notes == ()

    def test_batches_of_a_loader_add_up(self):
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Z), 10)
        net = network()
        found = dl.decompose(net, loader, None, HUBER, 400, seed=0)
        whole = dl.decompose(net, X, Z, HUBER, 400, seed=1)
        error = math.hypot(found.gap.standard_error, whole.gap.standard_error)
        assert abs(found.gap.value - whole.gap.value) < 4 * error
        assert found.notes == whole.notes
        assert found.divisor == whole.divisor == 90

    def test_the_gap_is_the_mean_loss_under_masks_minus_the_loss(self):
        net = network()
        found = dl.decompose(net, X, Z, HUBER, 2000, seed=0)
        loss = nn.HuberLoss()
        with torch.no_grad():
            base = float(loss(net.eval()(X), Z))
            net.train()
            torch.manual_seed(5)
            gaps = torch.tensor([float(loss(net(X), Z)) - base for _ in range(2000)])
        error = math.hypot(float(gaps.std()) / 2000**0.5, found.gap.standard_error)
        assert abs(found.gap.value - float(gaps.mean())) < 4 * error
        assert found.base.value == pytest.approx(base, rel=1e-6)

    def test_the_page_gives_gap_and_second_order_and_says_what_is_open(self, tmp_path):
        net = network()
        found = dl.inspect(net, (X, Z), HUBER, draws=20, directions=2, seed=0)
        cost = found.cost
        assert cost.gap.standard_error > 0
        assert math.isnan(cost.spread.value)
        second = dl.penalty(net, X, HUBER, "second_order")
        assert cost.second_order == pytest.approx(float(second), rel=1e-6)
        for name, value in second.by_site.items():
            assert cost.by_site[name].second_order == pytest.approx(value.item(), rel=1e-6)
        assert cost.gaussian is None
        assert "without the A(f)" in found.not_measured["spread and shift"]
        assert "output Hessian alone" in found.not_measured["Gaussian value of the spread"]
        assert found.unit == "units of the loss"
        assert [v.id for v in found.verdicts if v.id in {"cost", "split", "approximation"}] == [
            "cost"
        ]
        page = html.unescape(found.to_html(tmp_path / "page.html").read_text("utf-8"))
        assert "What dropout costs, by site" in page
        assert "without the A(f)" in page
        told = (tmp_path / "page.json").read_text("utf-8")
        assert "NaN" not in told
        numbers = json.loads(told)["numbers"]["cost"]
        assert numbers["gap"]["value"] == cost.gap.value
        assert numbers["second_order"] == cost.second_order
        assert numbers["spread"]["value"] is None
        assert "spread and shift" in str(found)

    def test_sets_of_networks_are_compared_by_their_gaps(self):
        sets = {"one": [network(), network()], "other": [network()]}
        found = dl.compare(sets, (X, Z), HUBER, draws=5, directions=2, seed=0)
        assert found.costs["one"].gap.value == pytest.approx(found.costs["other"].gap.value)
        assert math.isnan(found.costs["one"].spread.value)
        assert "spread and shift" in " ".join(found.not_measured)
        assert found.to_document().to_dict()["numbers"]["costs"]["one"]["second_order"] > 0


class Overwrites(nn.Module):
    """Writes into the input of a dropout after that has read it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.first, self.drop, self.last = nn.Linear(6, 12), nn.Dropout(0.3), nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        dropped = self.drop(h)
        h += 1
        return self.last(dropped + h)


class MixesExamples(Overwrites):
    """Normalises by its batch also in eval."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(12, track_running_stats=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.drop(self.norm(self.first(x))))


@pytest.mark.parametrize(
    ("net", "why"),
    [(Overwrites, "writes into a tensor"), (MixesExamples, "without running statistics")],
)
def test_what_a_penalty_refuses_does_not_stop_the_masks(net, why: str, tmp_path):
    loss = nn.CrossEntropyLoss()
    found = dl.inspect(net(), (X, Y), loss, draws=20, directions=2, seed=0)
    truth = dl.decompose(net(), X, Y, loss, 2000, seed=0)
    cost = found.cost
    for one, other in ((cost.gap, truth.gap), (cost.spread, truth.spread)):
        error = math.hypot(one.standard_error, other.standard_error)
        assert abs(one.value - other.value) < 4 * error
    assert cost.second_order is None
    assert cost.gaussian is None
    for value in ("second-order", "Gaussian"):
        assert why in found.not_measured[f"{value} value of the spread"]
    assert {"cost", "split"} <= {verdict.id for verdict in found.verdicts}
    assert found.hessian is not None
    assert found.flatness is not None
    page = html.unescape(found.to_html(tmp_path / "page.html").read_text("utf-8"))
    assert why in page
    assert (
        json.loads((tmp_path / "page.json").read_text("utf-8"))["numbers"]["cost"]["second_order"]
        is None
    )


def test_what_only_the_masks_refuse_still_stops():
    with pytest.raises(ValueError, match="inputs holds NaN"):
        dl.inspect(network(), (X / 0, Y), nn.CrossEntropyLoss(), draws=4, directions=1)


def test_a_cost_without_a_second_order_value_has_no_approximation_to_judge():
    from dataclasses import replace

    cost = dl.inspect(network(), (X, Y), nn.CrossEntropyLoss(), draws=4, directions=1).cost
    assert "approximation" in {v.id for v in cost_verdicts(cost, "nats")}
    without = replace(cost, second_order=None)
    assert "approximation" not in {v.id for v in cost_verdicts(without, "nats")}
