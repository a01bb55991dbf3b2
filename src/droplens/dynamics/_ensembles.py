"""Averages of a network over its masks: geometric, arithmetic, and what scaling makes of them."""

import copy
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from droplens._pairs import Pairs
from droplens.estimates import (
    Estimate,
    exact,
    jackknife,
    square_estimate,
    told,
)
from droplens.losses import Binary, Categorical, Family, Poisson, Squared
from droplens.measure._risk import Loss
from droplens.penalties._pooling import Group

# Draws of which every two are compared.
_PAIRED: Final = 512


@dataclass(frozen=True)
class Ensembles:
    """Three predictors made of one network's masks, in units of the loss; errors over masks.

    Where the outputs are affine in the gates (dropout before the last linear layer alone) the
    geometric ensemble is the scaled network, so its loss and its divergence are exact. Else a
    divergence below ½ tr(H Σ_f)/draws, the bias that is removed from it, is a square near zero:
    its value may lie below, and its error is that of the square (`estimates.square_estimate`).

    Args:
        scaled: the loss of the network without masks, which is what a model in eval mode predicts.
        geometric: the loss at f̄ = E_z f_z, the geometric mean of the predicted distributions.
        arithmetic: the loss of their arithmetic mean, which is what MC dropout predicts; None for
            losses whose mean parameter is not known.
        geometric_divergence: KL(geometric ‖ scaled), what scaling by 1 − p loses of the geometric
            ensemble it stands for.
        arithmetic_divergence: KL(arithmetic ‖ scaled); None as above.
        gain: `scaled` − `arithmetic`, what MC dropout saves of the loss; None as above.
    """

    scaled: Estimate
    geometric: Estimate
    arithmetic: Estimate | None
    geometric_divergence: Estimate
    arithmetic_divergence: Estimate | None
    gain: Estimate | None

    def pooled(self, processes: Group) -> "Ensembles":
        """Those over the data of all processes."""
        known = {name: v for name, v in vars(self).items() if v is not None}
        return replace(self, **dict(zip(known, processes.pooled([*known.values()]), strict=True)))


class InDouble:
    """A loss on one batch, in double precision, and the parts of it that need no label."""

    def __init__(self, family: Family, loss: Any, outputs: Tensor, targets: Tensor) -> None:
        family.check_targets(outputs, targets)
        own = copy.deepcopy(loss)
        self._loss = Loss(own.double() if isinstance(own, nn.Module) else own)
        self.family = family
        self.targets = targets.double() if targets.is_floating_point() else targets
        self.weights = family.weights(outputs, targets).double()
        self.mass = family.normalizer(outputs, targets)

    def loss_at(self, outputs: Tensor) -> float:
        """The loss."""
        return float(self._loss.value(outputs.double(), self.targets))

    def partition_at(self, outputs: Tensor) -> float:
        """Σ w A(f)."""
        f = self.family.natural(outputs.double())
        return float((self.weights * self.family.log_partition(f)).sum())

    def products(self, centre: Tensor, others: Tensor) -> Tensor:
        """Σ w s_aᵀ ∇²A s_b of the draws' steps s from their mean (n, …), to first order: (k, k).

        Times what the loss divides by; of the means without each of the K draws, and of the first
        k ≤ 512 draws, which tell the mean square of a pair to a percent.
        """
        f, *left = (self.family.natural(o.double()) for o in (centre, *others[:_PAIRED]))
        slope = self.family.mean(f)
        moved = torch.stack([self.family.mean(g) for g in left]) - slope
        steps = self.weights.unsqueeze(-1) * (torch.stack(left) - f)
        # Without a draw the mean moves by 1/(K − 1) of what that draw is away from it.
        scale = self.mass * (len(others) - 1) ** 2
        return scale * (steps.flatten(1) @ moved.flatten(1).mT).cpu()

    def divergence(self, of: Tensor, to: Tensor) -> float:
        """KL(of ‖ to) = Σ w [A(to) − A(of) − ∇A(of)ᵀ(to − of)]."""
        f, g = self.family.natural(of.double()), self.family.natural(to.double())
        return float((self.weights * self.family.divergence(f, g - f)).sum())


def leave_one_out_means(drawn: Tensor) -> tuple[Tensor, Tensor]:
    """The mean over draws (K, …), and the means without each of them (K, …)."""
    draws = len(drawn)
    centre = drawn.mean(0)
    return centre, (draws * centre - drawn) / (draws - 1)


