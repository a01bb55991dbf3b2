"""The closed world against what it replaces: `python -m benchmarks.bench_linear`."""

import subprocess
import sys
import textwrap
import time

import numpy as np
import torch

from benchmarks._timing import ratio, row, seconds
from droplens.linear import Moments, objective, prox_k_support, solve
from droplens.linear import _svd as svd_module


def teacher(d_in, d_out, n, decay, noise=0.1, seed=0):
    """P1's experiment: white inputs, a target of uniform subspaces and decaying spectrum."""
    rng = np.random.default_rng(seed)
    k = min(d_in, d_out)
    left = np.linalg.qr(rng.standard_normal((d_out, k)))[0]
    right = np.linalg.qr(rng.standard_normal((d_in, k)))[0]
    X = rng.standard_normal((n, d_in))
    Y = X @ (right * decay ** np.arange(k)) @ left.T + noise * rng.standard_normal((n, d_out))
    return X, Y


def moments_and_svd(X, Y):
    """The limit: form the two moments, and one dense SVD."""
    n = len(X)
    X.T @ X / n
    yx = Y.T @ X / n
    np.linalg.svd(yx, full_matrices=False)


def tall(n=100_000, d_in=200, d_out=150):
    X, Y = teacher(d_in, d_out, n, 0.95)
    ours = ratio(lambda: solve(X, Y, 0.3, 64), lambda: moments_and_svd(X, Y), 5)
    streamed = ratio(
        lambda: Moments().update(X, Y).solve(0.3, 64), lambda: moments_and_svd(X, Y), 5
    )
    return ours, streamed


def truncated(d=4000):
    """A 4000 × 4000 target with a fast-decaying spectrum, by both routes."""
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.standard_normal((d, d)))[0] for _ in range(2))
    target = (left * (10 * 0.85 ** np.arange(d))) @ right
    moments = Moments.of_target(target)
    short = moments.solve(0.5, 500)
    ours = seconds(lambda: moments.solve(0.5, 500))
    small, svd_module._SMALL = svd_module._SMALL, 10**9
    start = time.perf_counter()
    dense = moments.solve(0.5, 500)
    whole = time.perf_counter() - start
    svd_module._SMALL = small
    error = float(np.abs(short.coefficients - dense.coefficients).max())
    X, Y = np.eye(d), np.ascontiguousarray(target.T)
    from_data = seconds(lambda: solve(X, Y, 0.5, 500))
    return ours / whole, from_data / whole, short.rank, error


class Descent:
    """Dropout SGD with momentum in plain torch, one mask an example, gradients written out."""

    def __init__(self, X, Y, p, width, rate, batch, momentum=0.9, seed=0):
        self.X, self.Y = torch.tensor(X, dtype=torch.float32), torch.tensor(Y, dtype=torch.float32)
        generator = torch.Generator().manual_seed(seed)
        self.generator, self.p, self.rate, self.batch = generator, p, rate, batch
        self.momentum = momentum
        self.U = torch.randn(Y.shape[1], width, generator=generator) / width**0.5
        self.V = torch.randn(X.shape[1], width, generator=generator) / X.shape[1] ** 0.5
        self.speeds = [torch.zeros_like(self.U), torch.zeros_like(self.V)]

    def steps(self, count):
        for _ in range(count):
            rows = torch.randint(len(self.X), (self.batch,), generator=self.generator)
            x, y = self.X[rows], self.Y[rows]
            mask = torch.empty(self.batch, self.U.shape[1])
            mask.bernoulli_(1 - self.p, generator=self.generator).div_(1 - self.p)
            hidden = (x @ self.V).mul_(mask)
            error = hidden @ self.U.T - y
            slopes = error.T @ hidden, x.T @ (error @ self.U).mul_(mask)
            for weight, speed, slope in zip((self.U, self.V), self.speeds, slopes, strict=True):
                speed.mul_(self.momentum).add_(slope, alpha=2 / self.batch)
                weight.sub_(speed, alpha=self.rate)

    def value(self, X, Y):
        U, V = self.U.double().numpy(), self.V.double().numpy()
        if not (np.isfinite(U).all() and np.isfinite(V).all()):
            return np.inf
        return objective(U, V, X, Y, self.p)


def descent_seconds(X, Y, p, width, optimum, tunings, limit):
    """Seconds of the best tuning until the objective is within 1% of the optimum, or the limit."""
    best = limit
    for batch, rate in tunings:
        descent = Descent(X, Y, p, width, rate, batch)
        spent = 0.0
        while spent < best:
            spent += seconds(lambda d=descent: d.steps(10))
            value = descent.value(X, Y)
            if value <= 1.01 * optimum:
                best = spent
                break
            if not value < 1e6 * optimum:
                break
    return best


