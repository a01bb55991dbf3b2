"""Slow, obvious twins of the closed world: bisection, convex solvers, enumeration, many starts."""

import itertools
import math

import numpy as np
from scipy.optimize import minimize


def prox_by_bisection(values, k, beta):
    """The water-filling of theory §2.2, its level found by halving an interval."""
    sizes = np.abs(np.asarray(values, dtype=np.float64))
    wanted = min(k, int((sizes > 0).sum()))
    if beta == 0 or wanted == 0:
        return np.asarray(values, dtype=np.float64)
    low, high = 0.0, (1 + beta) / sizes[sizes > 0].min() * 2
    for _ in range(2000):
        middle = (low + high) / 2
        if np.clip(middle * sizes - beta, 0, 1).sum() < wanted:
            low = middle
        else:
            high = middle
        if low == middle == high:
            break
    t = np.clip(high * sizes - beta, 0, 1)
    return np.sign(values) * t * sizes / (t + beta)


def prox_by_convex_solver(values, k, beta):
    """min over a, t of ½‖a − m‖² + (β/2) Σ a²/t, with 0 < t ≤ 1 and Σ t ≤ k, by SLSQP.

    a is eliminated: a = t m/(t + β), which leaves (β/2) Σ m²/(t + β), convex in t.
    """
    m = np.abs(np.asarray(values, dtype=np.float64))
    found = minimize(
        lambda t: beta / 2 * (m**2 / (t + beta)).sum(),
        np.full(m.size, min(1.0, k / m.size)),
        jac=lambda t: -beta / 2 * m**2 / (t + beta) ** 2,
        bounds=[(0, 1)] * m.size,
        constraints={
            "type": "ineq",
            "fun": lambda t: k - t.sum(),
            "jac": lambda t: -np.ones_like(t),
        },
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 1000},
    )
    t = found.x
    return np.sign(values) * t * m / (t + beta)


def k_support_norm_by_index(values, k):
    """Argyriou, Foygel, Srebro 2012: the unique index ρ with a_{ρ−1} > tail/(k − ρ + 1) ≥ a_ρ."""
    a = np.sort(np.abs(np.asarray(values, dtype=np.float64)))[::-1]
    k = min(k, a.size)
    for rho in range(1, k + 1):
        share = a[rho - 1 :].sum() / (k - rho + 1)
        before = math.inf if rho == 1 else a[rho - 2]
        if before > share >= a[rho - 1] * (1 - 1e-15):
            return math.sqrt((a[: rho - 1] ** 2).sum() + share**2 * (k - rho + 1))
    raise AssertionError("no index satisfies the condition")


def expected_loss_by_enumeration(outgoing, incoming, X, Y, masks, probabilities):
    """E_z ‖Y − X V diag(z/μ) Uᵀ‖²/n, one mask after the other."""
    masks, probabilities = np.asarray(masks, float), np.asarray(probabilities, float)
    mean = probabilities @ masks
    total = 0.0
    for mask, probability in zip(masks, probabilities, strict=True):
        total += probability * ((Y - (X @ incoming * (mask / mean)) @ outgoing.T) ** 2).sum()
    return total / len(X)


def all_coins(r, p, block_size=1):
    """Every mask of r units in blocks, with its probability."""
    blocks = r // block_size
    masks = [np.repeat(coins, block_size) for coins in itertools.product((0, 1), repeat=blocks)]
    chances = [
        math.prod(1 - p if coin else p for coin in coins)
        for coins in itertools.product((0, 1), repeat=blocks)
    ]
    return np.array(masks, float), np.array(chances)


def drop_connect_by_enumeration(outgoing, incoming, X, Y, p, weight):
    """E over every mask of the single weights."""
    dropped = outgoing if weight == "outgoing" else incoming
    total = 0.0
    for coins in itertools.product((0, 1), repeat=dropped.size):
        mask = np.array(coins, float).reshape(dropped.shape) / (1 - p)
        chance = math.prod(1 - p if coin else p for coin in coins)
        U = outgoing * mask if weight == "outgoing" else outgoing
        V = incoming * mask if weight == "incoming" else incoming
        total += chance * ((Y - X @ V @ U.T) ** 2).sum()
    return total / len(X)


def dropblock_masks(r, size, gamma):
    """Every mask of the overlapping DropBlock on a line of r units, with its probability."""
    size = min(size, r)
    starts = r - size + 1
    masks, chances = [], []
    for seeds in itertools.product((0, 1), repeat=starts):
        mask = np.ones(r)
        for start, seed in enumerate(seeds):
            if seed:
                mask[start : start + size] = 0
        masks.append(mask)
        chances.append(math.prod(gamma if seed else 1 - gamma for seed in seeds))
    return np.array(masks), np.array(chances)


def loss(outgoing, incoming, X, Y, variance, block_size):
    """(1/n)(‖Y − X V Uᵀ‖² + λ Σ_k ‖X V_k U_kᵀ‖²), block after block."""
    total = ((Y - X @ incoming @ outgoing.T) ** 2).sum()
    for start in range(0, outgoing.shape[1], block_size):
        part = slice(start, start + block_size)
        total += variance * ((X @ incoming[:, part] @ outgoing[:, part].T) ** 2).sum()
    return total / len(X)


def best_by_descent(X, Y, variance, width, block_size=1, starts=8, seed=0):
    """The smallest loss that L-BFGS finds from many starts, gradients written out."""
    rng = np.random.default_rng(seed)
    d_in, d_out, n = X.shape[1], Y.shape[1], len(X)
    shapes = (d_out, width), (d_in, width)
    cut = d_out * width

    def both(flat):
        U, V = flat[:cut].reshape(shapes[0]), flat[cut:].reshape(shapes[1])
        H = X @ V
        R = Y - H @ U.T
        value = (R**2).sum()
        grad_u, grad_h = -2 * R.T @ H, -2 * R @ U
        for start in range(0, width, block_size):
            part = slice(start, start + block_size)
            value += variance * ((H[:, part] @ U[:, part].T) ** 2).sum()
            grad_u[:, part] += 2 * variance * U[:, part] @ (H[:, part].T @ H[:, part])
            grad_h[:, part] += 2 * variance * H[:, part] @ (U[:, part].T @ U[:, part])
        return value / n, np.concatenate([grad_u.ravel(), (X.T @ grad_h).ravel()]) / n

    best = math.inf
    for _ in range(starts):
        scale = 10.0 ** rng.uniform(-1, 0.3)
        at = scale * rng.standard_normal(cut + d_in * width)
        options = {"maxiter": 1500, "maxfun": 3000, "ftol": 1e-16, "gtol": 1e-10}
        found = minimize(both, at, jac=True, method="L-BFGS-B", options=options)
        best = min(best, float(found.fun))
    return best


def naive_minimum(X, Y, p, width):
    """P1's closed form for single units, transcribed: rank, threshold and map."""
    variance = p / (1 - p)
    n = len(X)
    left, sizes, right = np.linalg.svd(X, full_matrices=False)
    kept = sizes > 1e-10 * sizes[0]
    T = Y.T @ left[:, kept]
    U, m, Vt = np.linalg.svd(T, full_matrices=False)
    rho, alpha = 0, 0.0
    for j in range(1, min(width, m.size) + 1):
        kappa = m[:j].mean()
        if m[j - 1] > variance * j * kappa / (width + variance * j):
            rho, alpha = j, variance * j * kappa / (width + variance * j)
        else:
            break
    a = np.where(np.arange(m.size) < rho, m - alpha, 0)
    W = (U * a) @ Vt @ (right[kept] / sizes[kept][:, None])
    return W, rho, alpha / math.sqrt(n)
