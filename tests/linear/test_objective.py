"""The expected losses against every mask enumerated."""

import numpy as np
import pytest
import torch

from droplens import masks
from droplens.linear import drop_connect_objective, law_objective, objective
from tests.reference_linear import (
    all_coins,
    drop_connect_by_enumeration,
    dropblock_masks,
    expected_loss_by_enumeration,
)


def problem(seed=0, d_in=3, d_out=2, r=4, n=5):
    rng = np.random.default_rng(seed)
    shapes = ((d_out, r), (d_in, r), (n, d_in), (n, d_out))
    return tuple(rng.standard_normal(shape) for shape in shapes)


@pytest.mark.parametrize("p", [0.0, 1e-6, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("block_size", [1, 2, 4])
def test_equals_the_mean_over_all_masks(p, block_size):
    data = problem()
    expected = expected_loss_by_enumeration(*data, *all_coins(4, p, block_size))
    np.testing.assert_allclose(objective(*data, p, block_size), expected, rtol=1e-12)


@pytest.mark.parametrize("r", [1, 3])
def test_one_unit_one_example_zero_weights(r):
    data = problem(r=r, n=1)
    expected = expected_loss_by_enumeration(*data, *all_coins(r, 0.4))
    np.testing.assert_allclose(objective(*data, 0.4), expected, rtol=1e-12)
    nothing = (np.zeros_like(data[0]), *data[1:])
    np.testing.assert_allclose(objective(*nothing, 0.4), (data[3] ** 2).sum())


def test_laws():
    data = problem()
    np.testing.assert_allclose(law_objective(*data, masks.Bernoulli(0.3)), objective(*data, 0.3))
    np.testing.assert_allclose(
        law_objective(*data, masks.Grouped(0.3, 2)), objective(*data, 0.3, 2)
    )
    np.testing.assert_allclose(law_objective(*data, masks.Gaussian(0.3)), objective(*data, 0.3))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_correlated_law(size):
    # The overlapping DropBlock on a line: units near each other fall together.
    data = problem()
    zs, chances = dropblock_masks(4, size, 0.2)
    mean = chances @ zs
    covariance = (zs * chances[:, None]).T @ zs - np.outer(mean, mean)
    law = masks.Custom(torch.as_tensor(mean), torch.as_tensor(covariance))
    expected = expected_loss_by_enumeration(*data, zs, chances)
    np.testing.assert_allclose(law_objective(*data, law), expected, rtol=1e-12)


class TestDropConnect:
    def test_on_outgoing_weights_equals_dropout_for_any_inputs(self):
        data = problem()
        enumerated = drop_connect_by_enumeration(*data, 0.3, "outgoing")
        np.testing.assert_allclose(drop_connect_objective(*data, 0.3), enumerated, rtol=1e-12)
        np.testing.assert_allclose(objective(*data, 0.3), enumerated, rtol=1e-12)

    def test_on_incoming_weights_equals_dropout_for_orthogonal_inputs_only(self):
        U, V, X, Y = problem(d_in=3, r=3)
        enumerated = drop_connect_by_enumeration(U, V, X, Y, 0.3, "incoming")
        found = drop_connect_objective(U, V, X, Y, 0.3, "incoming")
        np.testing.assert_allclose(found, enumerated, rtol=1e-12)
        assert abs(objective(U, V, X, Y, 0.3) - enumerated) > 1e-3
        white = 2 * np.linalg.qr(X)[0]
        found = drop_connect_objective(U, V, white, Y, 0.3, "incoming")
        np.testing.assert_allclose(found, objective(U, V, white, Y, 0.3), rtol=1e-12)


class TestKinds:
    def test_tensors_carry_gradients(self):
        U, V, X, Y = (torch.tensor(a) for a in problem())
        U.requires_grad_()
        V.requires_grad_()
        for function in (
            lambda u, v: objective(u, v, X, Y, 0.3, 2),
            lambda u, v: drop_connect_objective(u, v, X, Y, 0.3, "incoming"),
            lambda u, v: law_objective(u, v, X, Y, masks.Grouped(0.3, 2)),
        ):
            assert torch.autograd.gradcheck(function, (U, V))

    def test_precision_and_mixtures(self):
        U, V, X, Y = problem()
        single = objective(torch.tensor(U, dtype=torch.float32), V, X, Y, 0.3)
        assert single.dtype == torch.float32
        assert float(single) == pytest.approx(objective(U, V, X, Y, 0.3), rel=1e-5)
        assert isinstance(objective(U, V, X, Y, 0.3), float)
        whole = objective(U.astype(int), V, np.asfortranarray(X), Y, 0.3)
        np.testing.assert_allclose(whole, objective(U.astype(int).astype(float), V, X, Y, 0.3))


class TestBadInput:
    @pytest.mark.parametrize("p", [-0.1, 1.1, float("nan")])
    def test_rate(self, p):
        with pytest.raises(ValueError, match="dropout probability has to be between 0 and 1"):
            objective(*problem(), p)

    def test_rate_one(self):
        with pytest.raises(ValueError, match="p = 1 drops every unit"):
            objective(*problem(), 1.0)

    def test_shapes(self):
        U, V, X, Y = problem()
        with pytest.raises(
            ValueError, match="block_size has to divide width, but 3 does not divide 4"
        ):
            objective(U, V, X, Y, 0.3, 3)
        with pytest.raises(ValueError, match="X has 4 rows and Y has 5"):
            objective(U, V, X[:4], Y, 0.3)
        with pytest.raises(
            ValueError, match="outgoing has to have a row for each of the 2 outputs"
        ):
            objective(V, V, X, Y, 0.3)
        with pytest.raises(ValueError, match="got 4 and 3 columns"):
            objective(U, V[:, :3], X, Y, 0.3)
        with pytest.raises(ValueError, match=r"Y has to be 2-D .*reshape\(-1, 1\)"):
            objective(U, V, X, Y[:, 0], 0.3)
        with pytest.raises(ValueError, match="weight has to be 'outgoing' or 'incoming'"):
            drop_connect_objective(U, V, X, Y, 0.3, "both")

    def test_values(self):
        U, V, X, Y = problem()
        X[1, 2] = np.nan
        with pytest.raises(ValueError, match=r"X has to be finite, but holds nan at \[1, 2\]"):
            objective(U, V, X, Y, 0.3)