def arithmetic_means(family: Family, drawn: Tensor) -> tuple[Tensor, Tensor] | None:
    """Outputs whose prediction is the mean prediction over draws (K, n, …), and without each.

    The mean parameter E_z ∇A(f_z) turned back into an output: for classes the log of the mean
    probability.
    """
    if isinstance(family, Squared):
        return leave_one_out_means(drawn)
    if isinstance(family, Poisson):
        return _log_means(drawn)
    if isinstance(family, Categorical):
        return _log_means(torch.log_softmax(drawn, 2))
    if isinstance(family, Binary):
        (yes, yes_others), (no, no_others) = (_log_means(F.logsigmoid(s * drawn)) for s in (1, -1))
        return yes - no, yes_others - no_others
    return None


def _log_means(logs: Tensor) -> tuple[Tensor, Tensor]:
    """The log of the mean of exp over axis 0, and without each entry, by running sums."""
    draws = len(logs)
    nothing = torch.full_like(logs[:1], -torch.inf)
    before = torch.cat([nothing, torch.logcumsumexp(logs, 0)[:-1]])
    after = torch.cat([torch.logcumsumexp(logs.flip(0), 0)[:-1].flip(0), nothing])
    others = torch.logaddexp(before, after)
    count = torch.tensor(float(draws), dtype=logs.dtype)
    return torch.logsumexp(logs, 0) - count.log(), others - (count - 1).log()


class EnsembleSums:
    """Adds up, over batches, what the ensembles' estimates are made of.

    Args:
        draws: masks drawn for every batch.
        affine: whether the outputs are affine in the gates, so that their mean needs no draws.
    """

    def __init__(self, draws: int, affine: bool = False) -> None:
        self.draws, self.affine = draws, affine
        self.masses = 0.0
        self.scaled = 0.0
        # Whether masks moved an output, whether both means are one, whether the second is known.
        self.moved, self.one, self.known = False, False, True
        # by ensemble (geometric, arithmetic): its loss and its divergence
        self.whole = torch.zeros(2, 2, dtype=torch.float64)
        self.others = torch.zeros(2, 2, draws, dtype=torch.float64)
        # by ensemble, products of the draws' steps: what a square near zero varies by
        self.products = [torch.zeros((), dtype=torch.float64)] * 2

    def add(self, scorer: InDouble, outputs: Tensor, drawn: Tensor) -> None:
        """Count a batch of outputs without masks (n, …) and under K of them (K, n, …)."""
        mass = scorer.mass
        self.masses += mass
        self.scaled += mass * scorer.loss_at(outputs)
        self.moved = self.moved or not torch.equal(drawn, outputs.expand_as(drawn))
        self.one = isinstance(scorer.family, Squared)
        double = drawn.double()
        geometric = None if self.affine else leave_one_out_means(double)
        arithmetic = None if self.one else arithmetic_means(scorer.family, double)
        self.known = self.one or arithmetic is not None
        for row, means in enumerate((geometric, arithmetic)):
            if means is None:
                continue
            centre, others = means
            found = [[scorer.loss_at(f), scorer.divergence(f, outputs)] for f in (centre, *others)]
            parts = mass * torch.tensor(found, dtype=torch.float64)  # (K + 1, 2)
            self.whole[row] += parts[0]
            self.others[row] += parts[1:].mT
            self.products[row] = self.products[row] + scorer.products(centre, others)

    def estimates(self, summed: bool, drops: bool) -> Ensembles:
        """With the bias of a finite number of draws removed by the jackknife.

        Args:
            summed: whether the loss is a sum.
            drops: whether masks change anything; where they do not, all three are one.
        """
        total = 1.0 if summed else self.masses
        scaled, still = exact(self.scaled / total), not (drops and self.moved)

        def mean(row: int, known: bool) -> tuple[Estimate, Estimate]:
            if known:
                return scaled, exact(0.0)
            loss, divergence = (self.whole[row] / total).tolist()
            others = self.others[row] / total
            pseudo_values = self.draws * divergence - (self.draws - 1) * others[1]
            pairs = Pairs(self.products[row] / total, self.draws, 0.5)
            square = square_estimate(pseudo_values, divergence, pairs.variance())
            return told(jackknife(loss, others[0])), square

        geometric = mean(0, still or self.affine)
        if not self.known:
            return Ensembles(scaled, geometric[0], None, geometric[1], None, None)
        arithmetic = geometric if self.one else mean(1, still)
        gain = arithmetic[0].rescaled(-1, scaled.value)
        return Ensembles(scaled, geometric[0], arithmetic[0], geometric[1], arithmetic[1], gain)
