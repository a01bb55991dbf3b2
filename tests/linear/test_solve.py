"""The closed form against many starts of L-BFGS, transcriptions of the papers, and its own laws."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from droplens.linear import Moments, importance, objective, prox_k_support, solve
from droplens.linear import _svd as svd_module
from tests.reference_linear import best_by_descent, loss, naive_minimum


def problem(n, d_in, d_out, rank=None, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, d_in))
    if rank is not None:
        X = rng.standard_normal((n, rank)) @ rng.standard_normal((rank, d_in))
    return X, rng.standard_normal((n, d_out)) + X @ rng.standard_normal((d_in, d_out))


def with_target(sizes, d_out=None):
    """X and Y = X Mᵀ where X is white, so that M's singular values are `sizes` (times √n/√n)."""
    d = len(sizes)
    rng = np.random.default_rng(3)
    X = np.linalg.qr(rng.standard_normal((4 * d, d)))[0] * np.sqrt(4 * d)
    Q = np.linalg.qr(rng.standard_normal((d_out or d, d)))[0]
    R = np.linalg.qr(rng.standard_normal((d, d)))[0]
    return X, X @ (Q * np.asarray(sizes, float) @ R).T


PROBLEMS = {
    "square": problem(20, 4, 4),
    "tall": problem(20, 3, 5),
    "wide": problem(20, 5, 2),
    "rank-deficient": problem(20, 5, 4, rank=3),
    "fewer rows than columns": problem(3, 5, 4),
    "one example": problem(1, 3, 2),
    "one input": problem(10, 1, 3),
    "one output": problem(10, 3, 1),
    "repeated singular values": with_target([2, 2, 2, 1]),
}
WIDTHS = [(1, 1), (2, 1), (4, 1), (9, 1), (2, 2), (4, 2), (6, 2), (6, 3), (12, 3), (8, 4), (8, 8)]


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize(("width", "block_size"), WIDTHS)
class TestEverywhere:
    def test_certificate(self, name, width, block_size):
        X, Y = PROBLEMS[name]
        for p in (0.0, 1e-6, 0.3, 0.8, 1 - 1e-6):
            found = solve(X, Y, p, width, block_size)
            value = loss(found.outgoing, found.incoming, X, Y, p / (1 - p), block_size)
            scale = (Y**2).sum() / len(Y)
            np.testing.assert_allclose(found.value, value, atol=1e-10 * scale)
            assert found.gap >= 0
            assert found.value == found.lower_bound + found.gap
            product = found.outgoing @ found.incoming.T
            np.testing.assert_allclose(
                product, found.coefficients, atol=1e-10 * (1 + abs(product).max())
            )
            assert found.outgoing.shape == (Y.shape[1], width)
            assert found.incoming.shape == (X.shape[1], width)
            if block_size == 1:
                assert found.gap <= 1e-14 * scale
                assert found.attained

    def test_equalised_and_balanced(self, name, width, block_size):
        X, Y = PROBLEMS[name]
        found = solve(X, Y, 0.3, width, block_size)
        C = X.T @ X / len(X)
        scores = importance(found.outgoing, found.incoming, C, block_size)
        if block_size == 1:
            np.testing.assert_allclose(scores, scores.mean(), atol=1e-12 * (1 + scores.max()))
            outer = np.linalg.norm(found.outgoing, axis=0)
            inner = np.sqrt(np.einsum("ij,ik,kj->j", found.incoming, C, found.incoming))
            np.testing.assert_allclose(outer, inner, atol=1e-10 * (1 + outer.max()))
        elif found.attained:
            np.testing.assert_allclose(scores, scores.mean(), atol=1e-3 * (1 + scores.max()))


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize(("width", "block_size"), [(2, 1), (5, 1), (4, 2), (6, 3)])
@pytest.mark.parametrize("p", [0.05, 0.4])
def test_not_beaten_by_descent_from_many_starts(name, width, block_size, p):
    X, Y = PROBLEMS[name]
    variance = p / (1 - p)
    best = best_by_descent(X, Y, variance, width, block_size, starts=3)
    found = solve(X, Y, p, width, block_size)
    scale = (Y**2).sum() / len(Y)
    assert found.lower_bound <= best + 1e-9 * scale
    assert found.value <= best + 1e-8 * scale
    if block_size == 1:
        np.testing.assert_allclose(found.value, best, atol=1e-6 * scale)


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("width", [1, 2, 5, 20])
def test_equals_the_papers_closed_form(name, width):
    X, Y = PROBLEMS[name]
    for p in (1e-6, 0.3, 0.9):
        W, rank, threshold = naive_minimum(X, Y, p, width)
        found = solve(X, Y, p, width)
        if name != "repeated singular values":  # there the minimiser is not unique
            np.testing.assert_allclose(found.coefficients, W, atol=1e-9)
        assert found.rank == rank
        if rank < min(width, np.linalg.matrix_rank(X), Y.shape[1]):
            np.testing.assert_allclose(found.threshold, threshold, rtol=1e-9)


