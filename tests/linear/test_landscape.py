"""The landscape: derivatives by differences, the figures of theory §2.5, and its claim, tested."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from droplens.linear import (
    Factors,
    Moments,
    classify,
    critical_points,
    equalize,
    landscape_gradient,
    landscape_hessian_product,
    landscape_value,
    objective,
    rebalance,
)

FIGURES = np.diag([3, 2, 1, 0.5])
P = 0.3 / 1.3  # λ = .3


def numbers(d_out, d_in, r, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(s) for s in ((d_out, r), (d_in, r), (d_out, d_in))]


def along(point, direction, step):
    """The point moved along a direction; tied if its incoming weights are its outgoing ones."""
    U = point.outgoing + step * direction.outgoing
    tied = point.incoming is point.outgoing
    return U, None if tied else point.incoming + step * direction.incoming


@pytest.mark.parametrize("tied", [False, True])
class TestDerivatives:
    def weights(self, tied):
        U, V, M = numbers(4, 4 if tied else 3, 3)
        return (U, None, M + M.T) if tied else (U, V, M)

    def test_value(self, tied):
        U, V, M = self.weights(tied)
        W = U if V is None else V
        white = np.eye(len(W))
        expected = objective(U, W, white, M.T, 0.4) * len(W)
        assert landscape_value(U, V, M, 0.4) == pytest.approx(expected, rel=1e-12)

    def test_gradient_and_hessian_by_automatic_differentiation(self, tied):
        U, V, M = self.weights(tied)
        lam = 0.4 / 0.6
        target = torch.tensor(M)

        def value(*weights):
            u, v = weights if len(weights) == 2 else (weights[0], weights[0])
            penalty = (u.square().sum(0) * v.square().sum(0)).sum()
            return (target - u @ v.T).square().sum() + lam * penalty

        weights = tuple(torch.tensor(w) for w in (U, V) if w is not None)
        rng = np.random.default_rng(5)
        steps = tuple(torch.tensor(rng.standard_normal(w.shape)) for w in weights)
        slope = torch.autograd.functional.jacobian(value, weights)
        bend = torch.autograd.functional.hvp(value, weights, steps)[1]
        direction = Factors(steps[0].numpy(), steps[-1].numpy())
        for found, expected in (
            (landscape_gradient(U, V, M, 0.4), slope),
            (landscape_hessian_product(U, V, M, 0.4, direction), bend),
        ):
            np.testing.assert_allclose(found.outgoing, expected[0], rtol=1e-10)
            np.testing.assert_allclose(found.incoming, expected[-1], rtol=1e-10)


class TestRebalance:
    def test_same_products_equal_norms(self):
        U, V, _ = numbers(4, 3, 3)
        U[:, 1] = 0
        even = rebalance(U * [100, 1, 1], V)
        np.testing.assert_allclose(even.outgoing @ even.incoming.T, U * [100, 1, 1] @ V.T)
        norms = [np.linalg.norm(f, axis=0) for f in (even.outgoing, even.incoming)]
        np.testing.assert_allclose(*norms)
        assert norms[0][1] == 0

    @pytest.mark.parametrize(
        ("norm", "curvature"), [(0, -1), (1, -0.34), (10, -0.0038), (100, -3.8e-5)]
    )
    def test_an_unbalanced_dead_unit_hides_its_curvature(self, norm, curvature):
        # Theory §2.5's figures, up to their common scale: M = ½, λ = .3 and a dead u.
        M = np.array([[0.5, 0.0], [0.0, 0.0]])
        U, V = np.zeros((2, 1)), np.array([[0.0], [float(norm)]])
        found = classify(U, V, M, P)
        assert found.kind == "strict saddle"
        hessian = np.zeros((4, 4))
        for column, row in enumerate(np.eye(4)):
            direction = Factors(row[:2, None], row[2:, None])
            product = landscape_hessian_product(U, V, M, P, direction)
            hessian[column] = np.concatenate([product.outgoing[:, 0], product.incoming[:, 0]])
        assert np.linalg.eigvalsh(hessian)[0] == pytest.approx(curvature, rel=0.02)
        assert found.smallest_curvature == pytest.approx(-1)  # after rebalancing
        lower = landscape_value(*along(found.point, found.escape, 1e-2), M, P)
        assert lower < found.value


class TestFigures:
    """Theory §2.5: M = diag(3, 2, 1, .5), r = 2, λ = .3, tied."""

    @pytest.fixture
    def points(self):
        return {
            c.subset: c
            for c in critical_points(FIGURES, 2, P, tied=True)
            if len(c.subset) != 1 or len(c.subset[0]) == 2
        }

    @pytest.mark.parametrize(
        ("subset", "value", "curvature", "kind", "reason"),
        [
            (((0, 1),), 4.1346, 0.2430, "global minimum", "value of the closed form"),
            (((0, 2),), 6.0962, -4.0, "strict saddle", "wrong subset"),
            (((1, 2),), 10.2885, -8.0, "strict saddle", "wrong subset"),
            (((0,), (1,)), 4.25, -0.2364, "strict saddle", "unequal"),
            ((), 14.25, -12.0, "strict saddle", "zero"),
        ],
    )
    def test_tied(self, points, subset, value, curvature, kind, reason):
        point = points[subset]
        assert point.value == pytest.approx(value, abs=6e-5)
        assert point.smallest_curvature == pytest.approx(curvature, abs=6e-5)
        assert point.kind == kind
        assert reason in point.reason
        assert point.gradient_norm < 1e-13
        assert point.theorem.startswith("P1")

    def test_beyond_the_papers_threshold_our_theorem_covers(self):
        # r σ_r/(Σ − r σ_r) = 4/(5 − 4) = 4
        for lam, theorem in ((3.9, "P1"), (4.1, "theory §2.5")):
            best = critical_points(FIGURES, 2, lam / (1 + lam), tied=True)[0]
            assert best.kind == "global minimum"
            assert best.theorem.startswith(theorem)

    @pytest.mark.parametrize("lam", [0.6, 2.0])
    def test_the_papers_picture(self, lam):
        p = lam / (1 + lam)
        best = critical_points([[2.0]], 2, p, tied=True)[0]
        assert best.value == pytest.approx(4 * lam / (2 + lam))
        np.testing.assert_allclose(best.point.outgoing**2, 2 / (2 + lam))


SHAPES = [(3, 3, 2), (3, 4, 3), (2, 3, 4), (4, 4, 1), (1, 1, 1), (4, 2, 2)]
RATES = [0.01, 0.3, 3.0, 100.0]


@pytest.mark.parametrize(("d_out", "d_in", "r"), SHAPES)
@pytest.mark.parametrize("tied", [False, True])
def test_every_critical_point_is_a_global_minimum_or_a_strict_saddle(d_out, d_in, r, tied):
    """Our theorem of theory §2.5, on every family of small problems, far beyond P1's threshold."""
    if tied and d_out != d_in:
        pytest.skip("tied weights need a square target")
    seen = 0
    for seed, lam in enumerate(RATES):
        M = numbers(d_out, d_in, r, seed)[2]
        p = lam / (1 + lam)
        if tied:
            M = M @ M.T if seed % 2 else M + M.T
        points = critical_points(M, r, p, tied)
        least = points[0].value
        for point in points:
            seen += 1
            assert point.gradient_norm < 1e-9 * (1 + np.linalg.norm(M)) ** 2
            if point.kind == "global minimum":
                assert point.value == pytest.approx(least)
                assert point.escape is None
                assert point.smallest_curvature > -1e-9 * (1 + lam) * np.linalg.norm(M)
                continue
            assert point.kind == "strict saddle"
            assert point.value > least
            assert point.smallest_curvature < 0
            size = np.linalg.norm(point.escape.outgoing) ** 2
            if not tied:
                size += np.linalg.norm(point.escape.incoming) ** 2
            assert size == pytest.approx(1)
            falls = [
                landscape_value(*along(point.point, point.escape, e), M, p) for e in (1e-3, -1e-3)
            ]
            assert min(falls) < point.value
    assert seen > len(RATES)


