"""Families against torch's own losses and against autograd."""

import math

import pytest
import torch
from torch import nn

from droplens.losses import family

n, C = 5, 4
generator = torch.Generator().manual_seed(0)


def randn(*shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


labels = torch.tensor([0, 3, 1, 1, 2])
token_labels = torch.tensor([[0, 3, 1], [1, -100, 2], [2, 2, 0], [3, 1, 1], [-100, 0, 2]])
class_weights = torch.tensor([0.5, 1.0, 2.0, 1.5], dtype=torch.float64)
positive = torch.tensor([2.0, 0.5, 1.0, 3.0], dtype=torch.float64)
coins = (randn(n, C) > 0).double()
soft = torch.softmax(randn(n, C), -1)
counts = torch.poisson(randn(n, C).exp(), generator=generator)

CASES = {
    "squared": (nn.MSELoss(), randn(n, C), randn(n, C)),
    "squared sum": (nn.MSELoss(reduction="sum"), randn(n, C), randn(n, C)),
    "squared 1-D": (nn.MSELoss(), randn(n), randn(n)),
    "cross-entropy": (nn.CrossEntropyLoss(), randn(n, C), labels),
    "cross-entropy sum": (nn.CrossEntropyLoss(reduction="sum"), randn(n, C), labels),
    "tokens, some ignored": (nn.CrossEntropyLoss(), randn(n, C, 3), token_labels),
    "own ignore_index": (nn.CrossEntropyLoss(ignore_index=1), randn(n, C), labels),
    "class weights": (nn.CrossEntropyLoss(weight=class_weights), randn(n, C), labels),
    "class weights, sum": (
        nn.CrossEntropyLoss(weight=class_weights, reduction="sum"),
        randn(n, C),
        labels,
    ),
    "label smoothing": (nn.CrossEntropyLoss(label_smoothing=0.2), randn(n, C), labels),
    "smoothing and weights": (
        nn.CrossEntropyLoss(weight=class_weights, label_smoothing=0.2),
        randn(n, C),
        labels,
    ),
    "soft labels": (nn.CrossEntropyLoss(weight=class_weights), randn(n, C), soft),
    "soft, smoothed": (nn.CrossEntropyLoss(label_smoothing=0.3), randn(n, C), soft),
    "binary": (nn.BCEWithLogitsLoss(), randn(n, C), coins),
    "binary, pos_weight": (nn.BCEWithLogitsLoss(pos_weight=positive), randn(n, C), coins),
    "binary, weight": (nn.BCEWithLogitsLoss(weight=positive), randn(n, C), coins),
    "poisson": (nn.PoissonNLLLoss(), randn(n, C), counts),
    "poisson sum, full": (nn.PoissonNLLLoss(reduction="sum", full=True), randn(n, C), counts),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


@cases
def test_the_loss_is_the_weighted_partition_minus_something_linear(case):
    """ℓ(f) − Σ w·A(f) has no curvature: its value at a midpoint is the mean of the ends."""
    loss, outputs, targets = case
    known = family(loss)
    weights = known.weights(outputs, targets)
    other = outputs + randn(*outputs.shape)

    def linear_part(f):
        return loss(f, targets) - (weights * known.log_partition(known.natural(f))).sum()

    middle = linear_part((outputs + other) / 2)
    torch.testing.assert_close(middle, (linear_part(outputs) + linear_part(other)) / 2)


@cases
def test_derivatives_of_the_partition(case):
    loss, outputs, _ = case
    known = family(loss)
    f = known.natural(outputs)
    term = f[0, 0].clone().requires_grad_()

    def partition(x):
        return known.log_partition(x.reshape(1, 1, -1)).sum()

    gradient = torch.autograd.functional.jacobian(partition, term)
    hessian = torch.autograd.functional.hessian(partition, term)
    torch.testing.assert_close(known.mean(f)[0, 0], gradient, atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(known.hessian(f)[0, 0], hessian, atol=1e-12, rtol=1e-10)


@cases
def test_divergence_is_the_bregman_divergence_of_the_partition(case):
    loss, outputs, _ = case
    known = family(loss)
    f = known.natural(outputs)
    step = randn(*f.shape)
    slope = (known.mean(f) * step).sum(-1)
    expected = known.log_partition(f + step) - known.log_partition(f) - slope
    torch.testing.assert_close(known.divergence(f, step), expected, atol=1e-12, rtol=1e-9)


def test_divergence_stays_accurate_for_tiny_and_for_huge_steps():
    known = family(nn.CrossEntropyLoss())
    f = torch.zeros(1, 1, 2)
    tiny = torch.tensor([[[1e-4, -1e-4]]])
    assert float(known.divergence(f, tiny)) == pytest.approx(0.5e-8, rel=1e-3)
    huge = torch.tensor([[[500.0, -500.0]]])
    assert float(known.divergence(f, huge)) == pytest.approx(500 - math.log(2), rel=1e-6)


@pytest.mark.parametrize("kind", ["residual", "probe"])
@pytest.mark.parametrize("case", [c for c in CASES if "sum" not in c])
def test_residuals_and_probes_have_mean_zero_and_the_hessian_as_covariance(case, kind):
    """z-bound at fixed sample size: 40,000 draws, 6 standard errors over all entries."""
    loss, outputs, _ = CASES[case]
    known = family(loss)
    f = known.natural(outputs)[:1, :1]
    draws = 40_000
    draw = getattr(known, kind)
    residual = draw(f.expand(draws, -1, -1).contiguous(), torch.Generator().manual_seed(1))[:, 0]
    error = residual.std(0) / draws**0.5
    assert bool((residual.mean(0).abs() <= 6 * error + 1e-12).all())
    products = residual.unsqueeze(-1) * residual.unsqueeze(-2)
    bound = 6 * products.std(0) / draws**0.5 + 1e-12
    assert bool(((products.mean(0) - known.hessian(f)[0, 0]).abs() <= bound).all())


@cases
def test_batches_average_by_the_normalizer(case):
    loss, outputs, targets = case
    known = family(loss)
    parts = [(outputs[:2], targets[:2]), (outputs[2:], targets[2:])]
    norms = [known.normalizer(f, y) for f, y in parts]
    values = [float(loss(f, y)) for f, y in parts]
    if loss.reduction == "sum":
        assert sum(values) == pytest.approx(float(loss(outputs, targets)))
    else:
        combined = sum(a * b for a, b in zip(norms, values, strict=True)) / sum(norms)
        assert combined == pytest.approx(float(loss(outputs, targets)))


@pytest.mark.parametrize(
    "logits",
    [
        [0.3, -1.0, 2.0, 0.0],
        [2.0, 1.0],
        [0.0, 0.0, 0.0],
        [800.0, 0.0, -800.0],
        [-800.0, 0.0, 800.0],
        [0.0, -745.0, -745.0, 1.0],
        [-math.inf, 3.0, 1.0],
        [3.0, -math.inf, 1.0],
        [3.0, 1.0, -math.inf],
        [-math.inf, 0.0, -math.inf],
    ],
    ids=str,
)
def test_roots_of_the_softmax_hessian_have_one_column_less(logits):
    """R Rᵀ = diag(π) − ππᵀ and d tr(R Rᵀ), also where classes have no probability at all."""
    f = torch.tensor([[logits]], dtype=torch.float64, requires_grad=True)
    root = family(nn.CrossEntropyLoss()).root(f)
    assert root.shape == (1, 1, len(logits), len(logits) - 1)
    share = torch.softmax(f, -1)
    expected = torch.diag_embed(share) - share.mT @ share
    torch.testing.assert_close(root @ root.mT, expected, rtol=1e-12, atol=1e-15)
    found, wanted = (
        torch.autograd.grad(trace, f)[0]
        for trace in (root.square().sum(), 1 - share.square().sum())
    )
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-15)


def test_one_class_has_nothing_to_lose():
    f = torch.zeros(2, 1, 1, dtype=torch.float64)
    assert not family(nn.CrossEntropyLoss()).hessian(f).any()


def test_unknown_losses_are_refused_by_name():
    with pytest.raises(TypeError, match="loss L1Loss is not one whose A"):
        family(nn.L1Loss())
    with pytest.raises(TypeError, match=r"write MSELoss\(\)"):
        family(nn.MSELoss)
    with pytest.raises(TypeError, match="loss str is not one"):
        family("cross_entropy")
    with pytest.raises(ValueError, match="reduction 'mean' or 'sum', but MSELoss has 'none'"):
        family(nn.MSELoss(reduction="none"))
    with pytest.raises(ValueError, match="let the network predict the log rate"):
        family(nn.PoissonNLLLoss(log_input=False))


BAD_TARGETS = {
    "label too large": (nn.CrossEntropyLoss(), randn(2, 3), torch.tensor([0, 3]), "label 3, but"),
    "label negative": (nn.CrossEntropyLoss(), randn(2, 3), torch.tensor([0, -1]), "label -1, but"),
    "wrong count": (nn.CrossEntropyLoss(), randn(2, 3), torch.tensor([0]), r"shape \(2,\)"),
    "all ignored": (nn.CrossEntropyLoss(), randn(1, 3), torch.tensor([-100]), "no label but"),
    "wrong shape": (nn.MSELoss(), randn(2, 3), randn(2), r"shape \(2, 3\), but got \(2,\)"),
    "NaN": (nn.MSELoss(), randn(1), torch.tensor([torch.nan]), "targets holds NaN or Inf"),
    "not a probability": (nn.BCEWithLogitsLoss(), randn(1), torch.tensor([2.0]), r"in \[0, 1\]"),
    "negative count": (nn.PoissonNLLLoss(), randn(1), torch.tensor([-1.0]), "counts of at least 0"),
    "label of 32 bits": (
        nn.CrossEntropyLoss(), randn(2, 3), torch.tensor([0, 1]).int(), r"int32.* with \.long\(\)"
    ),
    "label of one bit": (
        nn.CrossEntropyLoss(), randn(1, 2), torch.tensor([True]), r"torch\.bool, but CrossEntropy"
    ),
    "coins as labels": (
        nn.BCEWithLogitsLoss(), randn(1), torch.tensor([1]), r"int64, but BCE.* with \.float\(\)"
    ),
    "too few class weights": (
        nn.CrossEntropyLoss(weight=torch.ones(2)), randn(1, 3), torch.tensor([0]),
        r"class weights of shape \(2,\), but the outputs have 3 classes",
    ),
    "a negative class weight": (
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, -1.0])), randn(1, 2), torch.tensor([0]),
        r"class weights that are negative, NaN or Inf: \[1\.0, -1\.0\]",
    ),
    "too many weights of positives": (
        nn.BCEWithLogitsLoss(pos_weight=torch.ones(3)), randn(4, 2), torch.zeros(4, 2),
        r"pos_weight of shape \(3,\), which does not fit outputs of shape \(4, 2\)",
    ),
    "weights of another batch": (
        nn.BCEWithLogitsLoss(weight=torch.ones(6, 1)), randn(4, 2), torch.zeros(4, 2),
        r"weight of shape \(6, 1\), which does not fit .* in other batches",
    ),
    "soft, wrong shape": (nn.CrossEntropyLoss(), randn(2, 3), randn(2, 2), "class probabilities"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_TARGETS.values(), ids=BAD_TARGETS.keys())
def test_bad_targets_are_named(case):
    loss, outputs, targets, message = case
    with pytest.raises(ValueError, match=message):
        family(loss).check_targets(outputs, targets)


@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(weight=torch.ones(3)),
        nn.CrossEntropyLoss(ignore_index=0),
        nn.BCEWithLogitsLoss(pos_weight=torch.ones(3)),
    ],
    ids=["class weights", "ignore_index", "pos_weight"],
)
def test_targets_are_asked_for_where_they_weigh_examples(loss):
    with pytest.raises(ValueError, match="weighs examples by their targets; pass targets="):
        family(loss).weights(randn(2, 3), None)
