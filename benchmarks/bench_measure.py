"""Measures against what they replace: `python -m benchmarks.bench_measure`."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import torch
from torch import nn

from benchmarks._peaks import MEASURES
from benchmarks._timing import cpu_ratio, row, seconds
from droplens import data, measure, training
from droplens.products import differentiable_gradient, hessian_product


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

    def product():
        return hessian_product(gradient, parameters, vector)

    exact = cpu_ratio(lambda: measure.fisher(network, (x, y), loss), product)
    one = cpu_ratio(product, lambda: torch.autograd.grad(loss(network(x), y), parameters))
    return exact / 98, one


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

    return cpu_ratio(lambda: measure.hessian(network, (x, y), loss, probes=0), theirs, 9)


def peak_memory():
    """Highest memory of every measure over that of training steps, each in its own process."""
    # Large blocks go back to the system at once, so that the highest is what was held together.
    environment = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "OMP_NUM_THREADS": "1",
    }

    def peak(name):
        command = [sys.executable, "-m", "benchmarks._peaks", name]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return float(done.stdout.split()[-1])

    step = peak("training step")
    return {name: peak(name) / step for name in MEASURES if name != "training step"}


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
    with PeakMemory() as memory:
        taken = seconds(lambda: measure.condensation(weights))
    # The weights themselves count too.
    return (memory.bytes + weights.nbytes) / 2**30, taken


def main():
    fisher, product = fisher_and_products()
    row("exact Fisher, 64-256-256-10, 1,797 digits, over 98 products", fisher, 0.06)
    row("one Hessian product over one gradient", product, 2)
    top = top_eigenvalues()
    if top is None:
        print("top five eigenvalues over curvlinops + eigsh | curvlinops is not installed | 0.6")
    else:
        row("top five eigenvalues over curvlinops + eigsh", top, 0.6)
    for name, peak in peak_memory().items():
        row(f"peak memory over that of a training step: {name}", peak, 2)
    gib, taken = condensation_memory()
    row(f"condensation of 100,000 neurons × 256, GiB with the weights ({taken:.0f} s)", gib, 1)


if __name__ == "__main__":
    main()