class TestWidthGap:
    """Theory §2.3: a fixed width does not always reach the convex bound."""

    @pytest.mark.parametrize(
        ("sizes", "bound", "best"),
        [([1.9, 1.3, 0.8, 0.3], 1.066731, 1.067308), ([3, 1, 1, 1], 2.1049, 2.3077)],
    )
    def test_both_examples(self, sizes, bound, best):
        found = Moments.of_target(np.diag(sizes)).solve(0.3 / 1.3, 4, 2)
        assert found.lower_bound == pytest.approx(bound, abs=5e-5)
        assert found.value == pytest.approx(best, abs=5e-5)
        assert not found.attained
        assert "gap" in str(found)
        descended = best_by_descent(np.eye(4), np.diag(sizes), 0.3, 4, 2, starts=30) * 4
        assert found.value <= descended + 1e-9

    @pytest.mark.parametrize(
        ("width", "value"), [(3, 21.39), (6, 20.675714), (9, 20.665), (30, 20.665)]
    )
    def test_widths_of_the_papers_example(self, width, value):
        sizes = np.diag([5, 3, 2.5, 2, 1, 0.5, 0.2])
        found = Moments.of_target(sizes).solve(0.4, width, 3, adaptive=True)
        assert found.value == pytest.approx(value, abs=1e-6)
        if width != 3:
            assert found.lower_bound == pytest.approx(20.665, abs=1e-9)
            np.testing.assert_allclose(
                found.singular_values, [3, 1.75, 1.25, 0.75, 0, 0, 0], atol=1e-12
            )
        assert found.attained == (width != 6)

    @pytest.mark.parametrize("blocks", [3, 4, 6])
    def test_closes_with_more_blocks(self, blocks):
        rng = np.random.default_rng(blocks)
        for _ in range(5):
            sizes = np.sort(rng.exponential(size=6))[::-1]
            found = Moments.of_target(np.diag(sizes)).solve(0.3, 2 * blocks, 2)
            tail = (found.singular_values > 0).sum()
            if tail <= blocks:  # enough room in every direction
                assert found.gap <= 1e-9 * (sizes**2).sum()

    def test_one_block_is_plain_shrinkage(self):
        X, Y = PROBLEMS["square"]
        found = solve(X, Y, 0.5, 4, 4)
        np.testing.assert_allclose(found.coefficients, np.linalg.lstsq(X, Y)[0].T / 2, atol=1e-12)
        assert found.gap == 0


