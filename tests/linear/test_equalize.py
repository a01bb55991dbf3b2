"""Equalisation: the same map, equal importance, to rounding."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from droplens.linear import equalize, importance, nuclear_norm


def factors(d_out, d_in, r, seed=0, rank=None):
    rng = np.random.default_rng(seed)
    U, V = rng.standard_normal((d_out, r)), rng.standard_normal((d_in, r))
    if rank is not None:
        U[:, rank:] = 0
    return U, V


CASES = {
    "square": (4, 4, 4, None),
    "tall": (7, 3, 3, None),
    "wide": (2, 9, 5, None),
    "wider than the rank": (3, 3, 17, None),
    "dead units": (5, 6, 4, 2),
    "one unit": (5, 6, 1, None),
    "all dead": (5, 6, 3, 0),
    "broad": (60, 50, 200, None),
}


@pytest.mark.parametrize("case", CASES)
def test_same_map_and_equal_importance(case):
    d_out, d_in, r, rank = CASES[case]
    U, V = factors(d_out, d_in, r, rank=rank)
    even = equalize(U, V)
    W = U @ V.T
    np.testing.assert_allclose(even.outgoing @ even.incoming.T, W, atol=1e-12 * (1 + abs(W).max()))
    share = nuclear_norm(W) / r
    np.testing.assert_allclose(
        importance(even.outgoing, even.incoming), share, rtol=1e-12, atol=1e-13
    )
    # Balanced: both factors have the same Gram matrix.
    gram = even.outgoing.T @ even.outgoing
    np.testing.assert_allclose(gram, even.incoming.T @ even.incoming, atol=1e-12 * (1 + gram.max()))


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 8), st.integers(0, 10**6))
def test_penalty_reaches_its_least_value(d_out, d_in, r, seed):
    U, V = factors(d_out, d_in, r, seed)
    even = equalize(U, V)
    penalty = (importance(even.outgoing, even.incoming) ** 2).sum()
    np.testing.assert_allclose(penalty, nuclear_norm(U @ V.T) ** 2 / r, rtol=1e-11)
    assert penalty <= (importance(U, V) ** 2).sum() * (1 + 1e-12)


def test_at_width_1000():
    U, V = factors(300, 400, 1000)
    even = equalize(U, V)
    scores = importance(even.outgoing, even.incoming)
    assert np.ptp(scores) / scores.mean() < 1e-12


@pytest.mark.parametrize("rank", [5, 3])
def test_with_a_metric(rank):
    rng = np.random.default_rng(1)
    X = rng.standard_normal((20, rank)) @ rng.standard_normal((rank, 5))
    C = X.T @ X / 20
    U, V = factors(4, 5, 6)
    even = equalize(U, V, C)
    scores = importance(even.outgoing, even.incoming, C)
    assert np.ptp(scores) / scores.mean() < 1e-10
    # The function is kept on the range of C.
    np.testing.assert_allclose(X @ even.incoming @ even.outgoing.T, X @ V @ U.T, atol=1e-10)
    direct = [np.linalg.norm(U[:, i]) * np.sqrt(V[:, i] @ C @ V[:, i]) for i in range(6)]
    np.testing.assert_allclose(importance(U, V, C), direct)


def test_tied_weights_are_rotated():
    U = np.random.default_rng(0).standard_normal((5, 4))
    even = equalize(U).outgoing
    np.testing.assert_allclose(even @ even.T, U @ U.T, atol=1e-13)
    np.testing.assert_allclose(importance(even), (U**2).sum() / 4, rtol=1e-13)


def test_rotating_unbalanced_factors_is_not_enough():
    # P1 states the rotation on (U, V) directly; U = diag(2, 1), V = I shows that it needs balance.
    U, V = np.diag([2.0, 1.0]), np.eye(2)
    best = np.inf
    for angle in np.linspace(0, np.pi, 721):
        R = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        best = min(best, (importance(U @ R, V @ R) ** 2).sum())
    assert best > nuclear_norm(U) ** 2 / 2 + 0.4
    even = equalize(U, V)
    np.testing.assert_allclose((importance(even.outgoing, even.incoming) ** 2).sum(), 4.5)


def test_blocks_are_scored_together():
    U, V = factors(4, 5, 6)
    direct = [np.linalg.norm(U[:, s : s + 3] @ V[:, s : s + 3].T) for s in (0, 3)]
    np.testing.assert_allclose(importance(U, V, block_size=3), direct)


def test_tensors_in_tensors_out():
    U, V = (torch.tensor(f, dtype=torch.float32) for f in factors(4, 5, 3))
    even = equalize(U, V)
    assert isinstance(even.outgoing, torch.Tensor)
    assert isinstance(importance(U, V), torch.Tensor)
    torch.testing.assert_close(
        even.outgoing @ even.incoming.T, (U @ V.T).double(), atol=1e-5, rtol=1e-5
    )


def test_bad_input():
    U, V = factors(4, 5, 3)
    with pytest.raises(ValueError, match="got 3 and 2 columns"):
        equalize(U, V[:, :2])
    with pytest.raises(ValueError, match="metric has to be symmetric"):
        equalize(U, V, np.triu(np.ones((5, 5))))
    with pytest.raises(ValueError, match=r"metric has to be positive semidefinite.*-1"):
        equalize(U, V, -np.eye(5))
    with pytest.raises(ValueError, match=r"metric has to be of shape \(5, 5\)"):
        equalize(U, V, np.eye(4))
    with pytest.raises(ValueError, match="give incoming= as well"):
        equalize(U, metric=np.eye(4))
    with pytest.raises(ValueError, match="outgoing has to be finite"):
        equalize(U * np.nan, V)
    with pytest.raises(ValueError, match="block_size has to divide width"):
        importance(U, V, block_size=2)
