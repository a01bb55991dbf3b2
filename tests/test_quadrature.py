"""Expectations over normal noise against fine sums on a grid."""

import math

import pytest
import torch

from droplens.quadrature import (
    covariance_factor,
    normal_points,
    softplus_excess,
    turned_points,
)

z = torch.linspace(-12, 12, 48_001, dtype=torch.float64)
density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)


def on_a_grid(a, s):
    """E softplus(a + s z) − softplus(a), the odd part taken out so that nothing cancels."""
    centre = torch.tensor(a, dtype=torch.float64)
    excess = torch.nn.functional.softplus(centre + s * z) - torch.nn.functional.softplus(centre)
    return float(torch.trapezoid((excess - torch.sigmoid(centre) * s * z) * density, z))


@pytest.mark.parametrize("a", [-30.0, -12.0, -5.0, -1.0, 0.0, 0.3, 2.0, 9.0, 30.0])
@pytest.mark.parametrize("s", [1e-3, 0.1, 0.5, 1.0, 1.5, 1.999, 2.001, 5.0, 20.0])
def test_softplus_excess(a, s):
    expected = on_a_grid(a, s)
    for dtype, relative in ((torch.float64, 1e-3), (torch.float32, 2e-3)):
        value = softplus_excess(torch.tensor(a, dtype=dtype), torch.tensor(s * s, dtype=dtype))
        assert float(value) == pytest.approx(expected, abs=1e-6, rel=relative)


@pytest.mark.parametrize("variance", [0.0, 1e-8, 0.5, 3.99, 4.01, 30.0])
def test_its_derivatives(variance):
    a = torch.tensor([-3.0, 0.0, 2.0], dtype=torch.float64, requires_grad=True)
    v = torch.full((3,), variance, dtype=torch.float64, requires_grad=True)
    ga, gv = torch.autograd.grad(softplus_excess(a, v).sum(), (a, v))
    assert bool(torch.isfinite(ga).all())
    assert bool(torch.isfinite(gv).all())
    if variance >= 1e-8:
        step = 1e-4 * max(variance, 1e-4)
        with torch.no_grad():
            slope = (softplus_excess(a, v + step) - softplus_excess(a, v - step)) / (2 * step)
        torch.testing.assert_close(gv, slope, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("dimension", [1, 3, 10])
def test_point_sets_are_centred_and_white(dimension):
    points = normal_points(dimension, 64)
    torch.testing.assert_close(points.mean(0), points.new_zeros(dimension), atol=1e-12, rtol=0)
    covariance = points.mT @ points / len(points)
    eye = torch.eye(dimension, dtype=torch.float64)
    torch.testing.assert_close(covariance, eye, atol=1e-12, rtol=0)


def test_too_few_points_to_whiten():
    with pytest.raises(ValueError, match="n_points has to exceed the dimension 8, but got 8"):
        normal_points(8, 8)


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_factors_of_singular_covariances(rank):
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(5, 3, rank, generator=generator, dtype=torch.float64)
    covariance = half @ half.mT
    lower = covariance_factor(covariance)
    torch.testing.assert_close(lower @ lower.mT, covariance, atol=1e-12, rtol=1e-12)


def test_turned_points_keep_their_moments_and_the_fixed_set_comes_back():
    fixed = normal_points(4, 32)
    with turned_points(torch.Generator().manual_seed(0)):
        first, second = normal_points(4, 32), normal_points(4, 32)
    assert normal_points(4, 32) is fixed
    assert not torch.allclose(first, second)
    for points in (first, second):
        torch.testing.assert_close(points.mean(0), torch.zeros(4, dtype=torch.float64))
        torch.testing.assert_close(points.mT @ points / 32, torch.eye(4, dtype=torch.float64))
        torch.testing.assert_close(points.norm(dim=1), fixed.norm(dim=1))