class TestLimits:
    def test_no_dropout_is_reduced_rank_regression(self):
        X, Y = PROBLEMS["square"]
        full = np.linalg.lstsq(X, Y)[0].T
        np.testing.assert_allclose(solve(X, Y, 0.0, 4).coefficients, full, atol=1e-12)
        assert solve(X, Y, 0.0, 2).rank == 2
        np.testing.assert_allclose(solve(X, Y, 1e-9, 4).coefficients, full, atol=1e-6)

    def test_almost_all_dropped(self):
        X, Y = PROBLEMS["square"]
        found = solve(X, Y, 1 - 1e-9, 4)
        assert abs(found.coefficients).max() < 1e-6
        assert found.value == pytest.approx((Y**2).sum() / len(Y), rel=1e-6)

    def test_zero_data(self):
        X, Y = np.zeros((5, 3)), np.ones((5, 2))
        for block_size in (1, 2):
            found = solve(X, Y, 0.3, 4, block_size)
            assert not found.coefficients.any()
            assert (found.rank, found.threshold, found.gap) == (0, 0.0, 0.0)
            assert found.value == 2
        assert solve(np.ones((5, 3)), np.zeros((5, 2)), 0.3, 4, 2).rank == 0

    def test_constant_input(self):
        found = solve(np.ones((5, 3)), np.full((5, 2), 3.0), 0.0, 2)
        np.testing.assert_allclose(found.coefficients, 1, atol=1e-12)  # the smallest norm

    def test_units_of_measurement_do_not_decide_the_rank(self):
        X, Y = problem(30, 4, 3)
        scales = np.array([1e-9, 1, 1e6, 1e3])
        one, other = solve(X, Y, 0.3, 4), solve(X * scales, Y, 0.3, 4)
        np.testing.assert_allclose(other.coefficients * scales, one.coefficients, atol=1e-9)

    @pytest.mark.parametrize("power", [6, 9, 12])
    def test_ill_conditioned_inputs(self, power):
        rng = np.random.default_rng(0)
        Q, R = (np.linalg.qr(rng.standard_normal(s))[0] for s in ((60, 5), (5, 5)))
        X = Q * np.logspace(0, -power, 5) @ R
        Y = rng.standard_normal((60, 3))
        found = solve(X, Y, 0.3, 5)
        # Fitted values are well determined even where the coefficients are not.
        expected = np.linalg.svd(Y.T @ np.linalg.svd(X, full_matrices=False)[0], compute_uv=False)
        np.testing.assert_allclose(found.target_singular_values, expected / np.sqrt(60), rtol=1e-3)
        assert found.value == pytest.approx(
            objective(found.outgoing, found.incoming, X, Y, 0.3), rel=1e-6
        )

    def test_adaptive_rate_does_not_fade_with_the_width(self):
        X, Y = PROBLEMS["square"]
        maps = [solve(X, Y, 0.4, r, adaptive=True).coefficients for r in (4, 8, 64)]
        for W in maps[1:]:
            np.testing.assert_allclose(W, maps[0], atol=1e-12)
        faded = [np.linalg.norm(solve(X, Y, 0.4, r).coefficients) for r in (4, 8, 64)]
        assert faded == sorted(faded)
        blocks = solve(X, Y, 0.4, 12, 2, adaptive=True)
        keep = 1 - blocks.p
        assert keep == pytest.approx(2 * 0.6 / (12 - (12 - 2) * 0.6))
        value = objective(blocks.outgoing, blocks.incoming, X, Y, blocks.p, 2)
        assert blocks.value == pytest.approx(value)


