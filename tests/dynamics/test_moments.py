"""Functions of moments: values, errors and lean against the delta method written out."""

import math

import pytest
import torch

from droplens.dynamics._moments import Curvature, Noise, differs, jackknifed
from droplens.estimates import skewed_mean

EXACT = Curvature(torch.tensor([2.0]).double(), torch.tensor([5.0]).double())


def drawn(count=40, dimension=3, seed=0):
    """Noise of normal draws δ = (1, 2, 3) e, and H = diag(3, 2, 1)."""
    source = torch.Generator().manual_seed(seed)
    D = torch.randn(dimension, count, generator=source).double()
    D = D * torch.arange(1.0, dimension + 1)[:, None]
    H = torch.arange(float(dimension), 0, -1).double()
    gram = D.mT @ D
    formed = 1 - torch.eye(count).double()
    crosses = gram.square() * formed
    return Noise((H[:, None] * D * D).sum(0), gram.diagonal().clone(), crosses, formed)


def test_a_mean_is_that_of_the_draws():
    noise = drawn()
    (found,) = jackknifed(lambda sigma, h: sigma[1][None], noise, EXACT)
    expected = skewed_mean(noise.squares)
    assert found.value == pytest.approx(expected.value, rel=1e-12)
    assert found.standard_error == pytest.approx(expected.standard_error, rel=1e-9)
    assert found.variance_slope == pytest.approx(expected.variance_slope, rel=1e-6)


def test_a_ratio_leans_by_how_it_bends():
    """r = a/b: r″ = −2 a′b′/b² + 2 a b′²/b³ as the draws' weights move along L."""
    noise = drawn(200)
    (found,) = jackknifed(lambda sigma, h: (sigma[0] / sigma[1])[None], noise, EXACT)
    a, b = noise.products.mean(), noise.squares.mean()
    L = (noise.products - a / b * noise.squares) / b
    along = L / L.square().mean().sqrt()
    a_moves, b_moves = (along * noise.products).mean(), (along * noise.squares).mean()
    bend = float(-2 * a_moves * b_moves / b**2 + 2 * a * b_moves**2 / b**3)
    assert found.value == pytest.approx(float(a / b), rel=0.01)
    assert found.standard_error == pytest.approx(float(L.std()) / math.sqrt(200), rel=0.02)
    linear = skewed_mean(L)
    assert abs(bend / 200) > abs(linear.variance_slope) / 4
    assert found.variance_slope == pytest.approx(linear.variance_slope + bend / 200, rel=0.1)


def test_what_hangs_on_probes_alone_is_exact_with_one():
    (found,) = jackknifed(lambda sigma, h: (h[1].sqrt() + 0 * sigma[0])[None], drawn(), EXACT)
    assert (found.value, found.standard_error) == (pytest.approx(math.sqrt(5)), 0)
    probes = Curvature(torch.tensor([1.0, 3.0, 2.0]).double(), torch.ones(3).double())
    (found,) = jackknifed(lambda sigma, h: (h[0] + 0 * sigma[0])[None], drawn(), probes)
    assert found.standard_error == pytest.approx(1 / math.sqrt(3))
    assert (found.over, found.n) == ("probes", 3)


def test_a_rare_draw_takes_the_error():
    noise = drawn(100)
    noise.squares[0] = 1e6
    (trace,) = jackknifed(lambda sigma, h: sigma[1][None], noise, EXACT)
    (product,) = jackknifed(lambda sigma, h: sigma[0][None], noise, EXACT)
    assert math.isnan(trace.standard_error)
    assert product.standard_error > 0


def test_a_difference_is_seen_beyond_two_errors():
    noise = drawn(100)
    assert differs(lambda sigma, h: sigma[1][None], noise)
    assert not differs(lambda sigma, h: (sigma[1] - sigma[1].detach())[None], noise)
