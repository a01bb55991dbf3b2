import math
import weakref
from collections.abc import Mapping
from typing import ClassVar

import pytest
import torch
from torch import nn

from droplens import measure
from droplens.measure import _trajectory
from droplens.measure._trajectory import principal_directions

MSE = nn.MSELoss()


class Bowl(nn.Module):
    """Loss ¹⁄₂ Σ h_i θ_i² + 1 about the origin, whatever the data."""

    def __init__(self, curvatures):
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(len(curvatures), dtype=torch.float64))
        self.register_buffer("root", torch.tensor(curvatures, dtype=torch.float64).sqrt())

    def forward(self, x):
        return (self.theta * self.root).expand(len(x), -1)


def loss(outputs, targets):
    return 0.5 * outputs.square().sum(1).mean() + 1


DATA = (torch.zeros(4, 1, dtype=torch.float64), torch.zeros(4))


def walk(variances, steps=40, seed=0):
    """Checkpoints along the axes, of given variances, uncorrelated by construction."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(steps, len(variances), generator=generator, dtype=torch.float64)
    noise = noise - noise.mean(0)
    q, _ = torch.linalg.qr(noise)
    states = q * math.sqrt(steps - 1) * torch.tensor(variances, dtype=torch.float64).sqrt()
    return [{"theta": state} for state in states]


def test_a_bowl_has_the_widths_of_its_curvatures_and_the_slope_of_its_law():
    """½hδ² + 1 ≤ e: F = 2√(2(e − 1)/h); σ² = F^−2 gives slope −2 without error."""
    curvatures = [0.5, 1.0, 2.0, 4.0]
    widths = [2 * math.sqrt(2 * (math.e - 1) / h) for h in curvatures]
    variances = [w**-2 for w in widths]
    model = Bowl(curvatures)
    found = measure.variance_flatness(model, walk(variances), DATA, loss, 4)
    torch.testing.assert_close(found.variance.tolist(), sorted(variances, reverse=True))
    torch.testing.assert_close(found.flatness.tolist(), sorted(widths), rtol=1e-5, atol=0)
    torch.testing.assert_close(found.ends[:, 0], -found.ends[:, 1])
    assert found.slope.value == pytest.approx(-2, rel=1e-4)
    assert found.slope.standard_error < 1e-3
    assert found.slope.n - 1 == 2
    assert found.base == 1
    assert found.checkpoints == 40
    for k, direction in enumerate(found.directions):
        axis = direction["theta"].abs()
        assert float(axis.norm()) == pytest.approx(1)
        assert int(axis.argmax()) == 3 - k


def test_directions_are_those_of_the_covariance_matrix():
    generator = torch.Generator().manual_seed(0)
    states = [
        {
            "a": torch.randn(3, generator=generator, dtype=torch.float64),
            "b": torch.randn(2, 2, generator=generator, dtype=torch.float64),
        }
        for _ in range(12)
    ]
    flat = torch.stack([torch.cat([s["a"], s["b"].flatten()]) for s in states])
    values, vectors = torch.linalg.eigh(torch.cov(flat.T))
    variance, directions = principal_directions(states, 3)
    torch.testing.assert_close(variance, values.flip(0)[:3])
    for k, direction in enumerate(directions):
        own = torch.cat([direction["a"], direction["b"].flatten()])
        assert abs(float(own @ vectors[:, -1 - k])) == pytest.approx(1, rel=1e-9)


class Read(Mapping):
    """A checkpoint whose tensors are made anew whenever they are asked for."""

    made: ClassVar[list] = []

    def __init__(self, state):
        self.state = state

    def __getitem__(self, name):
        found = self.state[name].clone()
        Read.made = [own for own in Read.made if own() is not None] + [weakref.ref(found)]
        Read.most = max(Read.most, len(Read.made))
        return found

    def __iter__(self):
        return iter(self.state)

    def __len__(self):
        return len(self.state)


def test_checkpoints_that_are_read_when_asked_for_are_not_held(monkeypatch):
    model, states = Bowl([0.5, 1.0, 2.0, 4.0]), walk([4.0, 3.0, 2.0, 1.0])
    held = measure.variance_flatness(model, states, DATA, loss, 4)
    Read.most = 0
    read = measure.variance_flatness(model, map(Read, states), DATA, loss, 4)
    assert 0 < Read.most <= 3
    torch.testing.assert_close(read.variance, held.variance)
    torch.testing.assert_close(read.ends, held.ends)
    # Nor is all of a weight looked at together.
    monkeypatch.setattr(_trajectory, "_AT_ONCE", 3 * len(states))
    parts = measure.variance_flatness(model, states, DATA, loss, 4)
    torch.testing.assert_close(parts.variance, held.variance)


def test_a_loss_that_never_leaves_is_infinitely_flat_and_not_fitted():
    model = Bowl([0.0, 1.0, 2.0, 4.0])
    found = measure.variance_flatness(model, walk([1.0, 2.0, 3.0, 4.0]), DATA, loss, 4)
    assert found.flatness.isinf().sum() == 1
    assert found.slope.n - 1 == 1


def test_nan_is_outside():
    class Cliff(Bowl):
        def forward(self, x):
            return super().forward(x) + torch.log(1 - self.theta.abs().max()) * 0

    found = measure.variance_flatness(Cliff([0.1] * 3), walk([1.0, 2.0, 3.0]), DATA, loss, 3)
    torch.testing.assert_close(found.flatness, 2 * torch.ones(3).double(), rtol=0.05, atol=0)


def test_one_layer_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(9, 3).double(), torch.randn(9, 2).double()
    states = [
        {n: p.detach() + 0.1 * torch.randn_like(p) for n, p in model.named_parameters()}
        for _ in range(5)
    ]
    found = measure.variance_flatness(model, states, (x, y), MSE, parameters=["0.weight"])
    assert len(found.variance) == 4  # five points span no more
    assert all(list(direction) == ["0.weight"] for direction in found.directions)


@pytest.mark.parametrize(
    ("states", "options", "error", "message"),
    [
        (walk([1.0, 2.0])[:2], {}, ValueError, "checkpoints has to hold at least 3, but got 2"),
        ([{"theta": torch.ones(2)}] * 4, {}, ValueError, "checkpoints do not differ"),
        ([{"theta": torch.ones(3)}] * 4, {}, ValueError, r"checkpoints\[0\] has to hold 'theta'"),
        ([{}] * 4, {}, ValueError, r"checkpoints\[0\] has to hold 'theta'"),
        ([torch.ones(2)] * 4, {}, TypeError, "has to hold mappings of tensors"),
        (
            [{"theta": torch.full((2,), math.nan)}] * 4,
            {},
            ValueError,
            r"checkpoints\[0\] holds NaN or Inf in 'theta'",
        ),
        (walk([1.0, 2.0]), {"components": 0}, ValueError, "components has to be at least 1"),
        (walk([1.0, 2.0]), {"factor": 1.0}, ValueError, "factor has to be above 1"),
        (walk([1.0, 2.0]), {"parameters": ["x"]}, ValueError, "parameters names 'x'"),
        (walk([1.0, 2.0]), {"parameters": []}, ValueError, "parameters is empty"),
    ],
)
def test_bad_input_is_refused(states, options, error, message):
    with pytest.raises(error, match=message):
        measure.variance_flatness(Bowl([1.0, 2.0]), states, DATA, loss, **options)


def test_a_loss_of_zero_has_no_multiples():
    with pytest.raises(ValueError, match="the loss at the model is 0"):
        measure.variance_flatness(
            Bowl([1.0, 2.0]), walk([1.0, 2.0]), DATA, lambda f, y: f.square().sum()
        )
