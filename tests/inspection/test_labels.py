"""Labels that a loss ignores: in whole batches, in the last position of a language model."""

from typing import Literal

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import droplens as dl
from droplens.batches import Batch, as_batches, counted_parts

torch.manual_seed(0)
X = torch.randn(30, 6)
Y = X[:, :3].argmax(1)
TOKENS = torch.randint(0, 5, (6, 4))


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Dropout(0.3), nn.Linear(12, 3))


class TinyForCausalLM(nn.Module):
    """Called and answered as Hugging Face's causal language models are."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.read = nn.Embedding(5, 6), nn.Linear(6, 5)
        self.drop = nn.Dropout(0.3)

    def forward(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.read(self.drop(self.embed(tokens)))}


LOSSES = {
    "plain": nn.CrossEntropyLoss(ignore_index=0),
    "weighted": nn.CrossEntropyLoss(ignore_index=0, weight=torch.tensor([1.0, 2.0, 3.0])),
    "sum": nn.CrossEntropyLoss(ignore_index=0, reduction="sum"),
}


@pytest.fixture(params=LOSSES)
def loss(request: pytest.FixtureRequest) -> nn.Module:
    return LOSSES[request.param]


def with_an_ignored_batch() -> tuple[torch.Tensor, DataLoader]:  # type: ignore[type-arg]
    """Labels of which the first third are ignored, and the loader that puts these in one batch."""
    labels = Y.clone()
    labels[:10] = 0
    return labels, DataLoader(TensorDataset(X, labels), 10)


class TestABatchWithoutLabels:
    """Counts nothing: numbers are those of the data in one batch."""

    def test_inspect(self, loss: nn.Module):
        labels, loader = with_an_ignored_batch()
        found, whole = (
            dl.inspect(network(), data, loss, draws=4, directions=2, seed=0)
            for data in (loader, (X, labels))
        )
        net = network().eval()
        with torch.no_grad():
            assert found.base == pytest.approx(float(loss(net(X), labels)), rel=1e-6)
        assert found.examples == whole.examples == 30
        assert found.accuracy == whole.accuracy
        assert found.cost.gaussian == pytest.approx(whole.cost.gaussian, rel=1e-5)
        assert found.cost.base.value == pytest.approx(found.base, rel=1e-6)
        assert found.fisher.trace.value == pytest.approx(whole.fisher.trace.value, rel=1e-5)
        assert found.hessian.top_eigenvalues[0] == pytest.approx(
            float(whole.hessian.top_eigenvalues[0]), rel=1e-3
        )
        # Units are weighed on all inputs, whatever their labels.
        torch.testing.assert_close(found.equalization["2"].scores, whole.equalization["2"].scores)

    def test_parts_of_the_cost(self, loss: nn.Module):
        labels, loader = with_an_ignored_batch()
        net = network()
        found = dl.decompose(net, loader, None, loss, 2000, seed=0)
        whole = dl.decompose(net, X, labels, loss, 2000, seed=1)
        for name in ("gap", "spread", "shift"):
            one, other = getattr(found, name), getattr(whole, name)
            error = (one.standard_error**2 + other.standard_error**2) ** 0.5
            assert abs(one.value - other.value) < 4 * error
        assert found.base.value == pytest.approx(whole.base.value, rel=1e-6)

    @pytest.mark.parametrize("method", ["gaussian", "second_order"])
    def test_penalties(self, loss: nn.Module, method: Literal["gaussian", "second_order"]):
        labels, loader = with_an_ignored_batch()
        net = network()
        found = dl.penalty(net, loader, loss, method)
        whole = dl.penalty(net, X, loss, method, targets=labels)
        torch.testing.assert_close(found.total, whole.total.detach())
        torch.testing.assert_close(found.by_site["2"], whole.by_site["2"].detach())
        assert found.divisor == whole.divisor

    @pytest.mark.parametrize("method", ["sampled", "masks"])
    def test_sampled_penalties(self, loss: nn.Module, method: Literal["sampled", "masks"]):
        labels, loader = with_an_ignored_batch()
        net = network()
        found = dl.penalty(net, loader, loss, method, draws=400, seed=0)
        whole = dl.penalty(net, X, loss, method, targets=labels, draws=400, seed=1)
        error = (found.standard_error**2 + whole.standard_error**2) ** 0.5
        assert 0 < abs(float(found) - float(whole)) < 4 * error

    def test_curves_and_training(self, loss: nn.Module):
        labels, loader = with_an_ignored_batch()
        net = network()
        found = dl.penalty_curve(net, loader, loss, [0.2, 0.5]).total
        torch.testing.assert_close(
            found, dl.penalty_curve(net, X, loss, [0.2, 0.5], targets=labels).total
        )
        parts = dl.modified_loss(net, loader, None, loss, 0.1, 400, seed=0)
        whole = dl.modified_loss(net, X, labels, loss, 0.1, 400, seed=1)
        assert parts.risk.value == pytest.approx(whole.risk.value, rel=1e-9)
        one, other = parts.implicit, whole.implicit
        error = (one.standard_error**2 + other.standard_error**2) ** 0.5
        assert abs(one.value - other.value) < 4 * error
        gap = dl.explain_gap(net, loader, loader, loss, draws=4, seed=0)
        assert abs(gap.generalization.value) < 1e-6

    def test_measures(self, loss: nn.Module):
        labels, loader = with_an_ignored_batch()
        net, data = network(), [(X, labels)]
        for measure in (dl.measure.flatness, dl.measure.sharpness):
            found = measure(net, loader, loss, directions=2, seed=0)
            whole = measure(net, data, loss, directions=2, seed=0)
            assert found.base == pytest.approx(whole.base, rel=1e-5)


@pytest.mark.parametrize("data", ["a pair", "a loader"])
def test_without_any_label_there_is_no_loss(data: str):
    none = torch.zeros_like(Y)
    given = (X, none) if data == "a pair" else DataLoader(TensorDataset(X, none), 10)
    with pytest.raises(ValueError, match="no label but ignore_index"):
        dl.inspect(network(), given, LOSSES["plain"], draws=4, directions=2, seed=0)


def test_a_loss_that_ignores_nothing_sees_every_batch():
    _, loader = with_an_ignored_batch()
    assert len(list(as_batches(loader, loss=nn.MSELoss()))) == 3
    assert len(list(as_batches(loader, loss=nn.CrossEntropyLoss()))) == 3
    assert len(list(as_batches(loader, loss=LOSSES["plain"]))) == 2


def test_parts_without_labels_are_left_out():
    labels, _ = with_an_ignored_batch()
    sizes = [len(p.inputs) for p in counted_parts(Batch(X, labels), 8, LOSSES["plain"])]
    assert sizes == [8, 8, 6]


@pytest.mark.parametrize("ignored", [-100, 0, 2])
def test_the_last_token_has_the_label_that_the_loss_ignores(ignored: int):
    net, loss = TinyForCausalLM(), nn.CrossEntropyLoss(ignore_index=ignored)
    data = DataLoader([{"tokens": row, "labels": row} for row in TOKENS], 6)
    found = dl.inspect(net, data, loss, draws=4, directions=1, seed=0)
    with torch.no_grad():
        logits = net.eval()(TOKENS)["logits"][:, :-1]
    expected = float(loss(logits.flatten(0, 1), TOKENS[:, 1:].flatten()))
    assert found.base == pytest.approx(expected, rel=1e-6)
    assert dl.decompose(net, data, None, loss, 4, seed=0).base.value == pytest.approx(expected)
    (batch,) = as_batches(data, net, loss)
    priced = dl.penalty(net, batch.inputs, loss, targets=batch.targets)
    torch.testing.assert_close(dl.penalty(net, data, loss).total, priced.total.detach())
    flat = dl.measure.flatness(net, data, loss, directions=1, seed=0)
    assert flat.base == pytest.approx(expected, rel=1e-6)


def test_a_loss_that_counts_every_position_says_what_is_missing():
    loss = dl.losses.from_log_partition(lambda f: torch.logsumexp(f, -1), layout="classes")
    with pytest.raises(ValueError, match=r"the label -100.*counts every position"):
        dl.inspect(TinyForCausalLM(), {"tokens": TOKENS, "labels": TOKENS}, loss, draws=4)
