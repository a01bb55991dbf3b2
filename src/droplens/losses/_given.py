"""Any other loss: by its log-partition A(f), or, for second order alone, by its output Hessian."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NoReturn, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from droplens.labels import IGNORED
from droplens.losses._family import Family
from droplens.quadrature import covariance_factor, normal_points

Layout = Literal["elements", "classes"]
Reduction = Literal["mean", "sum"]
OfOutputs = Callable[[Tensor], Tensor]

# A point set for every A: smooth ones are integrated to about 1%.
_POINTS = 256


class HessianOnlyError(ValueError):
    """A loss known by its output Hessian alone was asked for what only its A(f) says."""


@final
class FamilyLoss(nn.Module):
    """A loss that brings its own family: it trains networks as any loss does, and is measured.

    Args:
        family: what is known about it.
        value: the loss itself, of (outputs, targets).
        reduction: "mean" or "sum", as `value` reduces.
    """

    def __init__(
        self, family: Family, value: Callable[[Tensor, Tensor], Tensor], reduction: Reduction
    ) -> None:
        super().__init__()
        self.family, self.value, self.reduction = family, value, reduction

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss, a scalar."""
        return self.value(outputs, targets)


def from_log_partition(
    log_partition: OfOutputs,
    *,
    layout: Layout = "elements",
    reduction: Reduction = "mean",
    constant: OfOutputs | None = None,
) -> FamilyLoss:
    """The loss A(f) − yᵀf of an exponential family in its natural parameter f (theory §3.1).

    Everything else (mean ∇A, output Hessian ∇²A, what noise in f costs) follows by automatic
    differentiation and a fixed set of points, so `penalty`, `decompose`, `inspect` and `fisher`
    take the result as they take torch's own losses. A has to be convex and twice differentiable.

    Args:
        log_partition: A. Takes f of shape (n, T, C), n examples with T terms of C natural
            parameters, and returns (n, T). Its operations have to be torch's.
        layout: "elements", every output is a term with one natural parameter (as in MSELoss);
            "classes", axis 1 of the outputs holds the C natural parameters of a term (as in
            CrossEntropyLoss), and targets are either y, of the outputs' shape, or class labels.
        reduction: "mean" divides by the number of terms.
        constant: the part c(y) that does not depend on f, of the targets' shape reduced to one
            number per term; left out if not given, which changes no cost of dropout.

    Returns:
        A loss module.

    >>> poisson = from_log_partition(lambda f: f.exp().sum(-1))
    >>> poisson(torch.zeros(2, 3), torch.ones(2, 3))
    tensor(1.)

    Raises:
        TypeError: if `log_partition` cannot be called.
        ValueError: if `layout` or `reduction` is unknown.
    """
    if not callable(log_partition):
        raise TypeError(
            "log_partition has to be a function of f (n, T, C), but got "
            f"{type(log_partition).__name__}"
        )
    own = _LogPartition(_checked(layout, reduction), layout, log_partition)

    def value(outputs: Tensor, targets: Tensor) -> Tensor:
        own.check_targets(outputs, targets)
        f = own.natural(outputs)
        terms = own.log_partition(f) - (own.statistic(outputs, targets) * f).sum(-1)
        if constant is not None:
            terms = terms + constant(targets).reshape(terms.shape)
        return terms.mean() if reduction == "mean" else terms.sum()

    return FamilyLoss(own, value, reduction)


def from_output_hessian(
    loss: Callable[[Tensor, Tensor], Tensor],
    hessian: OfOutputs,
    *,
    layout: Layout = "elements",
    reduction: Reduction = "mean",
) -> FamilyLoss:
    """A loss that is known by its Hessian in the outputs alone: for second-order values.

    `penalty(method="second_order")` and `fisher` need no more. `decompose` and `inspect` give the
    gap, by the loss itself, and leave open how it splits; whatever needs A(f) raises
    `HessianOnlyError`. Where the loss's own Hessian depends on the targets, give its
    generalised Gauss–Newton form, which does not.

    Args:
        loss: the loss itself, of (outputs, targets), reduced as `reduction` says.
        hessian: of a term's loss, before the reduction: takes f (n, T, C), returns the positive
            semi-definite H (n, T, C, C).
        layout: as in `from_log_partition`.
        reduction: "mean" divides by the number of terms.

    Returns:
        A loss module.

    Raises:
        TypeError: if `loss` or `hessian` cannot be called.
        ValueError: if `layout` or `reduction` is unknown.
    """
    for name, given in (("loss", loss), ("hessian", hessian)):
        if isinstance(given, type) or not callable(given):
            raise TypeError(f"{name} has to be a function, but got {type(given).__name__}")
    return FamilyLoss(_HessianOnly(_checked(layout, reduction), layout, hessian), loss, reduction)


def _checked(layout: str, reduction: str) -> str:
    if layout not in ("elements", "classes"):
        raise ValueError(f"layout has to be 'elements' or 'classes', but got {layout!r}")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction has to be 'mean' or 'sum', but got {reduction!r}")
    return reduction


