"""Measures against what they replace: `python -m benchmarks.bench_measure`."""

import statistics
import threading
import time
from pathlib import Path

import torch
from torch import nn

from droplens import data, measure, training
from droplens.products import differentiable_gradient, hessian_product


def seconds(function, repeats=7):
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def digits_network():
    """A trained 64-256-256-10 network and all 1,797 digits."""
    split = data.digits()
    network = training.initialise(
        lambda: nn.Sequential(
            nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
        ),
        1,
        seed=0,
    )
    trained = training.train(
        network, split.train, nn.CrossEntropyLoss(), training.Plan(10), seed=0
    ).networks[0]
    both = (split.train, split.test)
    return (
        trained,
        torch.cat([part.inputs for part in both]),
        torch.cat([part.targets for part in both]),
    )


def fisher_and_products():
    """Exact Fisher over 98 Hessian products; one product over one gradient."""
    network, x, y = digits_network()
    loss = nn.CrossEntropyLoss()
    parameters = list(network.parameters())
    vector = [torch.randn_like(p) for p in parameters]
    gradient = differentiable_gradient(loss(network(x), y), parameters)
    product = seconds(lambda: hessian_product(gradient, parameters, vector))
    one_gradient = seconds(lambda: torch.autograd.grad(loss(network(x), y), parameters))
    exact = seconds(lambda: measure.fisher(network, (x, y), loss))
    return exact / (98 * product), product / one_gradient, exact


def top_eigenvalues():
    """Our top five over curvlinops + eigsh (None where curvlinops is not installed)."""
    try:
        from curvlinops import HessianLinearOperator
    except ImportError:
        return None
    from scipy.sparse.linalg import eigsh

    network, x, y = digits_network()
    loss = nn.CrossEntropyLoss()

    def theirs():
        parameters = [p for p in network.parameters() if p.requires_grad]
        operator = HessianLinearOperator(network, loss, parameters, [(x, y)])
        return eigsh(operator.to_scipy(), k=5, which="LA", tol=1e-6)[0]

    ours = seconds(lambda: measure.hessian(network, (x, y), loss, probes=2), 3)
    return ours / seconds(theirs, 3)


class PeakMemory:
    """Highest resident memory while open, over the start, in bytes; sampled every 5 ms."""

    def __enter__(self):
        self.start = self.peak = self._now()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self):
        while not self.done.wait(0.005):
            self.peak = max(self.peak, self._now())

    @staticmethod
    def _now():
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    def __exit__(self, *_):
        self.done.set()
        self.thread.join()
        self.bytes = self.peak - self.start


def condensation_memory():
    """100,000 random neurons in 256 dimensions: the hardest case, nobody joins anybody."""
    weights = torch.randn(100_000, 256, generator=torch.Generator().manual_seed(0))
    start = time.perf_counter()
    with PeakMemory() as memory:
        result = measure.condensation(weights)
    taken = time.perf_counter() - start
    # The weights themselves count too.
    return (memory.bytes + weights.nbytes) / 2**30, taken, result.orientations


def main():
    print(f"threads: {torch.get_num_threads()}")
    print("what | measured | limit")
    fisher, product, exact = fisher_and_products()
    print(f"exact Fisher, 64-256-256-10, 1,797 digits, over 98 products | {fisher:.3f} | 0.06")
    print(f"  (seconds: {exact:.3f})")
    print(f"one Hessian product over one gradient | {product:.2f} | 2")
    top = top_eigenvalues()
    shown = "curvlinops is not installed" if top is None else f"{top:.2f}"
    print(f"top five eigenvalues over curvlinops + eigsh | {shown} | 0.6")
    gib, taken, orientations = condensation_memory()
    print(f"condensation of 100,000 neurons × 256, GiB with the weights | {gib:.2f} | 1")
    print(f"  (seconds: {taken:.1f}, orientations: {orientations})")


if __name__ == "__main__":
    main()