class TestLaws:
    @settings(deadline=None, max_examples=30)
    @given(st.integers(0, 10**6), st.integers(1, 5), st.floats(0.05, 0.9))
    def test_rotations_of_the_outputs_rotate_the_solution(self, seed, width, p):
        X, Y = problem(12, 3, 4, seed=seed)
        Q = np.linalg.qr(np.random.default_rng(seed).standard_normal((4, 4)))[0]
        one, other = solve(X, Y, p, width), solve(X, Y @ Q.T, p, width)
        np.testing.assert_allclose(other.coefficients, Q @ one.coefficients, atol=1e-10)

    @settings(deadline=None, max_examples=30)
    @given(st.integers(0, 10**6), st.floats(0.01, 100))
    def test_scales_with_the_targets(self, seed, c):
        X, Y = problem(12, 3, 4, seed=seed)
        one, other = solve(X, Y, 0.4, 3), solve(X, c * Y, 0.4, 3)
        np.testing.assert_allclose(other.coefficients, c * one.coefficients, atol=1e-10 * c)
        assert other.value == pytest.approx(c**2 * one.value)

    @settings(deadline=None, max_examples=30)
    @given(st.integers(0, 10**6), st.sampled_from([(4, 1), (8, 2), (4, 4)]))
    def test_shrinks_more_as_p_grows(self, seed, shape):
        X, Y = problem(12, 4, 4, seed=seed)
        m = Moments().update(X, Y)
        norms = [m.solve(p, shape[0], 1).singular_values.sum() for p in (0, 0.1, 0.4, 0.7, 0.95)]
        assert norms == sorted(norms, reverse=True)

    def test_singular_values_are_the_prox_of_the_target(self):
        X, Y = PROBLEMS["tall"]
        m = np.linalg.svd(Y.T @ np.linalg.qr(X)[0], compute_uv=False) / np.sqrt(len(X))
        for width, b in ((6, 1), (6, 2), (6, 6)):
            found = solve(X, Y, 0.4, width, b)
            expected = prox_k_support(m, b, (0.4 / 0.6) / (width / b))
            np.testing.assert_allclose(found.singular_values, expected, atol=1e-12)


class TestTruncation:
    @pytest.mark.parametrize(
        ("width", "block_size", "adaptive"), [(64, 1, False), (64, 4, True), (20, 1, False)]
    )
    def test_equals_the_dense_route(self, monkeypatch, width, block_size, adaptive):
        rng = np.random.default_rng(0)
        Q, R = (np.linalg.qr(rng.standard_normal((500, 500)))[0] for _ in range(2))
        target = Q * (10 * 0.7 ** np.arange(500)) @ R
        moments = Moments.of_target(target)
        short = moments.solve(0.5, width, block_size, adaptive)
        assert short.target_singular_values.size < 100  # it was truncated
        monkeypatch.setattr(svd_module, "_SMALL", 10**9)
        dense = moments.solve(0.5, width, block_size, adaptive)
        assert dense.target_singular_values.size == 500
        assert short.rank == dense.rank
        atol = 1e-8 if block_size == 1 else 1e-6
        np.testing.assert_allclose(short.coefficients, dense.coefficients, atol=atol)
        np.testing.assert_allclose(short.value, dense.value, rtol=1e-10)
        np.testing.assert_allclose(short.threshold, dense.threshold, rtol=1e-8)
        np.testing.assert_allclose(short.singular_values, dense.singular_values, atol=1e-9)

    def test_flat_spectra_take_the_dense_route(self):
        target = np.random.default_rng(0).standard_normal((420, 410))
        found = Moments.of_target(target).solve(0.5, 400)
        assert found.target_singular_values.size == 410

    def test_repeated_singular_values_are_not_missed(self):
        sizes = np.full(1000, 1e-6)
        sizes[:40] = 5
        found = Moments.of_target(np.diag(sizes)).solve(0.5, 64)
        assert found.rank == 40
        assert found.target_singular_values.size < 1000

    def test_zero_target(self):
        found = Moments.of_target(np.zeros((450, 450))).solve(0.5, 64)
        assert found.rank == 0