def against_descent(d_in, width, d_out, n, tunings, limit):
    X, Y = teacher(d_in, d_out, n, 0.9 if d_in < 100 else 0.98)
    p = 1 / 3  # λ = .5
    found = solve(X, Y, p, width)
    ours = min(seconds(lambda: solve(X, Y, p, width)) for _ in range(5))
    theirs = descent_seconds(X, Y, p, width, found.value, tunings, limit)
    label = f"(solve {ours:.3g} s, SGD {'more than ' if theirs == limit else ''}{theirs:.3g} s)"
    return ours / theirs, label


def short_prox(values, k, beta):
    """A short direct reference: all breakpoints sorted, then the level by bisection over them."""
    m = np.abs(values)
    points = np.sort(np.concatenate([beta / m, (beta + 1) / m]))
    low, high = 0, len(points) - 1
    while high - low > 1:
        middle = (low + high) // 2
        if np.clip(points[middle] * m - beta, 0, 1).sum() < k:
            low = middle
        else:
            high = middle
    alpha0, alpha1 = points[low], points[high]
    sum0 = np.clip(alpha0 * m - beta, 0, 1).sum()
    sum1 = np.clip(alpha1 * m - beta, 0, 1).sum()
    alpha = alpha0 + (k - sum0) * (alpha1 - alpha0) / (sum1 - sum0)
    t = np.clip(alpha * m - beta, 0, 1)
    return np.sign(values) * t * m / (t + beta)


def prox():
    rng = np.random.default_rng(0)
    long, short = rng.standard_normal(10**6), rng.standard_normal(10**4)
    difference = np.abs(prox_k_support(short, 100, 0.7) - short_prox(short, 100, 0.7)).max()
    assert difference < 1e-12, difference
    rows = []
    for k in (1, 1000, 500_000):
        rows.append((k, ratio(lambda k=k: prox_k_support(long, k, 0.7), lambda: np.sort(long), 7)))
    direct = max(
        ratio(lambda k=k: prox_k_support(short, k, 0.7), lambda k=k: short_prox(short, k, 0.7), 50)
        for k in (1, 100, 2000)
    )
    return rows, direct


MEMORY = """
import resource, sys
import numpy as np
from droplens.linear import Moments

rows = int(sys.argv[1])
rng = np.random.default_rng(0)
def batches():
    X, Y = rng.standard_normal((10_000, 20), dtype=np.float32), np.ones((10_000, 5), np.float32)
    for _ in range(rows // 10_000):
        yield X, Y
moments = Moments.from_batches(batches())
assert moments.count == rows
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def memory():
    peaks = []
    for rows in (10**4, 10**7):
        command = [sys.executable, "-c", textwrap.dedent(MEMORY), str(rows)]
        out = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(int(out.stdout))
    return peaks[1] / peaks[0]


def main():
    print(f"threads: {torch.get_num_threads()}")
    print("what | ratio | limit")
    rows, direct = prox()
    for k, measured in rows:
        row(f"prox, d = 10^6, k = {k}, over one sort", measured, 3)
    row("prox, d = 10^4, over a short direct reference, worst of three k", direct, 1)
    ours, streamed = tall()
    row("solve, 100,000 x 200 -> 150, over moments + one SVD", ours, 1.3)
    row("Moments and solve, the same", streamed, 1.3)
    tunings = [(1000, 0.01), (1000, 0.02), (1000, 0.03), (250, 0.01), (100, 0.003)]
    measured, label = against_descent(80, 80, 120, 1000, tunings, 10.0)
    row(f"solve, 80-80-120, N = 1000, over tuned dropout SGD {label}", measured, 0.05)
    measured, label = against_descent(1000, 1000, 1000, 5000, [(1000, 0.02), (5000, 0.02)], 150.0)
    row(f"solve, 1000-1000-1000, N = 5000, over tuned dropout SGD {label}", measured, 0.01)
    row("memory of Moments over 10^7 rows, over that of 10^4", memory(), 1.05)
    ours, from_data, rank, error = truncated()
    row(f"solve, 4000 x 4000 target, rank {rank}, over the dense route", ours, 0.2)
    row("the same as data, X the identity", from_data, 0.2)
    row("the same, largest difference of coefficients", error, 1e-8)


if __name__ == "__main__":
    main()
