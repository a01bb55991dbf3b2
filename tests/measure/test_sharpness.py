import math

import pytest
import torch
from torch import nn

from droplens import measure
from tests.reference_measure import dense_hessian

MSE = nn.MSELoss()


def linear():
    torch.manual_seed(0)
    return nn.Linear(3, 2).double()


def examples(model):
    x = torch.randn(9, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        return x, model(x)


def test_in_a_bowl_the_increase_is_half_the_trace():
    """E L(θ + ε) − L(θ) = σ²/2 · tr H, exactly where L is quadratic."""
    model = linear()
    x, y = examples(model)
    H = dense_hessian(model, x, y, MSE)
    found = measure.sharpness(model, (x, y), MSE, (0.1, 0.5), (0.2,), directions=400, seed=0)
    for level, rise in zip(found.absolute, found.raw, strict=True):
        truth = level**2 / 2 * float(H.trace())
        assert abs(rise.value - truth) < 4 * rise.standard_error
        assert rise.n == 400
        assert rise.over == "directions"
    # Names are in order: bias first? The weight's block is what scale-free noise touches.
    sizes = model.weight.detach().square().mean(1).repeat_interleave(3)
    names = [name for name, _ in model.named_parameters()]
    start = 0 if names[0] == "weight" else 2
    diagonal = H.diagonal()[start : start + 6]
    truth = 0.2**2 / 2 * float(sizes @ diagonal)
    assert abs(found.scale_free[0].value - truth) < 4 * found.scale_free[0].standard_error
    assert found.base == pytest.approx(0, abs=1e-20)


def test_pairs_have_no_linear_term():
    """A linear loss rises by nothing on average, pair by pair."""

    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.theta = nn.Parameter(torch.ones(4, dtype=torch.float64))

        def forward(self, x):
            return x @ self.theta

    x = torch.ones(3, 4, dtype=torch.float64)
    found = measure.sharpness(Linear(), (x, x[:, 0]), lambda f, y: f.mean(), (0.5,), ())
    assert abs(found.raw[0].value) < 1e-12


def test_rescaling_a_rectified_network_changes_the_raw_value_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6, bias=False), nn.ReLU(), nn.Linear(6, 2, bias=False))
    model = model.double()
    x = torch.randn(9, 3, dtype=torch.float64)
    y = torch.randint(2, (9,))
    loss = nn.CrossEntropyLoss()
    before = measure.sharpness(model, (x, y), loss, (0.1,), (0.1,), seed=0)
    relative = measure.hessian(model, (x, y), loss, 1).relative_trace
    trace = measure.hessian(model, (x, y), loss, 1).trace
    with torch.no_grad():
        model[0].weight.mul_(4)
        model[2].weight.div_(4)
    after = measure.sharpness(model, (x, y), loss, (0.1,), (0.1,), seed=0)
    assert after.scale_free[0].value == pytest.approx(before.scale_free[0].value, rel=1e-9)
    assert after.raw[0].value > 2 * before.raw[0].value
    assert float(measure.hessian(model, (x, y), loss, 1).relative_trace) == pytest.approx(
        float(relative)
    )
    assert float(measure.hessian(model, (x, y), loss, 1).trace) != pytest.approx(float(trace))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"absolute": (0.0,)}, ValueError, "absolute has to hold positive levels"),
        ({"relative": (math.inf,)}, ValueError, "relative has to hold positive levels"),
        ({"relative": "many"}, TypeError, "relative has to be a sequence of levels"),
        ({"directions": 1}, ValueError, "directions has to be at least 2, but got 1"),
    ],
)
def test_bad_input_is_refused(options, error, message):
    model = linear()
    with pytest.raises(error, match=message):
        measure.sharpness(model, examples(model), MSE, **options)
    with pytest.raises(ValueError, match="no parameters that require gradients"):
        measure.sharpness(model.requires_grad_(False), examples(model), MSE)
