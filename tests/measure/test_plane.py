import math

import pytest
import torch
from torch import nn

from droplens import measure

CE, MSE = nn.CrossEntropyLoss(), nn.MSELoss()


class Bowl(nn.Module):
    def __init__(self):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))

    def forward(self, x):
        return x @ self.theta


class Cliff(Bowl):
    """Beyond theta_0 = 2 the predictions are NaN."""

    def forward(self, x):
        return super().forward(x) + 0 * torch.log(2 - self.theta[0])


def bowl(kind=Bowl):
    x = torch.randn(9, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = kind()
    return model, (x, x @ model.theta.detach())


def step(*values):
    return {"theta": torch.tensor(values, dtype=torch.float64)}


def network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def examples():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(12, 3, generator=generator, dtype=torch.float64)
    return x, torch.randint(2, (12,), generator=generator)


def test_a_quadratic_bowl_has_the_surface_of_its_formula():
    model, (x, y) = bowl()
    d1, d2 = step(1.0, 0.0, 2.0), step(0.0, 3.0, 0.0)
    found = measure.plane(model, (x, y), MSE, [d1, d2], ([-1.0, 0.0, 0.5], [0.0, 2.0]))
    for i, b in enumerate(found.y):
        for j, a in enumerate(found.x):
            truth = float((x @ (a * d1["theta"] + b * d2["theta"])).square().mean())
            assert float(found.loss[i, j]) == pytest.approx(truth, rel=1e-10)
    assert found.loss.shape == (2, 3)
    assert found.cosine == 0
    assert found.lengths == pytest.approx((math.sqrt(5), 3.0))
    assert found.seed is None
    assert found.filters is None
    assert not found.standard_error.any()


def test_the_plane_through_three_solutions_holds_them():
    nets, data = [network(seed) for seed in range(3)], examples()
    a, b, c = nets
    ways = [measure.between(a, b), measure.between(a, c)]
    found = measure.plane(a, data, CE, ways, ([0.0, 1.0], [0.0, 1.0]))
    with torch.no_grad():
        truths = [float(CE(net(data[0]), data[1])) for net in nets]
    corners = [found.loss[0, 0], found.loss[0, 1], found.loss[1, 0]]
    assert [float(v) for v in corners] == pytest.approx(truths, rel=1e-10)
    edge = measure.interpolation(a, b, data, CE, [0.0, 1.0]).loss
    torch.testing.assert_close(found.loss[0], edge)


def test_random_planes_repeat_from_their_seed():
    model, data = network(0), examples()
    runs = [measure.plane(model, data, CE, points=[0.0, 1.0], seed=s) for s in (1, 1, 2)]
    assert torch.equal(runs[0].loss, runs[1].loss)
    assert not torch.equal(runs[0].loss, runs[2].loss)
    assert runs[0].filters == "rows"
    assert abs(runs[0].cosine) < 1
    assert len(measure.plane(model, data, CE).x) == 11


def test_eigenvectors_span_planes():
    model, data = network(0), examples()
    axes = measure.hessian(model, data, CE, 2).eigenvectors
    found = measure.plane(model, data, CE, axes, [0.0, 0.1])
    assert found.cosine == pytest.approx(0, abs=1e-10)
    assert found.lengths == pytest.approx((1, 1))


def test_losses_that_are_nan_are_reported_and_not_fatal():
    model, data = bowl(Cliff)
    along = step(1.0, 0.0, 0.0)
    surface = measure.plane(model, data, MSE, [along, step(0.0, 1.0, 0.0)], [0.0, 0.5, 1.5])
    assert surface.loss.isnan().sum() == 3 == surface.not_finite
    slice_ = measure.flatness(model, data, MSE, [along, step(0.0, 1.0, 0.0)], (0.0, 0.5, 1.5))
    assert slice_.not_finite == 1
    assert math.isnan(slice_.loss[2].value)
    assert math.isnan(slice_.loss[2].standard_error)
    assert math.isfinite(slice_.loss[1].value)
    far = Cliff()
    with torch.no_grad():
        far.theta += along["theta"] * 1.5
    line = measure.interpolation(model, far, data, MSE, [0.0, 0.3, 1.0])
    assert line.not_finite == 1
    assert math.isnan(line.barrier)
    inside = measure.interpolation(model, far, data, MSE, [0.0, 0.3])
    assert inside.not_finite == 0
    noise = measure.sharpness(model, data, MSE, (5.0,), (), seed=0)
    assert noise.not_finite > 0
    assert math.isnan(noise.raw[0].value)


@pytest.mark.parametrize(
    ("directions", "points", "error", "message"),
    [
        ([step(1.0, 0.0, 0.0)], None, ValueError, "directions has to hold two, but got 1"),
        (3, None, TypeError, "directions has to be two of .* but got int"),
        ([step(1.0, 0, 0), step(-2.0, 0, 0)], None, ValueError, r"parallel \(cosine -1\)"),
        ([step(1.0, 0, 0), step(0.0, 0, 0)], None, ValueError, "a step of length zero"),
        ([step(1.0, 0, 0), {"w": torch.ones(3)}], None, ValueError, r"directions\[1\] names 'w'"),
        (None, [], ValueError, "points is empty"),
        (None, [0.0, math.inf], ValueError, "points has to be finite"),
    ],
)
def test_bad_input_is_refused(directions, points, error, message):
    model, data = bowl()
    with pytest.raises(error, match=message):
        measure.plane(model, data, MSE, directions, points, filters="layer")


def test_between_asks_for_one_architecture():
    with pytest.raises(ValueError, match=r"share an architecture, but differ in '0\.bias'"):
        measure.between(network(0), nn.Sequential(nn.Linear(3, 2)).double())
    with pytest.raises(TypeError, match="model has to be a torch module"):
        measure.between(network(0), "b")
