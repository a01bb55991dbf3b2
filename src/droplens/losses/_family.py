"""Losses of exponential-family form: ℓ(f, y) = w·(A(f) − yᵀf) + const, term by term (theory §3.1).

A `Family` lays a network's outputs out as natural parameters f of shape (n, T, C): n examples,
T terms per example that the loss adds up (pixels, tokens, regression targets), C natural
parameters per term. Everything downstream (penalties, Fisher information, decompositions) needs
only A, its derivatives, and the weight w of each term, which holds the loss's reduction.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class Family(ABC):
    """What the library knows about a loss. f: (n, T, C); A(f): (n, T)."""

    quadratic = False  # A is a quadratic form: the second-order penalty is exact in the spread
    splits = True  # A is known, so that what noise costs can be told from what its mean costs
    reduction: str  # "mean" or "sum"

    @abstractmethod
    def natural(self, outputs: Tensor) -> Tensor:
        """Lay `outputs` out as natural parameters f (n, T, C), differentiably."""

    @abstractmethod
    def log_partition(self, f: Tensor) -> Tensor:
        """A(f), shape (n, T)."""

    @abstractmethod
    def mean(self, f: Tensor) -> Tensor:
        """∇A(f), the mean of the sufficient statistic: (n, T, C)."""

    @abstractmethod
    def root(self, f: Tensor) -> Tensor:
        """R with R Rᵀ = H = ∇²A(f): (n, T, C, k), k ≤ C; its columns are cotangents."""

    @abstractmethod
    def residual(self, f: Tensor, generator: torch.Generator | None) -> Tensor:
        """∇A(f) − ŷ with ŷ drawn from the model: mean 0 and covariance H, shape (n, T, C)."""

    @abstractmethod
    def weights(self, outputs: Tensor, targets: Tensor | None) -> Tensor:
        """W of every term, reduction included, shape (n, T).

        Raises:
            ValueError: if the loss weighs terms by their targets and none are given.
        """

    @abstractmethod
    def normalizer(self, outputs: Tensor, targets: Tensor | None) -> float:
        """What the reduction divides by (1 for a sum): values of batches average with it."""

    def divisor(self, outputs: Tensor, targets: Tensor | None) -> float | None:
        """The normalizer of a mean; None for a sum, whose batches add up as they are."""
        return None if self.reduction == "sum" else self.normalizer(outputs, targets)

    @abstractmethod
    def check_targets(self, outputs: Tensor, targets: Tensor) -> None:
        """Refuse targets that the loss would misread or crash on.

        Raises:
            ValueError: if a target is out of range, NaN, or of the wrong shape.
        """

    def hessian(self, f: Tensor) -> Tensor:
        """H = ∇²A(f): (n, T, C, C)."""
        root = self.root(f)
        return root @ root.mT

    def probe(self, f: Tensor, generator: torch.Generator | None) -> Tensor:
        """R ξ with random signs ξ: mean 0 and covariance H, also in its derivatives: (n, T, C).

        A residual of a drawn label has these moments too, but its label's law depends on f in a
        way that no derivative sees.
        """
        return (self.root(f) @ random_signs(f, generator).unsqueeze(-1)).squeeze(-1)

    def divergence(self, f: Tensor, step: Tensor) -> Tensor:
        """A(f + ε) − A(f) − ∇A(f)ᵀε ≥ 0; `step` ε broadcasts against f: (..., n, T)."""
        slope = (self.mean(f) * step).sum(-1)
        return (self.log_partition(f + step) - self.log_partition(f) - slope).clamp_min(0)

    def contrasts(self, f: Tensor) -> Tensor:
        """Rows (m, C) of the combinations of f that A's divergence depends on."""
        return torch.eye(f.shape[-1], dtype=f.dtype, device=f.device)

    @abstractmethod
    def noise_spread(self, f: Tensor, covariance: Tensor) -> Tensor:
        """E A(f + ε) − A(f) for ε ~ N(0, K), K (n, m, m) over the contrasts, f (n, C): (n)."""


def random_signs(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Independent ±1 of the shape of `like`."""
    coins = torch.randint(2, like.shape, generator=generator, device=like.device)
    return (2 * coins - 1).to(like.dtype)


def check_finite_targets(targets: Tensor) -> None:
    if targets.is_floating_point() and not bool(torch.isfinite(targets).all()):
        raise ValueError("targets holds NaN or Inf; clean the data first")


def need_targets(what: str) -> str:
    return f"{what} weighs examples by their targets; pass targets="


def check_loss_weight(name: str, weight: Tensor) -> None:
    if not bool(torch.isfinite(weight).all()) or bool((weight < 0).any()):
        raise ValueError(f"loss has {name} that are negative, NaN or Inf: {weight.tolist()}")
