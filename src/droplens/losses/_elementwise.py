"""Losses that treat every element of the outputs alone: squared, binary, Poisson."""

from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from droplens.losses._family import Family, check_finite_targets, check_loss_weight, need_targets
from droplens.quadrature import softplus_excess


@dataclass(frozen=True)
class _Elementwise(Family):
    """Losses that treat every element of the outputs alone: T elements, C = 1."""

    reduction: str

    def natural(self, outputs: Tensor) -> Tensor:
        """(n, ...) -> (n, T, 1)."""
        return _flat_terms(outputs)

    def normalizer(self, outputs: Tensor, targets: Tensor | None) -> float:
        """The number of elements for a mean, 1 for a sum."""
        return float(outputs.numel()) if self.reduction == "mean" else 1.0

    def check_targets(self, outputs: Tensor, targets: Tensor) -> None:
        """Targets of the outputs' shape, finite.

        Raises:
            ValueError: if a target is NaN, Inf or of another shape.
        """
        if targets.shape != outputs.shape:
            raise ValueError(
                f"targets has to have the outputs' shape {tuple(outputs.shape)}, "
                f"but got {tuple(targets.shape)}"
            )
        check_finite_targets(targets)

    def _uniform(self, outputs: Tensor, scale: float = 1.0) -> Tensor:
        n = outputs.shape[0]
        weight = scale / self.normalizer(outputs, None)
        return outputs.new_full((n, outputs[0].numel() if n else 0), weight)


@final
@dataclass(frozen=True)
class Squared(_Elementwise):
    """MSELoss: (f − y)² = 2·(½f² − y f) + y², so A = ½f² with weight 2."""

    quadratic = True

    def log_partition(self, f: Tensor) -> Tensor:
        """½f²."""
        return 0.5 * f.squeeze(-1).square()

    def mean(self, f: Tensor) -> Tensor:
        """F."""
        return f

    def root(self, f: Tensor) -> Tensor:
        """1."""
        return torch.ones_like(f).unsqueeze(-1)

    def noise_spread(self, f: Tensor, covariance: Tensor) -> Tensor:
        """½K."""
        return 0.5 * covariance[..., 0, 0]

    def residual(self, f: Tensor, generator: torch.Generator | None) -> Tensor:
        """A standard normal number per element."""
        return torch.randn(f.shape, generator=generator, device=f.device, dtype=f.dtype)

    def weights(self, outputs: Tensor, targets: Tensor | None) -> Tensor:
        """2 over the number of elements (mean), 2 (sum)."""
        return self._uniform(outputs, 2.0)


@final
@dataclass(frozen=True)
class Binary(_Elementwise):
    """BCEWithLogitsLoss: A = softplus; `weight` and `pos_weight` multiply A with y."""

    weight: Tensor | None
    pos_weight: Tensor | None

    def log_partition(self, f: Tensor) -> Tensor:
        """log(1 + eᶠ)."""
        return F.softplus(f.squeeze(-1))

    def mean(self, f: Tensor) -> Tensor:
        """σ(f)."""
        return torch.sigmoid(f)

    def root(self, f: Tensor) -> Tensor:
        """√(σ(f)(1 − σ(f)))."""
        # exp of half the log keeps the derivative finite where the product underflows.
        return torch.exp(0.5 * (F.logsigmoid(f) + F.logsigmoid(-f))).unsqueeze(-1)

    def noise_spread(self, f: Tensor, covariance: Tensor) -> Tensor:
        """E softplus(f + ε) − softplus(f)."""
        return softplus_excess(f[..., 0], covariance[..., 0, 0])

    def residual(self, f: Tensor, generator: torch.Generator | None) -> Tensor:
        """σ(f) minus a coin of that probability."""
        mean = torch.sigmoid(f)
        return mean - torch.bernoulli(mean.detach(), generator=generator)

    def weights(self, outputs: Tensor, targets: Tensor | None) -> Tensor:
        """Weight · (1 − y + pos_weight · y), over the number of elements for a mean.

        Raises:
            ValueError: if `pos_weight` is set and `targets` is not given.
        """
        factor = torch.ones_like(outputs)
        if self.weight is not None:
            factor = factor * self.weight.to(outputs)
        if self.pos_weight is not None:
            if targets is None:
                raise ValueError(need_targets("BCEWithLogitsLoss with pos_weight"))
            y = targets.to(outputs)
            factor = factor * (1 - y + self.pos_weight.to(outputs) * y)
        return _flat_terms(factor).squeeze(-1) / self.normalizer(outputs, targets)

    def check_targets(self, outputs: Tensor, targets: Tensor) -> None:
        """Targets in [0, 1], of the outputs' shape.

        Raises:
            ValueError: if a target is outside [0, 1], NaN, no float or of another shape, or the
                loss's weights do not fit.
        """
        super().check_targets(outputs, targets)
        if not targets.is_floating_point():
            raise ValueError(
                f"targets has dtype {targets.dtype}, but BCEWithLogitsLoss takes floats; convert "
                "them with .float()"
            )
        for name, weight in (("weight", self.weight), ("pos_weight", self.pos_weight)):
            if weight is not None:
                _check_fits(name, weight, outputs)
        if targets.numel() and not bool(((targets >= 0) & (targets <= 1)).all()):
            raise ValueError("targets has to be in [0, 1] for BCEWithLogitsLoss")


@final
@dataclass(frozen=True)
class Poisson(_Elementwise):
    """PoissonNLLLoss with log_input=True: A = eᶠ."""

    def log_partition(self, f: Tensor) -> Tensor:
        """eᶠ."""
        return f.squeeze(-1).exp()

    def mean(self, f: Tensor) -> Tensor:
        """eᶠ."""
        return f.exp()

    def root(self, f: Tensor) -> Tensor:
        """e^(f/2)."""
        return (0.5 * f).exp().unsqueeze(-1)

    def noise_spread(self, f: Tensor, covariance: Tensor) -> Tensor:
        """eᶠ(e^(K/2) − 1)."""
        return f[..., 0].exp() * torch.expm1(0.5 * covariance[..., 0, 0])

    def residual(self, f: Tensor, generator: torch.Generator | None) -> Tensor:
        """eᶠ minus a Poisson count of that mean."""
        mean = f.exp()
        return mean - torch.poisson(mean.detach(), generator=generator)

    def weights(self, outputs: Tensor, targets: Tensor | None) -> Tensor:
        """1 over the number of elements (mean), 1 (sum)."""
        return self._uniform(outputs)

    def check_targets(self, outputs: Tensor, targets: Tensor) -> None:
        """Counts of at least 0, of the outputs' shape.

        Raises:
            ValueError: if a target is negative, NaN, or of another shape.
        """
        super().check_targets(outputs, targets)
        if targets.numel() and bool((targets < 0).any()):
            raise ValueError("targets has to be counts of at least 0 for PoissonNLLLoss")


def _check_fits(name: str, weight: Tensor, outputs: Tensor) -> None:
    shape, whole = tuple(weight.shape), tuple(outputs.shape)
    aligned = zip(shape[::-1], whole[::-1], strict=False)
    if len(shape) > len(whole) or any(own not in (1, length) for own, length in aligned):
        raise ValueError(
            f"loss has a {name} of shape {shape}, which does not fit outputs of shape {whole}; one "
            "for every example cannot follow where they come in other batches"
        )
    check_loss_weight(f"entries of {name}", weight)


def _flat_terms(outputs: Tensor) -> Tensor:
    """Every element a term of its own: (n, ...) -> (n, T, 1)."""
    return outputs.reshape(outputs.shape[0], -1, 1)
