"""How much work and memory a network asks for, and what an inspection leaves to be asked for."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from droplens.batches import Batch, n_examples
from droplens.calling import check_outputs, predictions
from droplens.discovery import Site
from droplens.gates import masks_off
from droplens.losses import Family

# Backward passes over a batch that an exact penalty may take.
MOST_PASSES = 2000
# Backward passes up to which the Fisher information sums over classes instead of drawing labels.
MOST_EXACT = 100
# Weights of which the Hessian's probes and eigenvectors still fit in memory.
MOST_WEIGHTS = 2_000_000
# Operations of a greedy cover of one layer's neurons.
MOST_COVER = 1 << 35
# Numbers held at once, 256 MB of float32.
_MOST_NUMBERS = 1 << 26


@dataclass(frozen=True)
class Sizes:
    """How large a network's tensors are.

    Args:
        outputs: numbers of output per example.
        gates: units at sites with a law, per example.
        terms: terms of the loss per example.
        parameters: natural parameters per term, such as classes.
        weights: trainable numbers.
    """

    outputs: int
    gates: int
    terms: int
    parameters: int
    weights: int

    @property
    def passes(self) -> int:
        """Backward passes of an exact penalty or Fisher trace: terms × natural parameters."""
        return self.terms * self.parameters

    def rows(self, draws: int) -> int:
        """How many examples at once keep the drawn outputs and the gates' Jacobians in memory."""
        drawn = _MOST_NUMBERS // max(1, draws * self.outputs)
        jacobians = _MOST_NUMBERS // max(1, self.parameters * self.gates)
        return max(1, min(drawn, jacobians))


def sizes_of(model: nn.Module, batch: Batch, family: Family, sites: Sequence[Site]) -> Sizes:
    """Measure them on one batch, with dropout off.

    Raises:
        ValueError: if the predictions are not finite or the targets do not fit them.
    """
    n = n_examples(batch.inputs)
    with torch.no_grad(), masks_off(model):
        outputs = predictions(model, batch.inputs)
    check_outputs(model, outputs)
    family.check_targets(outputs, targets_of(batch.targets))
    _, terms, parameters = family.natural(outputs).shape
    gates = sum(math.prod(site.shape) for site in sites if site.law is not None)
    weights = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Sizes(outputs.numel() // n, -(-gates // n), terms, parameters, weights)


def targets_of(targets: Tensor | None) -> Tensor:
    """The targets of a batch.

    Raises:
        ValueError: if it has none.
    """
    if targets is None:
        raise ValueError("data has no targets; pass (inputs, targets) or a loader of such pairs")
    return targets