def test_the_list_holds_what_descent_finds():
    # Newton's method from random starts ends in critical points: each has a listed value.
    from scipy.optimize import root

    M, r, p = np.diag([2.0, 1.2, 0.5]), 2, P
    listed = np.array([c.value for c in critical_points(M, r, p, tied=True)])
    rng = np.random.default_rng(0)
    found = set()
    for _ in range(80):
        answer = root(
            lambda flat: landscape_gradient(flat.reshape(3, 2), None, M, p).outgoing.ravel(),
            1.2 * rng.standard_normal(6),
            method="lm",
            options={"xtol": 1e-14, "ftol": 1e-14},
        )
        U = answer.x.reshape(3, 2)
        if np.linalg.norm(landscape_gradient(U, None, M, p).outgoing) > 1e-8:
            continue
        value = landscape_value(U, None, M, p)
        gaps = np.abs(listed - value)
        assert gaps.min() < 1e-6
        found.add(int(gaps.argmin()))
    assert len(found) >= 5


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6), st.integers(1, 4), st.floats(0.02, 0.95))
def test_the_closed_form_is_a_global_minimum_and_nothing_near_it_is_lower(seed, r, p):
    M = numbers(4, 3, 1, seed)[2]
    best = Moments.of_target(M).solve(p, r)
    found = classify(best.outgoing, best.incoming, M, p)
    assert found.kind == "global minimum"
    assert found.value == pytest.approx(best.value)
    rng = np.random.default_rng(seed)
    U, V, _ = numbers(4, 3, r, seed + 1)
    for step in 10 ** rng.uniform(-4, 0, 5):
        near = landscape_value(best.outgoing + step * U, best.incoming + step * V, M, p)
        assert near >= found.value - 1e-9 * (1 + found.value)


