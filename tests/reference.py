"""Slow, obvious twins of the library's formulas, transcribed from the theory."""

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor


def all_coins(n: int, p: float) -> Iterator[tuple[float, Tensor]]:
    """Every outcome of n coins that fall 0 with probability p, with its probability."""
    for bits in itertools.product((0.0, 1.0), repeat=n):
        z = torch.tensor(bits, dtype=torch.float64)
        kept = int(z.sum())
        yield (1 - p) ** kept * p ** (n - kept), z


def enumerated_outputs(
    forward: Callable[[Tensor], Tensor], n_units: int, p: float
) -> tuple[Tensor, Tensor]:
    """Outputs under every mask over n_units units, shared law for one example: (M,), (M, ...)."""
    probabilities, outputs = [], []
    for probability, z in all_coins(n_units, p):
        probabilities.append(probability)
        outputs.append(forward(z / (1 - p)))
    return torch.tensor(probabilities, dtype=torch.float64), torch.stack(outputs)


def exact_parts(
    probabilities: Tensor,
    outputs: Tensor,
    undropped: Tensor,
    loss_of: Callable[[Tensor], Tensor],
    partition_of: Callable[[Tensor], Tensor],
) -> tuple[float, float, float]:
    """gap, spread, shift for one example by summing over every mask."""
    centre = (probabilities[:, None] * outputs).sum(0)
    mean_loss = sum(w * loss_of(f) for w, f in zip(probabilities, outputs, strict=True))
    mean_partition = sum(w * partition_of(f) for w, f in zip(probabilities, outputs, strict=True))
    gap = mean_loss - loss_of(undropped)
    spread = mean_partition - partition_of(centre)
    shift = loss_of(centre) - loss_of(undropped)
    return float(gap), float(spread), float(shift)


def gate_gauss_newton(
    f_of_gates: Callable[[Tensor], Tensor], n_units: int, hessian: Callable[[Tensor], Tensor]
) -> Tensor:
    """G = JᵀHJ of one example by a dense Jacobian in its gates: (units, units)."""
    ones = torch.ones(n_units, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(f_of_gates, ones)
    return (jacobian.mT @ hessian(f_of_gates(ones)) @ jacobian).detach()


def softmax_hessian(f: Tensor) -> Tensor:
    """H = diag(π) − ππᵀ of one example."""
    pi = torch.softmax(f, -1)
    return torch.diag(pi) - torch.outer(pi, pi)
