"""Norms and prox against bisection, a convex solver, the index condition, and their own laws."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from droplens.linear import k_support_norm, nuclear_norm, prox_k_support
from tests.reference_linear import (
    k_support_norm_by_index,
    prox_by_bisection,
    prox_by_convex_solver,
)

VECTORS = {
    "theory": [5, 3, 2.5, 2, 1, 0.5, 0.2],
    "ties": [2, 2, 2, 1, 1],
    "all equal": [1, 1, 1, 1],
    "zeros": [0, 0, 0],
    "some zeros": [3, 0, 1, 0],
    "one unit": [4],
    "signs": [-3, 2, -1, 0.5],
    "far apart": [1e6, 1, 1e-6],
}
CASES = [
    pytest.param(np.array(v, float), k, beta, id=f"{name}, k={k}, beta={beta}")
    for name, v in VECTORS.items()
    for k in (1, 2, 3, 9)
    for beta in (0.0, 1e-6, 0.3, 2 / 3, 5.0, 1e6)
]
entries = st.floats(-1e3, 1e3).map(lambda x: round(x, 3))
vectors = arrays(np.float64, st.integers(1, 8), elements=entries)


class TestProx:
    def test_the_example_of_the_theory(self):
        found = prox_k_support(np.array(VECTORS["theory"]), 3, 2 / 3)
        np.testing.assert_allclose(found, [3, 1.75, 1.25, 0.75, 0, 0, 0], atol=1e-14)

    @pytest.mark.parametrize(("m", "k", "beta"), CASES)
    def test_equals_bisection_on_every_route(self, m, k, beta):
        expected = prox_by_bisection(m, k, beta)
        bound = 1e-12 * max(1, np.abs(m).max())
        np.testing.assert_allclose(prox_k_support(m, k, beta), expected, atol=bound)
        np.testing.assert_allclose(
            prox_k_support(m[None], k, beta, axis=-1)[0], expected, atol=bound
        )
        tensor = prox_k_support(torch.tensor(m), k, beta)
        np.testing.assert_allclose(tensor.numpy(), expected, atol=bound)

    @pytest.mark.parametrize("seed", range(40))
    def test_equals_a_general_convex_solver(self, seed):
        rng = np.random.default_rng(seed)
        m, k = rng.exponential(size=rng.integers(2, 7)), int(rng.integers(1, 6))
        beta = float(rng.choice([0.1, 0.7, 3.0]))
        np.testing.assert_allclose(
            prox_k_support(m, k, beta), prox_by_convex_solver(m, k, beta), atol=2e-6
        )

    @settings(deadline=None)
    @given(vectors, st.integers(1, 9), st.floats(0.01, 100))
    def test_minimises(self, m, k, beta):
        def cost(a):
            return 0.5 * ((a - m) ** 2).sum() + beta / 2 * k_support_norm(a, k) ** 2

        best = prox_k_support(m, k, beta)
        rng = np.random.default_rng(0)
        least = cost(best)
        for scale in (1e-3, 1e-1, 10):
            for _ in range(5):
                other = cost(best + scale * rng.standard_normal(m.size))
                assert other >= least - 1e-9 * (1 + least)

    @settings(deadline=None)
    @given(vectors, st.integers(1, 9), st.floats(0.01, 100), st.floats(0.01, 100))
    def test_shrinks_more_as_beta_grows(self, m, k, one, other):
        small, large = sorted((one, other))
        weak, strong = (k_support_norm(prox_k_support(m, k, b), k) for b in (small, large))
        assert strong <= weak * (1 + 1e-9) + 1e-12

    @settings(deadline=None)
    @given(vectors, st.integers(1, 9), st.floats(0, 100), st.floats(0.001, 1000))
    def test_scales_with_its_argument(self, m, k, beta, c):
        np.testing.assert_allclose(
            prox_k_support(c * m, k, beta), c * prox_k_support(m, k, beta), rtol=1e-9, atol=1e-9 * c
        )

    @settings(deadline=None)
    @given(vectors, vectors, st.integers(1, 9), st.floats(0, 100))
    def test_is_non_expansive(self, m, other, k, beta):
        n = min(m.size, other.size)
        m, other = m[:n], other[:n]
        moved = np.linalg.norm(prox_k_support(m, k, beta) - prox_k_support(other, k, beta))
        assert moved <= np.linalg.norm(m - other) * (1 + 1e-9) + 1e-9

    def test_k_beyond_the_support_only_scales(self):
        np.testing.assert_allclose(
            prox_k_support(np.array([3.0, 0, -1]), 2, 0.5), np.array([2.0, 0, -2 / 3])
        )

    def test_extreme_magnitudes(self):
        base = prox_k_support(np.array([5.0, 3, 2]), 2, 0.5)
        for c in (1e-200, 1e200):
            np.testing.assert_allclose(prox_k_support(c * np.array([5.0, 3, 2]), 2, 0.5), c * base)

    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_keeps_kind_and_precision(self, dtype):
        m = np.array([5, -3, 1], dtype)
        assert prox_k_support(m, 2, 0.5).dtype == dtype
        assert prox_k_support(m[None], 2, 0.5, axis=-1).dtype == dtype
        tensor = prox_k_support(torch.tensor(m), 2, 0.5)
        assert tensor.dtype == torch.tensor(m).dtype
        assert prox_k_support(np.array([5, 3]), 2, 0.5).dtype == np.float64

    def test_leaves_its_argument_alone(self):
        m = np.array([5.0, -3, 1])
        prox_k_support(m, 2, 0.5)
        assert m.tolist() == [5, -3, 1]

    def test_batches_along_any_axis(self):
        batch = np.random.default_rng(0).standard_normal((3, 5, 4))
        for axis in (0, 1, 2, -1):
            found = np.moveaxis(prox_k_support(batch, 2, 0.4, axis=axis), axis, -1)
            rows = np.moveaxis(batch, axis, -1)
            for index in np.ndindex(rows.shape[:2]):
                np.testing.assert_allclose(found[index], prox_k_support(rows[index], 2, 0.4))
            tensor = prox_k_support(torch.tensor(batch), 2, 0.4, axis=axis)
            np.testing.assert_allclose(np.moveaxis(tensor.numpy(), axis, -1), found)

    def test_fortran_order_and_empty(self):
        batch = np.asfortranarray(np.random.default_rng(0).standard_normal((4, 6)))
        np.testing.assert_allclose(
            prox_k_support(batch, 2, 0.4, axis=-1), prox_k_support(batch.copy("C"), 2, 0.4, axis=-1)
        )

    @pytest.mark.parametrize("k", [1, 2, 3, 7])
    def test_gradients(self, k):
        torch.manual_seed(0)
        rows = torch.randn(3, 6, dtype=torch.double, requires_grad=True)
        assert torch.autograd.gradcheck(lambda a: prox_k_support(a, k, 0.3, axis=-1), rows)
        assert torch.autograd.gradgradcheck(lambda a: prox_k_support(a, k, 0.3, axis=-1), rows)
        assert torch.autograd.gradcheck(
            lambda a: prox_k_support(a, k, 0.3), rows[0].detach().requires_grad_()
        )

    @pytest.mark.parametrize("k", [1, 2, 3])
    @pytest.mark.parametrize("shape", [(4, 3), (3, 5), (4, 4)])
    def test_gradients_of_the_spectral_prox(self, k, shape):
        torch.manual_seed(1)
        matrix = torch.randn(*shape, dtype=torch.double, requires_grad=True)
        assert torch.autograd.gradcheck(lambda a: prox_k_support(a, k, 0.3), matrix)

    @pytest.mark.parametrize("k", [1, 2, 3])
    def test_gradients_where_singular_values_repeat(self, k):
        sizes = torch.tensor([2.0, 2, 2, 0.5], dtype=torch.double)
        matrix = torch.diag(sizes).requires_grad_()
        assert torch.autograd.gradcheck(lambda a: prox_k_support(a, k, 0.3), matrix)

    def test_of_a_matrix_maps_its_singular_values(self):
        rng = np.random.default_rng(0)
        Q, R = (np.linalg.qr(rng.standard_normal((n, n)))[0] for n in (5, 3))
        sizes = np.array([4.0, 2, 0.1])
        found = prox_k_support(Q[:, :3] * sizes @ R, 2, 0.7)
        np.testing.assert_allclose(found, Q[:, :3] * prox_k_support(sizes, 2, 0.7) @ R, atol=1e-13)


class TestNorm:
    @pytest.mark.parametrize("name", VECTORS)
    @pytest.mark.parametrize("k", [1, 2, 3, 5, 9])
    def test_equals_the_index_condition(self, name, k):
        w = np.array(VECTORS[name], float)
        expected = k_support_norm_by_index(w, k)
        np.testing.assert_allclose(k_support_norm(w, k), expected, rtol=1e-12)
        np.testing.assert_allclose(float(k_support_norm(torch.tensor(w), k)), expected, rtol=1e-12)

    @settings(deadline=None)
    @given(vectors, st.integers(1, 9))
    def test_equals_the_index_condition_everywhere(self, w, k):
        np.testing.assert_allclose(
            k_support_norm(w, k), k_support_norm_by_index(w, k), rtol=1e-9, atol=1e-12
        )

    @settings(deadline=None)
    @given(vectors, st.integers(1, 8))
    def test_lies_between_its_limits_and_falls_with_k(self, w, k):
        one, two = np.abs(w).sum(), np.linalg.norm(w)
        np.testing.assert_allclose(k_support_norm(w, 1), one, rtol=1e-12)
        np.testing.assert_allclose(k_support_norm(w, w.size), two, rtol=1e-12)
        assert k_support_norm(w, k + 1) <= k_support_norm(w, k) * (1 + 1e-12)

    @settings(deadline=None)
    @given(vectors, vectors, st.integers(1, 8), st.floats(-5, 5))
    def test_is_a_norm(self, w, v, k, c):
        n = min(w.size, v.size)
        w, v = w[:n], v[:n]
        total = k_support_norm(w, k) + k_support_norm(v, k)
        assert k_support_norm(w + v, k) <= total * (1 + 1e-9) + 1e-9
        np.testing.assert_allclose(
            k_support_norm(c * w, k), abs(c) * k_support_norm(w, k), rtol=1e-9, atol=1e-12
        )

    def test_a_remembered_rule_of_the_paper_is_wrong(self):
        # Maximising the bracket over ρ instead of the index condition would give 10 (P4).
        np.testing.assert_allclose(k_support_norm(np.eye(4), 2) ** 2, 8)

    def test_of_a_matrix_is_unitarily_invariant(self):
        rng = np.random.default_rng(0)
        A = rng.standard_normal((5, 4))
        Q, R = (np.linalg.qr(rng.standard_normal((n, n)))[0] for n in (5, 4))
        sizes = np.linalg.svd(A, compute_uv=False)
        for k in (1, 2, 4, 8):
            np.testing.assert_allclose(k_support_norm(Q @ A @ R, k), k_support_norm(sizes, k))
        np.testing.assert_allclose(nuclear_norm(A), sizes.sum())
        np.testing.assert_allclose(k_support_norm(A, 4), np.linalg.norm(A))
        np.testing.assert_allclose(float(nuclear_norm(torch.tensor(A))), sizes.sum())

    def test_batches_and_kinds(self):
        batch = np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32)
        norms = k_support_norm(batch, 2, axis=0)
        assert norms.shape == (5,)
        assert norms.dtype == np.float32
        np.testing.assert_allclose(norms[1], k_support_norm(batch[:, 1], 2), rtol=1e-6)
        assert k_support_norm(torch.tensor(batch), 2, axis=-1).shape == (3,)
        assert float(k_support_norm(1e300 * np.array([3.0, 4.0]), 2)) == pytest.approx(5e300)

    @pytest.mark.parametrize("k", [1, 2, 3])
    def test_gradients(self, k):
        torch.manual_seed(0)
        matrix = torch.randn(4, 3, dtype=torch.double, requires_grad=True)
        assert torch.autograd.gradcheck(lambda a: k_support_norm(a, k), matrix)
        assert torch.autograd.gradcheck(lambda a: k_support_norm(a, k, axis=-1), matrix)

    def test_gradient_at_zero_is_zero(self):
        zero = torch.zeros(3, requires_grad=True)
        k_support_norm(zero, 2).backward()
        assert zero.grad.tolist() == [0, 0, 0]


@pytest.mark.parametrize("function", [k_support_norm, lambda v, k: prox_k_support(v, k, 0.5)])
class TestBadInput:
    def test_values(self, function):
        with pytest.raises(ValueError, match=r"values has to be finite, but holds nan at \[1\]"):
            function(np.array([1.0, np.nan]), 1)
        with pytest.raises(ValueError, match="values has to be finite, but holds inf"):
            function(torch.tensor([1.0, float("inf")]), 1)
        with pytest.raises(TypeError, match="values has to hold real numbers"):
            function(np.array(["a"]), 1)
        with pytest.raises(TypeError, match="values has to hold real numbers"):
            function(torch.tensor([1j]), 1)
        with pytest.raises(ValueError, match=r"vector or a matrix.*give axis="):
            function(np.zeros((2, 2, 2)), 1)

    def test_k(self, function):
        with pytest.raises(ValueError, match="k has to be at least 1, but got 0"):
            function(np.ones(2), 0)
        with pytest.raises(TypeError, match="k has to be an int, but got float"):
            function(np.ones(2), 1.0)


def test_bad_beta_and_axis():
    for beta in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="beta has to be finite and at least 0"):
            prox_k_support(np.ones(2), 1, beta)
    with pytest.raises(TypeError, match="beta has to be a number"):
        prox_k_support(np.ones(2), 1, "1")
    with pytest.raises(ValueError, match="axis 2 is not an axis"):
        prox_k_support(np.ones(2), 1, 0.5, axis=2)