class TestClassify:
    def test_unbalanced_saddles_are_seen_through(self):
        for point in critical_points(np.diag([3.0, 1.0]), 2, 0.5):
            stretch = np.array([50.0, 1 / 30])
            U, V = point.point.outgoing * stretch, point.point.incoming / stretch
            found = classify(U, V, np.diag([3.0, 1.0]), 0.5)
            assert found.kind == point.kind
            assert found.smallest_curvature == pytest.approx(point.smallest_curvature, abs=1e-6)
            if found.escape is not None:
                moved = along(found.point, found.escape, 1e-3)
                assert landscape_value(*moved, np.diag([3.0, 1.0]), 0.5) < found.value

    def test_points_that_are_not_critical(self):
        U, V, M = numbers(4, 3, 2)
        found = classify(U, V, M, 0.4)
        assert found.kind == "not critical"
        assert found.gradient_norm > 0.1
        assert landscape_value(*along(found.point, found.escape, 1e-5), M, 0.4) < found.value
        # A dead unit whose other side sees the residual.
        assert classify(np.zeros((4, 2)), V, M, 0.4).kind == "not critical"

    def test_without_dropout(self):
        M = np.diag([3.0, 2.0])
        left, sizes, right = np.linalg.svd(M)
        root = np.sqrt(sizes)
        best = classify(left * root, right.T * root, M, 0.0)
        assert (best.kind, best.theorem) == ("global minimum", "Eckart-Young")
        unequal = classify(left[:, :1], 3 * right.T[:, :1], M, 0.0)
        assert unequal.kind == "global minimum"
        other = classify(left[:, 1:], 2 * right.T[:, 1:], M, 0.0)
        assert (other.kind, other.theorem) == ("strict saddle", "none")
        assert landscape_value(*along(other.point, other.escape, 1e-3), M, 0.0) < other.value

    def test_degenerate_targets(self):
        zero = classify(np.zeros((2, 1)), np.zeros((3, 1)), np.zeros((2, 3)), 0.5)
        assert zero.kind == "global minimum"
        negative = classify(np.zeros((2, 1)), None, -np.eye(2), 0.5)
        assert negative.kind == "global minimum"
        assert critical_points(-np.eye(2), 1, 0.5, tied=True)[0].kind == "global minimum"
        repeated = critical_points(np.eye(3), 2, 0.5, tied=True)
        assert {c.kind for c in repeated} == {"global minimum", "strict saddle"}

    def test_large_problems_use_products_only(self):
        M = np.diag(np.linspace(3, 0.1, 60))
        best = Moments.of_target(M).solve(0.5, 8)
        assert classify(best.outgoing, best.incoming, M, 0.5).kind == "global minimum"
        dead = best.outgoing.copy(), best.incoming.copy()
        for factor in dead:
            factor[:] = 0
        zero = classify(*dead, M, 0.5)
        assert zero.kind == "strict saddle"
        assert zero.smallest_curvature == pytest.approx(-6, rel=1e-6)

    def test_tensors(self):
        U, V, M = (torch.tensor(a) for a in numbers(3, 2, 2))
        found = classify(U, V, M, 0.4)
        assert isinstance(found.escape.outgoing, torch.Tensor)
        assert isinstance(landscape_gradient(U, V, M, 0.4).incoming, torch.Tensor)

    def test_equalised_but_too_large_is_not_critical(self):
        even = equalize(np.diag([3.0, 2.0]), np.eye(2))
        assert (
            classify(even.outgoing, even.incoming, np.diag([3.0, 2.0]), 0.5).kind == "not critical"
        )


class TestBadInput:
    def test_shapes_and_values(self):
        U, V, M = numbers(3, 2, 2)
        with pytest.raises(ValueError, match=r"target has to be of shape \(3, 2\)"):
            classify(U, V, M.T, 0.4)
        with pytest.raises(ValueError, match="target has to be symmetric for tied weights"):
            classify(U, None, np.triu(np.ones((3, 3))), 0.4)
        with pytest.raises(ValueError, match="target has to be finite"):
            classify(U, V, M * np.nan, 0.4)
        with pytest.raises(ValueError, match="got 2 and 1 columns"):
            classify(U, V[:, :1], M, 0.4)
        with pytest.raises(ValueError, match="p = 1 drops every unit"):
            classify(U, V, M, 1.0)
        with pytest.raises(ValueError, match="tolerance has to be finite"):
            classify(U, V, M, 0.4, tolerance=float("nan"))
        with pytest.raises(ValueError, match="direction has to have the factors' shapes"):
            landscape_hessian_product(U, V, M, 0.4, Factors(V, U))

    def test_lists(self):
        with pytest.raises(ValueError, match="p has to be positive"):
            critical_points(np.eye(2), 1, 0.0)
        with pytest.raises(ValueError, match="too many families"):
            critical_points(np.diag(np.linspace(2, 1, 12)), 12, 0.1)
        with pytest.raises(ValueError, match="width has to be at least 1"):
            critical_points(np.eye(2), 0, 0.5)
