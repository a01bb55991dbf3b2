"""Products with second derivatives take large batches in parts, where that changes nothing."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from droplens import measure
from droplens.batches import as_batches
from droplens.measure import _operators
from tests.reference_measure import dense_hessian

CE = nn.CrossEntropyLoss()


def network(p=0.0, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(p), nn.Linear(6, 3)).double()


def examples(n=300):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (n,), generator=generator)


@pytest.fixture
def lengths(monkeypatch):
    """How many examples the products were given at a time."""
    seen = []
    real = _operators.predictions

    def spy(model, inputs):
        outputs = real(model, inputs)
        seen.append(len(outputs))
        return outputs

    monkeypatch.setattr(_operators, "predictions", spy)
    return seen


def top_and_trace(model, data, loss=CE, **options):
    found = measure.hessian(model, data, loss, 2, seed=0, **options)
    return [*found.top_eigenvalues.tolist(), float(found.trace)]


@pytest.mark.parametrize(
    "loss", [CE, nn.CrossEntropyLoss(reduction="sum"), nn.CrossEntropyLoss(torch.rand(3).double())]
)
def test_parts_add_up(loss, lengths):
    model, (x, y) = network(), examples()
    H = dense_hessian(model.eval(), x, y, loss)
    found = top_and_trace(model, [(x, y)], loss)
    assert set(lengths) == {75}
    truth = [*torch.linalg.eigvalsh(H).flip(0)[:2].tolist(), float(H.trace())]
    torch.testing.assert_close(found, truth, rtol=1e-8, atol=1e-10)


def test_parts_of_the_fisher_matrix_add_up(lengths):
    model, (x, y) = network(), examples()
    found = measure.fisher_spectrum(model, [(x, y)], CE, 2, seed=0)
    assert set(lengths) == {75}
    whole = measure.fisher_spectrum(model, (x, y), CE, 2, seed=0)
    torch.testing.assert_close(found.top_eigenvalues, whole.top_eigenvalues, rtol=1e-8, atol=0)
    assert float(found.trace) == pytest.approx(float(whole.trace), rel=1e-9)


def test_a_part_whose_labels_are_all_ignored_counts_for_nothing(lengths):
    model, (x, y) = network(), examples()
    y[:80] = -100
    found = top_and_trace(model, [(x, y)])
    assert 75 in lengths
    torch.testing.assert_close(found, top_and_trace(model, [(x[80:], y[80:])]), rtol=1e-8, atol=0)


def test_labels_that_are_all_ignored_are_refused():
    x, y = examples()
    with pytest.raises(ValueError, match="no label but ignore_index"):
        top_and_trace(network(), [(x, torch.full_like(y, -100))])


class Accumulated(nn.Module):
    """The first axis is time: every prediction depends on the inputs before it."""

    def __init__(self):
        super().__init__()
        self.inner = network()

    def forward(self, x):
        return self.inner(x.cumsum(0) / 9)


class OneLength(nn.Module):
    """A forward that knows one number of examples only."""

    def __init__(self):
        super().__init__()
        self.inner = network()

    def forward(self, x):
        return self.inner(x.view(300, 4))


@pytest.mark.parametrize("model", [Accumulated(), OneLength()])
def test_examples_that_depend_on_one_another_stay_together(model, lengths):
    x, y = examples()
    H = dense_hessian(model.eval(), x, y, CE)
    found = top_and_trace(model, [(x, y)])
    assert set(lengths) == {300}
    assert found[-1] == pytest.approx(float(H.trace()), rel=1e-8)


def test_a_loss_that_is_not_known_sees_the_whole_batch(lengths):
    model, (x, y) = network(), examples()

    def largest(outputs, targets):
        return F.cross_entropy(outputs, targets, reduction="none").square().mean().sqrt()

    found = top_and_trace(model, [(x, y)], largest)
    assert set(lengths) == {300}
    torch.testing.assert_close(found, top_and_trace(model, as_batches((x, y)), largest))


def test_every_part_has_its_own_masks(lengths):
    """Parts with masks of their own estimate what batches as small as they do."""
    model, (x, y) = network(0.5), examples()
    parts = measure.hessian(model, [(x, y)], CE, 0, "expected", draws=40, seed=0).trace
    assert set(lengths) == {75}
    lengths.clear()
    small = [(x[k : k + 60], y[k : k + 60]) for k in range(0, 300, 60)]
    batches = measure.hessian(model, small, CE, 0, "expected", draws=40, seed=1).trace
    assert set(lengths) == {60}
    error = (parts.standard_error**2 + batches.standard_error**2) ** 0.5
    assert abs(float(parts) - float(batches)) < 4 * error