class TestKinds:
    def test_tensors(self):
        X, Y = PROBLEMS["square"]
        found = solve(torch.tensor(X, dtype=torch.float32), torch.tensor(Y), 0.3, 4, 2)
        plain = solve(X.astype(np.float32), Y, 0.3, 4, 2)
        for name in ("coefficients", "outgoing", "incoming", "singular_values", "intercept"):
            tensor = getattr(found, name)
            assert tensor.dtype == torch.float64
            np.testing.assert_allclose(tensor.numpy(), getattr(plain, name), atol=1e-12)
        assert isinstance(found.value, float)
        torch.testing.assert_close(
            found.predict(torch.tensor(X)), torch.tensor(X) @ found.coefficients.T
        )

    def test_integers_lists_orders_and_no_writes(self):
        X, Y = (np.round(3 * a).astype(int) for a in PROBLEMS["square"])
        copies = X.copy(), Y.copy()
        expected = solve(X.astype(float), Y.astype(float), 0.3, 4).coefficients
        for x, y in (
            (X, Y),
            (X.tolist(), Y.tolist()),
            (np.asfortranarray(X), Y.astype(np.float32)),
        ):
            np.testing.assert_allclose(solve(x, y, 0.3, 4).coefficients, expected, atol=1e-10)
        np.testing.assert_array_equal(X, copies[0])
        wide = PROBLEMS["fewer rows than columns"][0]
        before = wide.copy()
        solve(wide, PROBLEMS["fewer rows than columns"][1], 0.3, 4)
        np.testing.assert_array_equal(wide, before)

    def test_sparse_designs(self):
        # One-hot rows: the products cost what the non-zeros cost, the answer is the same.
        rng = np.random.default_rng(0)
        X = np.zeros((4000, 300))
        X[np.arange(4000), rng.integers(0, 300, 4000)] = 1
        Y = rng.standard_normal((4000, 3))
        dense = X + 0.0
        dense[:64] += 1e-300  # no longer sparse to the eye
        one, other = solve(X, Y, 0.3, 3), solve(dense, Y, 0.3, 3)
        np.testing.assert_allclose(one.coefficients, other.coefficients, atol=1e-10)


class TestBadInput:
    def test_data(self):
        X, Y = problem(6, 3, 2)
        bad = Y.copy()
        bad[2, 1] = np.nan
        with pytest.raises(ValueError, match=r"Y has to be finite, but holds nan at \[2, 1\]"):
            solve(X, bad, 0.3, 2)
        with pytest.raises(ValueError, match="X has to be finite, but holds inf"):
            solve(np.where(X > 1, np.inf, X), Y, 0.3, 2)
        with pytest.raises(ValueError, match="X has 5 rows and Y has 6"):
            solve(X[:5], Y, 0.3, 2)
        with pytest.raises(ValueError, match="X has to be 2-D"):
            solve(X[:, 0], Y, 0.3, 2)
        with pytest.raises(ValueError, match="Y has to be 2-D"):
            solve(X, Y[:, 0], 0.3, 2)
        with pytest.raises(ValueError, match="X has to hold data, but is empty"):
            solve(X[:0], Y[:0], 0.3, 2)
        with pytest.raises(TypeError, match="X has to hold real numbers"):
            solve(X.astype(str), Y, 0.3, 2)
        with pytest.raises(TypeError, match="X has to hold real numbers, but got dtype complex"):
            solve(X + 1j, Y, 0.3, 2)

    @pytest.mark.parametrize("p", [-0.1, 1.5, float("nan")])
    def test_rate(self, p):
        with pytest.raises(ValueError, match="dropout probability has to be between 0 and 1"):
            solve(np.eye(2), np.eye(2), p, 2)

    def test_rate_one_and_types(self):
        with pytest.raises(ValueError, match="p = 1 drops every unit"):
            solve(np.eye(2), np.eye(2), 1, 2)
        with pytest.raises(TypeError, match="p has to be a number"):
            solve(np.eye(2), np.eye(2), "0.5", 2)

    def test_width(self):
        with pytest.raises(ValueError, match="width has to be at least 1, but got 0"):
            solve(np.eye(2), np.eye(2), 0.3, 0)
        with pytest.raises(TypeError, match="width has to be an int, but got float"):
            solve(np.eye(2), np.eye(2), 0.3, 2.0)
        with pytest.raises(ValueError, match="3 does not divide 4; use a width of 3 or 6"):
            solve(np.eye(2), np.eye(2), 0.3, 4, 3)
        with pytest.raises(ValueError, match="block_size has to be at least 1"):
            solve(np.eye(2), np.eye(2), 0.3, 4, 0)
