"""The path and the choice along it, against one solution at a time."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from droplens.linear import Moments, cross_validate, path, solve


def data(n=60, d_in=6, d_out=4, seed=0, noise=1.0):
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, d_in)) + 1
    W = rng.standard_normal((d_in, 2)) @ rng.standard_normal((2, d_out))
    return X, X @ W + noise * rng.standard_normal((n, d_out)) + 3


@pytest.mark.parametrize(("width", "b"), [(4, 1), (2, 1), (10, 1), (4, 2), (9, 3)])
@pytest.mark.parametrize("adaptive", [False, True])
class TestPath:
    def test_holds_the_solutions(self, width, b, adaptive):
        X, Y = data()
        found = path(X, Y, width, [0.0, 0.2, 0.6, 0.9], b, adaptive)
        assert len(found) == 4
        for i, p in enumerate(found.rates):
            one = solve(X, Y, p, width, b, adaptive)
            np.testing.assert_allclose(found.singular_values[i], one.singular_values, atol=1e-12)
            assert found.ranks[i] == one.rank
            assert found.thresholds[i] == pytest.approx(one.threshold, abs=1e-12)
            assert found.lower_bounds[i] == pytest.approx(one.lower_bound)
        whole = found.solution(2)
        one = solve(X, Y, 0.6, width, b, adaptive)
        np.testing.assert_allclose(whole.coefficients, one.coefficients, atol=1e-7)
        assert whole.value == pytest.approx(one.value, rel=1e-8)

    def test_says_when_each_singular_value_vanishes(self, width, b, adaptive):
        X, Y = data()
        found = path(X, Y, width, [0.5], b, adaptive)
        for i, gone in enumerate(found.vanishing_rates):
            if i >= width:
                assert gone == 0
                continue
            if gone == 1:
                assert i < b
                assert path(X, Y, width, [1 - 1e-9], b, adaptive).singular_values[0, i] > 0
                continue
            around = path(X, Y, width, [gone * (1 - 1e-6), gone * (1 + 1e-6)], b, adaptive)
            assert (around.singular_values[:, i] > 0).tolist() == [True, False]


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6), st.sampled_from([(3, 1), (4, 2), (12, 3)]))
def test_singular_values_only_shrink_as_p_grows_for_single_units(seed, shape):
    X, Y = data(20, 4, 3, seed)
    found = path(X, Y, *shape[:1])
    assert (np.diff(found.singular_values.sum(1)) <= 1e-12).all()
    assert (np.diff(found.ranks) <= 0).all()
    blocks = path(X, Y, shape[0], block_size=shape[1])
    assert (np.diff(np.linalg.norm(blocks.singular_values, axis=1)) <= 1e-9).all()


def test_default_grid_and_moments():
    X, Y = data()
    found = path(X, Y, 4)
    np.testing.assert_allclose(found.rates, np.arange(20) / 20)
    of_moments = Moments().update(X, Y).path(4)
    np.testing.assert_allclose(of_moments.singular_values, found.singular_values, atol=1e-9)
    central = Moments().update(X, Y).path(4, center=True)
    other = path(X - X.mean(0), Y - Y.mean(0), 4)
    np.testing.assert_allclose(central.singular_values, other.singular_values, atol=1e-9)


def test_zeros_and_ties():
    assert not path(np.zeros((4, 2)), np.ones((4, 2)), 2).ranks.any()
    tied = path(np.eye(3), np.eye(3), 3)
    assert tied.vanishing_rates.tolist() == [1, 1, 1]
    np.testing.assert_array_equal(tied.ranks, 3)


class TestCrossValidation:
    @pytest.mark.parametrize("center", [True, False])
    @pytest.mark.parametrize("b", [1, 2])
    def test_errors_are_those_of_fitting_fold_by_fold(self, center, b):
        X, Y = data()
        rates, widths = [0.0, 0.3, 0.7], [2, 4, 8]
        found = cross_validate(X, Y, rates, widths, folds=3, block_size=b, center=center)
        assert found.errors.shape == (3, 3, 3)
        for fold in range(3):
            held = np.arange(60) % 3 == fold
            mx, my = (a[~held].mean(0) if center else 0.0 for a in (X, Y))
            for w, width in enumerate(widths):
                grid = path(X[~held] - mx, Y[~held] - my, width, rates, b)
                for k in range(3):
                    T = grid.triplets
                    inner = grid.problem.restore(T.right)
                    W = (T.left * grid.singular_values[k]) @ inner.T
                    error = ((Y[held] - my - (X[held] - mx) @ W.T) ** 2).sum(1).mean()
                    assert found.errors[fold, w, k] == pytest.approx(error, rel=1e-9)
        best = np.unravel_index(found.mean_errors.argmin(), (3, 3))
        assert (found.best_width, found.best_rate) == (widths[best[0]], rates[best[1]])
        assert found.standard_errors.shape == (3, 3)

    def test_noise_asks_for_dropout(self):
        quiet = cross_validate(*data(noise=1e-3))
        noisy = cross_validate(*data(30, noise=8.0))
        assert quiet.best_rate < noisy.best_rate
        X, Y = data(30, noise=8.0)
        again = Moments().update(X, Y).solve(noisy.best_rate, noisy.best_width, center=True)
        np.testing.assert_allclose(noisy.solution.coefficients, again.coefficients)

    def test_splits_of_ones_own(self):
        X, Y = data()
        index = np.arange(60)
        splits = [(index[index % 5 != i], index[index % 5 == i]) for i in range(5)]
        one, other = cross_validate(X, Y, folds=splits), cross_validate(X, Y)
        np.testing.assert_allclose(one.errors, other.errors)

    def test_wide_data(self):
        X, Y = data(12, 30, 3)
        found = cross_validate(X, Y, folds=3)
        assert found.best_width == 3
        assert np.isfinite(found.errors).all()


class TestBadInput:
    def test_rates(self):
        X, Y = data()
        with pytest.raises(ValueError, match="rates has to hold at least one rate"):
            path(X, Y, 4, [])
        with pytest.raises(ValueError, match="p = 1 drops every unit"):
            path(X, Y, 4, [0.5, 1.0])
        with pytest.raises(ValueError, match="dropout probability has to be between 0 and 1"):
            cross_validate(X, Y, [float("nan")])
        with pytest.raises(ValueError, match="block_size has to divide width"):
            path(X, Y, 4, block_size=3)

    def test_folds(self):
        X, Y = data()
        with pytest.raises(ValueError, match="folds has to be between 2 and the 60 examples"):
            cross_validate(X, Y, folds=1)
        with pytest.raises(ValueError, match="between 2 and the 60 examples, but got 61"):
            cross_validate(X, Y, folds=61)
        with pytest.raises(ValueError, match="folds has to hold at least 2 splits"):
            cross_validate(X, Y, folds=[(np.arange(50), np.arange(50, 60))])
        with pytest.raises(TypeError, match="folds has to be an int"):
            cross_validate(X, Y, folds=2.5)
        with pytest.raises(ValueError, match="widths has to hold at least one width"):
            cross_validate(X, Y, widths=[])