@dataclass(frozen=True)
class _Given(Family):
    """Layout, weights and targets of a loss that a user describes."""

    reduction: str
    layout: Layout

    def natural(self, outputs: Tensor) -> Tensor:
        """(n, …) -> (n, T, 1) for elements; (n, C, d1, …) -> (n, T, C) for classes.

        Raises:
            ValueError: if an axis is missing.
        """
        least = 1 if self.layout == "elements" else 2
        if outputs.dim() < least:
            shape = "(n, ...)" if least == 1 else "(n, C, ...)"
            raise ValueError(
                f"the loss needs outputs of shape {shape}, but the model returned "
                f"{tuple(outputs.shape)}"
            )
        if self.layout == "elements":
            return outputs.reshape(outputs.shape[0], -1, 1)
        return outputs.flatten(2).mT if outputs.dim() > 2 else outputs.unsqueeze(1)

    def statistic(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Y laid out as f is, (n, T, C); labels become indicators."""
        if targets.shape == outputs.shape:
            return self.natural(targets.to(outputs))
        one_hot = F.one_hot(targets.reshape(len(targets), -1), outputs.shape[1])
        return one_hot.to(outputs)

    def check_targets(self, outputs: Tensor, targets: Tensor) -> None:
        """Y of the outputs' shape, or labels where axis 1 holds classes.

        Raises:
            ValueError: if shapes disagree, a label is out of range, or a target not finite.
        """
        if targets.is_floating_point() and not bool(targets.isfinite().all()):
            raise ValueError("targets holds NaN or Inf; clean the data first")
        if targets.shape == outputs.shape:
            return
        labels = (outputs.shape[0], *outputs.shape[2:])
        if self.layout == "elements" or targets.is_floating_point() or targets.shape != labels:
            raise ValueError(
                f"targets has to have the outputs' shape {tuple(outputs.shape)}, but got "
                f"{tuple(targets.shape)}"
            )
        low, high = int(targets.min()), int(targets.max())
        if low < 0 or high >= outputs.shape[1]:
            marked = (
                f" ({IGNORED} marks a position without a label; this loss counts every position)"
            )
            raise ValueError(
                f"targets holds the label {low if low < 0 else high}, but the outputs have "
                f"{outputs.shape[1]} classes{marked if low == IGNORED else ''}"
            )

    def weights(self, outputs: Tensor, targets: Tensor | None) -> Tensor:
        """1 over the number of terms (mean), 1 (sum)."""
        f = self.natural(outputs)
        return f.new_full(f.shape[:2], 1 / self.normalizer(outputs, targets))

    def normalizer(self, outputs: Tensor, targets: Tensor | None) -> float:
        """The number of terms for a mean, 1 for a sum."""
        return float(self.natural(outputs)[..., 0].numel()) if self.reduction == "mean" else 1.0

    def residual(self, f: Tensor, generator: torch.Generator | None) -> Tensor:
        """R z with z standard normal: mean 0 and covariance H, which is all that is asked."""
        z = torch.randn(f.shape, generator=generator, device=f.device, dtype=f.dtype)
        return (self.root(f) @ z.unsqueeze(-1)).squeeze(-1)


def _root(H: Tensor) -> Tensor:
    """R with R Rᵀ = H up to rounding; H may be singular."""
    if H.shape[-1] == 1:
        # Without the infinite slope of a square root at zero.
        return H.clamp_min(torch.finfo(H.dtype).tiny).sqrt()
    return covariance_factor(H)


@final
@dataclass(frozen=True)
class _LogPartition(_Given):
    """A family by its A(f)."""

    partition: OfOutputs

    def log_partition(self, f: Tensor) -> Tensor:
        """A(f).

        Raises:
            ValueError: if the user's A returns another shape than (n, T).
        """
        value = self.partition(f)
        if value.shape != f.shape[:-1]:
            raise ValueError(
                f"log_partition has to return one number per term, {tuple(f.shape[:-1])} for f "
                f"of shape {tuple(f.shape)}, but returned {tuple(value.shape)}"
            )
        return value

    def mean(self, f: Tensor) -> Tensor:
        """∇A."""
        gradient: Tensor = torch.func.grad(lambda x: self.log_partition(x).sum())(f)
        return gradient

    def hessian(self, f: Tensor) -> Tensor:
        """∇²A, a row at a time: terms do not mix, so one pass serves all of them."""

        def row(c: int) -> Tensor:
            gradient: Tensor = torch.func.grad(lambda x: self.mean(x)[..., c].sum())(f)
            return gradient

        return torch.stack([row(c) for c in range(f.shape[-1])], -2)

    def root(self, f: Tensor) -> Tensor:
        """A lower factor of ∇²A."""
        return _root(self.hessian(f))

    def noise_spread(self, f: Tensor, covariance: Tensor) -> Tensor:
        """The mean of A(f + Lz) − A(f) − ∇A(f)ᵀLz over a fixed set of normal points z, K = LLᵀ."""
        m = covariance.shape[-1]
        points = normal_points(m, max(_POINTS, 4 * m)).to(f)
        steps = points @ _root(covariance).mT  # (n, P, C)
        return self.divergence(f.unsqueeze(-2), steps).mean(-1)


@final
@dataclass(frozen=True)
class _HessianOnly(_Given):
    """A loss by its output Hessian."""

    splits = False
    second: OfOutputs

    def hessian(self, f: Tensor) -> Tensor:
        """The user's H, checked for its shape.

        Raises:
            ValueError: if it is not (n, T, C, C).
        """
        H = self.second(f).to(f)
        if H.shape != (*f.shape, f.shape[-1]):
            raise ValueError(
                f"hessian has to return shape {(*f.shape, f.shape[-1])} for f of shape "
                f"{tuple(f.shape)}, but returned {tuple(H.shape)}"
            )
        return H

    def root(self, f: Tensor) -> Tensor:
        """A lower factor of H."""
        return _root(self.hessian(f))

    def log_partition(self, f: Tensor) -> Tensor:
        """Not known."""
        _unknown()

    def mean(self, f: Tensor) -> Tensor:
        """Not known."""
        _unknown()

    def noise_spread(self, f: Tensor, covariance: Tensor) -> Tensor:
        """Not known."""
        _unknown()


def _unknown() -> NoReturn:
    raise HessianOnlyError(
        "the loss is known by its output Hessian alone, which gives second-order values; use "
        "method='second_order', or describe the loss by droplens.losses.from_log_partition"
    )
