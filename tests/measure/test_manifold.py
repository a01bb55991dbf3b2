"""Curvature of explicit manifolds, against geometry that is known by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from droplens import measure
from droplens.measure import _manifold
from tests.reference_measure import dense_curvature

F64 = torch.float64
CLOSE = {"rel": 1e-9, "abs": 1e-9}


def along(*numbers):
    return torch.tensor(numbers, dtype=F64)


def circle(t):
    return 5 * torch.cat([t.cos(), t.sin()])


def sphere(p):
    return 3 * torch.stack([p[0].sin() * p[1].cos(), p[0].sin() * p[1].sin(), p[0].cos()])


def cylinder(p):
    return torch.stack([2 * (p[0] / 2).cos(), 2 * (p[0] / 2).sin(), p[1]])


def test_a_circle_bends_by_its_radius():
    found = measure.manifold_curvature(circle, along(0.3), along(-2.0))
    assert found.intrinsic == pytest.approx(0.2, **CLOSE)
    assert found.parameter_effects == pytest.approx(0, **CLOSE)
    assert found.speed == pytest.approx(5)
    assert found.residual < 1e-8


def test_another_parameter_of_the_circle_adds_parameter_effects_alone():
    # Arc s = t²: speed 2t·5, and the point accelerates along the circle by 2·5.
    found = measure.manifold_curvature(lambda t: circle(t.square()), along(0.7), along(1.0))
    assert found.intrinsic == pytest.approx(0.2, **CLOSE)
    assert found.parameter_effects == pytest.approx(2 * 5 / (2 * 0.7 * 5) ** 2, **CLOSE)


@pytest.mark.parametrize("direction", [(1.0, 0.0), (0.0, 1.0), (0.3, -2.0)])
def test_a_sphere_bends_alike_in_all_directions(direction):
    found = measure.manifold_curvature(sphere, along(0.7, 0.3), along(*direction))
    assert found.intrinsic == pytest.approx(1 / 3, **CLOSE)


@pytest.mark.parametrize("angle", [0.0, 0.4, math.pi / 2])
def test_a_cylinder_bends_around_but_not_along(angle):
    direction = along(math.cos(angle), math.sin(angle))
    found = measure.manifold_curvature(cylinder, along(0.7, 0.3), direction)
    assert found.intrinsic == pytest.approx(math.cos(angle) ** 2 / 2, **CLOSE)


@pytest.mark.parametrize("a", [0.1, 0.7, 3.0])
@pytest.mark.parametrize("theta", [0.4, 2.0])
def test_a_curved_normal_family_has_efrons_curvatures(a, theta):
    """N(θ, aθ²) in the natural and the expectation parameters of the normal family."""

    def natural(t):
        return torch.cat([1 / (a * t), -1 / (2 * a * t.square())])

    def expectation(t):
        return torch.cat([t, (1 + a) * t.square()])

    def log_partition(f):
        return -f[0].square() / (4 * f[1]) - torch.log(-2 * f[1]) / 2

    H = torch.func.hessian(log_partition)(natural(along(theta)))
    e = measure.manifold_curvature(natural, along(theta), along(1.0), H)
    m = measure.manifold_curvature(expectation, along(theta), along(1.0), torch.linalg.inv(H))
    assert e.intrinsic == pytest.approx(math.sqrt(2 * a**2 / (1 + 2 * a) ** 3), rel=1e-8)
    assert m.intrinsic == pytest.approx(math.sqrt(2 * (1 + a) ** 2 / (1 + 2 * a) ** 3), rel=1e-8)


def test_a_linear_model_is_flat_in_its_natural_parameters_whatever_its_own():
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(30, 3, generator=generator, dtype=F64)
    w, v = (torch.randn(3, generator=generator, dtype=F64) for _ in range(2))
    pi = torch.sigmoid(X @ w)
    plain = measure.manifold_curvature(lambda w: X @ w, w, v, pi * (1 - pi))
    assert plain.intrinsic == plain.parameter_effects == 0
    pi = torch.sigmoid(X @ w.exp())
    bent = measure.manifold_curvature(lambda t: X @ t.exp(), w, v, pi * (1 - pi))
    assert bent.intrinsic < 1e-12 < 0.01 < bent.parameter_effects
    mixed = measure.manifold_curvature(lambda w: torch.sigmoid(X @ w), w, v)
    assert mixed.intrinsic > 0.01


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 6), st.integers(0, 1000), st.booleans())
def test_equals_the_dense_split(d, seed, diagonal):
    generator = torch.Generator().manual_seed(seed)
    m = d + 4
    A, B, G = (torch.randn(m, k, generator=generator, dtype=F64) for k in (d, d, m))
    theta, v = (torch.randn(d, generator=generator, dtype=F64) for _ in range(2))
    metric = G.square().sum(1) if diagonal else G @ G.mT

    def point(t):
        return torch.tanh(A @ t) + (B @ t).square() / 5

    found = measure.manifold_curvature(point, theta, v, metric)
    dense = torch.diag(metric) if diagonal else metric
    kappa, effects = dense_curvature(point, dense, theta, v)
    assert found.intrinsic == pytest.approx(kappa, rel=1e-8, abs=1e-10)
    assert found.parameter_effects == pytest.approx(effects, rel=1e-8, abs=1e-10)
    again = measure.manifold_curvature(point, theta, -1e-6 * v, metric)
    assert again.intrinsic == pytest.approx(kappa, rel=1e-8, abs=1e-10)


def test_nearly_dependent_parameters_are_split_to_the_digit():
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(40, 12, generator=generator, dtype=F64)
    A[:, 1] = A[:, 0] + 1e-3 * A[:, 1]  # condition number ~1e3
    A[:, 3] = A[:, 2]  # and rank 11
    theta, v = (torch.randn(12, generator=generator, dtype=F64) for _ in range(2))

    def point(t):
        return torch.tanh(A @ t)

    found = measure.manifold_curvature(point, theta, v)
    kappa, effects = dense_curvature(point, torch.eye(40, dtype=F64), theta, v)
    assert found.intrinsic == pytest.approx(kappa, rel=1e-8)
    assert found.parameter_effects == pytest.approx(effects, rel=1e-8)


def test_a_manifold_that_fills_its_space_is_flat():
    generator = torch.Generator().manual_seed(1)
    A = torch.randn(4, 6, generator=generator, dtype=F64)
    theta, v = (torch.randn(6, generator=generator, dtype=F64) for _ in range(2))
    found = measure.manifold_curvature(lambda t: torch.tanh(A @ t), theta, v)
    assert found.intrinsic < 1e-9 * found.parameter_effects


def test_single_precision_is_lifted():
    found = measure.manifold_curvature(circle, torch.ones(1), torch.ones(1))
    assert found.intrinsic == pytest.approx(0.2, rel=1e-12)


def test_a_solve_that_does_not_converge_is_said(monkeypatch):
    monkeypatch.setattr(_manifold, "TOLERANCE", 0.0)
    monkeypatch.setattr(_manifold.TangentMap, "tolerance", -1.0)
    with pytest.raises(RuntimeError, match=r"stopped at a residual of .*too nearly dependent"):
        measure.manifold_curvature(lambda t: circle(t.square()), along(0.7), along(1.0))


ONE = torch.ones(1)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((3, ONE, ONE), TypeError, "function has to be a function of one tensor, but got int"),
        ((circle, [1.0], ONE), TypeError, "parameters has to be a tensor, but got list"),
        ((circle, torch.ones(1).long(), ONE), TypeError, "parameters has to be floating point"),
        ((circle, ONE, torch.ones(2)), ValueError, r"direction has to have the parameters' shape"),
        ((circle, torch.ones(1, 1), ONE), ValueError, "parameters has to be 1-D and not empty"),
        ((circle, ONE * math.nan, ONE), ValueError, "parameters holds NaN or Inf"),
        ((circle, ONE, ONE * 0), ValueError, "direction is zero"),
        ((circle, ONE, ONE, torch.ones(3)), ValueError, r"metric has to have shape \(2, 2\) or"),
        ((circle, ONE, ONE, [1.0]), TypeError, "metric has to be a floating point tensor"),
        ((circle, ONE, ONE, -torch.ones(2)), ValueError, "metric has to be positive semi-definite"),
        ((circle, ONE, ONE, torch.ones(2) * math.nan), ValueError, "metric holds NaN"),
        (
            (circle, ONE, ONE, torch.tensor([[1.0, 0.5], [0.0, 1.0]])),
            ValueError,
            "metric has to be symmetric",
        ),
        ((lambda t: t.sum(), ONE, ONE), ValueError, "function has to return a 1-D tensor"),
        ((lambda t: t.round(), ONE, ONE), ValueError, "does not move the point: J v = 0"),
        ((lambda t: t.detach() + 1, ONE, ONE), ValueError, "does not move the point: J v = 0"),
        ((lambda t: (t - 1).sqrt(), ONE, ONE), ValueError, "second derivative .* is NaN or Inf"),
    ],
)
def test_bad_input_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        measure.manifold_curvature(*arguments)


class Backwards(torch.autograd.Function):
    """An operation that torch can differentiate only backwards."""

    @staticmethod
    def forward(x):
        return x.square()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx, g):
        return 2 * g * ctx.saved_tensors[0]


def test_an_operation_without_a_forward_rule_is_named():
    with pytest.raises(ValueError, match="cannot be differentiated twice in forward mode"):
        measure.manifold_curvature(Backwards.apply, torch.ones(2), torch.ones(2))
