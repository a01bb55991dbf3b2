"""Peak memory of one measure, in a process of its own: `python -m benchmarks._peaks NAME`."""

import sys

import scipy.sparse.linalg  # noqa: F401  # loaded before the memory is looked at
import scipy.stats  # noqa: F401
import torch
from torch import nn

from benchmarks._memory import kilobytes
from droplens import measure

LOSS = nn.CrossEntropyLoss()


def network():
    return nn.Sequential(
        nn.Linear(256, 512), nn.ReLU(), nn.Dropout(0.5), nn.Linear(512, 512), nn.ReLU(),
        nn.Dropout(0.5), nn.Linear(512, 10),
    )  # fmt: skip


def training_step(model, data):
    optimizer = torch.optim.Adam(model.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        LOSS(model(data[0]), data[1]).backward()
        optimizer.step()


def trajectory(model, data):
    """Five checkpoints are the caller's own: what is counted starts after them."""
    states = [{n: p.detach() * (1 + k / 9) for n, p in model.named_parameters()} for k in range(5)]
    before = peak()
    measure.variance_flatness(model, states, data, LOSS, 2)
    return before


MEASURES = {
    "training step": training_step,
    "flatness": lambda m, d: measure.flatness(m, d, LOSS, 3, (0.0, 1.0)),
    "flatness, expected": lambda m, d: measure.flatness(
        m, d, LOSS, 3, (0.0, 1.0), "expected", draws=3
    ),
    "plane": lambda m, d: measure.plane(m, d, LOSS, points=(0.0, 1.0)),
    "interpolation": lambda m, d: measure.interpolation(m, m, d, LOSS, 3),
    "sharpness": lambda m, d: measure.sharpness(m, d, LOSS, (0.1,), (0.1,), directions=2),
    "hessian": lambda m, d: measure.hessian(m, d, LOSS, 5, probes=16),
    "hessian, from a list of batches": lambda m, d: measure.hessian(m, [d], LOSS, 5, probes=16),
    "hessian, expected": lambda m, d: measure.hessian(m, d, LOSS, 1, "expected", probes=2, draws=2),
    "spectral density": lambda m, d: measure.spectral_density(m, d, LOSS, probes=2, steps=3),
    "spectral density, expected": lambda m, d: measure.spectral_density(
        m, d, LOSS, masks="expected", probes=2, steps=3
    ),
    "fisher": lambda m, d: measure.fisher(m, d, LOSS),
    "fisher, sampled": lambda m, d: measure.fisher(m, d, LOSS, "sampled", draws=3),
    "fisher, expected": lambda m, d: measure.fisher(m, d, LOSS, masks="expected", draws=3),
    "fisher, second derivative": lambda m, d: measure.fisher(
        m, d, LOSS, "sampled_hessian", draws=2
    ),
    "fisher spectrum": lambda m, d: measure.fisher_spectrum(
        m, d, LOSS, 2, probes=2, steps=3, damping=0.1
    ),
    "variance and flatness": trajectory,
}


def peak():
    """The process's highest memory so far, in MiB."""
    return kilobytes("VmHWM") / 1024


def main(name):
    torch.manual_seed(0)
    model = network()
    data = torch.randn(2048, 256), torch.randint(10, (2048,))
    # The first call of anything loads code.
    small = nn.Sequential(nn.Linear(4, 20), nn.ReLU(), nn.Dropout(0.5), nn.Linear(20, 3))
    MEASURES[name](small, (torch.randn(30, 4), torch.randint(3, (30,))))
    before = peak()
    told = MEASURES[name](model, data)
    print(peak() - (told if isinstance(told, float) else before))


if __name__ == "__main__":
    main(sys.argv[1])
