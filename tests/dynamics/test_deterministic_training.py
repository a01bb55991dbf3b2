"""Digits trained with dropout and without a mask: where the same comes out, and where not."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import droplens as dl
from droplens.data import digits

split = digits()
x, y = split.train.inputs[:200], split.train.targets[:200]


def mlp(first=0.0, last=0.5):
    return nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Dropout(first), nn.Linear(128, 128), nn.ReLU(),
        nn.Dropout(last), nn.Linear(128, 10),
    )  # fmt: skip


def cnn():
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(12, 24, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5),
        nn.Linear(384, 10),
    )  # fmt: skip


def trained(build, loss, targets, seed, deterministic, steps=500, size=0.03):
    """Full-batch descent with momentum: small steps, so that the masks' noise averages out."""
    torch.manual_seed(seed)
    net = build().train()
    torch.manual_seed(100 + seed)
    objective = dl.replace_dropout(net, loss)
    optimizer = torch.optim.SGD(net.parameters(), lr=size, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        value = objective(x, targets) if deterministic else loss(net(x), targets)
        value.backward()
        optimizer.step()
    return net


def outcome(build, loss, targets, deterministic, seeds=2):
    """Accuracy on unseen digits, R_S and R_1, means over seeds."""
    rows = []
    for seed in range(seeds):
        net = trained(build, loss, targets, seed, deterministic).eval()
        parts = dl.decompose(net, x, targets, loss, 400, sites=[], seed=seed)
        right = (net(split.test.inputs).argmax(1) == split.test.targets).double().mean()
        rows.append([float(right), parts.base.value, parts.gap.value])
    return torch.tensor(rows).mean(0).tolist()


CASES = {
    # exact: the objective is the mean of the dropout loss
    "MLP, squared loss, last layer": (mlp, nn.MSELoss(), F.one_hot(y, 10).float(), 0.03),
    # affine in the gates: no shift, and output noise that is nearly Gaussian
    "MLP, cross-entropy, last layer": (mlp, nn.CrossEntropyLoss(), y, 0.12),
    "CNN, cross-entropy, last layer": (cnn, nn.CrossEntropyLoss(), y, 0.12),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_accuracy_loss_and_explicit_term_are_those_of_dropout(case):
    build, loss, targets, tolerance = case
    with_masks = outcome(build, loss, targets, False)
    without = outcome(build, loss, targets, True)
    assert abs(without[0] - with_masks[0]) <= 0.015
    assert without[1:] == pytest.approx(with_masks[1:], rel=tolerance)


@pytest.mark.slow
def test_dropout_before_a_hidden_layer_is_not_replaced_to_a_few_percent():
    """There outputs are not affine in the gates: accuracy holds, R_1 comes out higher."""

    def build():
        return mlp(0.5, 0.5)

    with_masks = outcome(build, nn.CrossEntropyLoss(), y, False)
    without = outcome(build, nn.CrossEntropyLoss(), y, True)
    assert abs(without[0] - with_masks[0]) <= 0.015
    assert with_masks[2] < without[2] < 2 * with_masks[2]
