"""Gradient descent with one mask follows the modified flow to second order."""

import pytest
import torch
from torch import nn

from droplens.dynamics import frozen_mask_order
from tests.discovery.test_sites import assert_same_state, state_of
from tests.reference_dynamics import network, randn

x, y = randn(8, 2), randn(8, 2, seed=1)


@pytest.mark.parametrize(
    ("loss", "targets"), [(nn.MSELoss(), y), (nn.CrossEntropyLoss(), y[:, 0] > 0)]
)
def test_orders_two_and_one(loss, targets):
    targets = targets.long() if targets.dtype == torch.bool else targets
    net = network(sites=2, units=6).float()
    before = state_of(net)
    found = frozen_mask_order(net, x.float(), targets, loss, (0.05, 0.2, 0.1), seed=0)
    assert_same_state(before, state_of(net))
    assert found.step_sizes == (0.2, 0.1, 0.05)
    assert found.modified_order == pytest.approx(2, abs=0.15)
    assert found.plain_order == pytest.approx(1, abs=0.1)
    assert found.to_modified[0] < found.to_plain[0] / 3


def test_one_linear_weight_has_closed_forms():
    """R = a w²: descent multiplies by 1 − 2aε a step, the flows by exp(−2at), exp(−2a(1+aε)t)."""
    net = nn.Linear(1, 1, bias=False).double()
    nn.init.ones_(net.weight)
    one = torch.ones(1, 1, dtype=torch.float64)
    a = 1.0
    found = frozen_mask_order(net, one, 0 * one, nn.MSELoss(), (0.1, 0.05), seed=0)
    for size, modified, plain in zip(
        found.step_sizes, found.to_modified, found.to_plain, strict=True
    ):
        steps = torch.tensor(1 / size)
        end = (1 - 2 * a * size) ** round(1 / size)
        assert steps > 0
        assert plain == pytest.approx(abs(end - torch.tensor(-2.0 * a).exp().item()), rel=1e-3)
        flow = torch.tensor(-2 * a * (1 + a * size)).double().exp().item()
        assert modified == pytest.approx(abs(end - flow), rel=1e-2)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"step_sizes": (0.1,)}, ValueError, "at least two sizes, but got 1"),
        ({"step_sizes": (0.3, 0.1)}, ValueError, "divide time = 1.0, but 0.3 does not"),
        ({"step_sizes": (0.1, 0.0)}, ValueError, "but 0.0 does not"),
        ({"step_sizes": (0.1, "x")}, TypeError, "has to be a number, but got str"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        frozen_mask_order(network(), x, y, nn.MSELoss(), **arguments)
