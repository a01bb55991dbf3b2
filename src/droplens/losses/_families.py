"""Losses of exponential-family form: ℓ(f, y) = w·(A(f) − yᵀf) + const, term by term (theory §3.1).

A `Family` lays a network's outputs out as natural parameters f of shape (n, T, C): n examples,
T terms per example that the loss adds up (pixels, tokens, regression targets), C natural
parameters per term. Everything downstream (penalties, Fisher information, decompositions) needs
only A, its derivatives, and the weight w of each term, which holds the loss's reduction.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from droplens.quadrature import covariance_factor, normal_points, reached, softplus_excess

# How classes interact in the Gaussian spread is smooth: with 32 points it errs by 1% at most.
POINTS = 32
# Two classes below this logit meet with a weight of e^(−6) at most.
_FAR = -6.0


class Family(ABC):
    """What the library knows about a loss. f: (n, T, C); A(f): (n, T)."""

    quadratic = False  # A is a quadratic form: the second-order penalty is exact in the spread
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
        """R with R Rᵀ = H = ∇²A(f): (n, T, C, C); its columns are cotangents."""

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


def _check_finite_targets(targets: Tensor) -> None:
    if targets.is_floating_point() and not bool(torch.isfinite(targets).all()):
        raise ValueError("targets holds NaN or Inf; clean the data first")


def _flat_terms(outputs: Tensor) -> Tensor:
    """Every element a term of its own: (n, ...) -> (n, T, 1)."""
    _need_batch(outputs)
    return outputs.reshape(outputs.shape[0], -1, 1)


def _need_batch(outputs: Tensor) -> None:
    if outputs.dim() == 0:
        raise ValueError(
            "the model's output is a single number; it has to have one row per example, "
            "so return the predictions and let the loss reduce them"
        )


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
        _check_finite_targets(targets)

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
                raise ValueError(_need_targets("BCEWithLogitsLoss with pos_weight"))
            y = targets.to(outputs)
            factor = factor * (1 - y + self.pos_weight.to(outputs) * y)
        return _flat_terms(factor).squeeze(-1) / self.normalizer(outputs, targets)

    def check_targets(self, outputs: Tensor, targets: Tensor) -> None:
        """Targets in [0, 1], of the outputs' shape.

        Raises:
            ValueError: if a target is outside [0, 1], NaN, or of another shape.
        """
        super().check_targets(outputs, targets)
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


@final
@dataclass(frozen=True)
class Categorical(Family):
    """CrossEntropyLoss: A = logsumexp over C classes, H = diag(π) − ππᵀ."""

    reduction: str
    weight: Tensor | None
    ignore_index: int
    label_smoothing: float

    def natural(self, outputs: Tensor) -> Tensor:
        """(n, C) -> (n, 1, C); (n, C, d1, …) -> (n, d1·…, C).

        Raises:
            ValueError: if `outputs` has no class axis.
        """
        if outputs.dim() < 2:
            raise ValueError(
                "CrossEntropyLoss needs outputs of shape (n, C, ...), but the model returned "
                f"{tuple(outputs.shape)}"
            )
        return outputs.flatten(2).mT if outputs.dim() > 2 else outputs.unsqueeze(1)

    def log_partition(self, f: Tensor) -> Tensor:
        """logsumexp(f)."""
        return torch.logsumexp(f, -1)

    def mean(self, f: Tensor) -> Tensor:
        """π = softmax(f)."""
        return torch.softmax(f, -1)

    def root(self, f: Tensor) -> Tensor:
        """Columns √π_c (e_c − π)."""
        half = torch.exp(0.5 * torch.log_softmax(f, -1))  # √π, without a square root at 0
        eye = torch.eye(f.shape[-1], dtype=f.dtype, device=f.device)
        return half.unsqueeze(-2) * (eye - half.square().unsqueeze(-1))

    def residual(self, f: Tensor, generator: torch.Generator | None) -> Tensor:
        """π − e_ŷ with ŷ ~ π."""
        mean = torch.softmax(f, -1)
        flat = mean.detach().reshape(-1, mean.shape[-1])
        drawn = torch.multinomial(flat, 1, generator=generator).reshape(mean.shape[:-1])
        return mean - F.one_hot(drawn, mean.shape[-1]).to(mean)

    def divergence(self, f: Tensor, step: Tensor) -> Tensor:
        """Log Σ_c π_c exp(ε_c − πᵀε), accurate also where ε is tiny."""
        mean = torch.softmax(f, -1)
        centred = step - (mean * step).sum(-1, keepdim=True)
        if centred.numel() and float(centred.detach().max()) > 60:  # expm1 nears its overflow
            return torch.logsumexp(torch.log_softmax(f, -1) + centred, -1).clamp_min(0)
        return torch.log1p((mean * torch.expm1(centred)).sum(-1)).clamp_min(0)

    def probe(self, f: Tensor, generator: torch.Generator | None) -> Tensor:
        """√π∘ξ − π·(√πᵀξ), without forming R (√πᵀξ = Σ_c √π_c ξ_c)."""
        half = torch.exp(0.5 * torch.log_softmax(f, -1))
        signed = half * random_signs(f, generator)
        return signed - half.square() * signed.sum(-1, keepdim=True)

    def contrasts(self, f: Tensor) -> Tensor:
        """e_c − e_C for c < C: softmax does not see what is added to all classes alike."""
        eye = super().contrasts(f)
        return eye[:-1] - eye[-1:] if len(eye) > 1 else eye

    def noise_spread(self, f: Tensor, covariance: Tensor) -> Tensor:
        """The part of every class alone exactly, how the classes interact over a point set.

        With k the top class and d_c = f_c − f_k, A = f_k + log(1 + Σ_{c≠k} e^{d_c}). A confident
        softmax gathers its spread from rare large steps of single d_c, which few points miss; so
        Σ E softplus(d_c) is integrated in one dimension each, and the points see the rest.
        """
        n, n_classes = f.shape
        m = covariance.shape[-1]
        if n_classes == 1:
            return f.new_zeros(n)
        top = f.detach().argmax(-1, keepdim=True)
        column = torch.arange(n_classes - 1, device=f.device)
        rest = column + (column >= top)  # (n, C − 1), all classes but the top one
        lifted = F.pad(covariance_factor(covariance), (0, 0, 0, 1))  # the last class stays put
        lifted = lifted.take_along_dim(rest.unsqueeze(-1), 1) - lifted.take_along_dim(
            top.unsqueeze(-1), 1
        )
        d = f.gather(1, rest) - f.gather(1, top)
        variance = lifted.square().sum(-1)
        spread = softplus_excess(d, variance).sum(-1)
        if m == 1:
            return spread
        # Classes that the noise never carries near the top do not meet.
        meets = (reached(d, variance) > _FAR).sum(-1) > 1
        if bool(meets.any()):
            points = normal_points(m, max(POINTS, 2 * m)).to(f)
            share = torch.softmax(f, -1).gather(1, rest)
            parts = (share[meets], d[meets], lifted[meets], points)
            spread = spread.masked_scatter(meets, spread[meets] + _meeting(*parts))
        return spread.clamp_min(0)

    def _plain(self) -> bool:
        return self.weight is None and self.ignore_index < 0

    def _terms(self, outputs: Tensor, targets: Tensor | None) -> tuple[Tensor, float]:
        """Weight of every term before the reduction (n, T), and what the mean divides by.

        Raises:
            ValueError: if the targets are needed and missing.
        """
        n, classes = outputs.shape[:2]
        n_terms = math.prod(outputs.shape[2:])
        if targets is None:
            if not self._plain():
                raise ValueError(
                    _need_targets("CrossEntropyLoss with class weights or an ignore_index")
                )
            return outputs.new_ones(n, n_terms), float(n * n_terms)
        if targets.is_floating_point():
            return self._soft_terms(outputs, targets), float(n * n_terms)
        labels = targets.reshape(n, n_terms)
        used = (labels != self.ignore_index).to(outputs)
        if self.weight is None:
            return used, float(used.sum())
        weight = self.weight.to(outputs)
        own = weight[labels.clamp(0, classes - 1)] * used
        smooth = self.label_smoothing
        return (1 - smooth) * own + smooth / classes * weight.sum() * used, float(own.sum())

    def _soft_terms(self, outputs: Tensor, targets: Tensor) -> Tensor:
        classes = outputs.shape[1]
        mass = self.natural(targets.to(outputs))  # (n, T, C)
        mass = (1 - self.label_smoothing) * mass + self.label_smoothing / classes
        return (mass if self.weight is None else mass * self.weight.to(outputs)).sum(-1)

    def weights(self, outputs: Tensor, targets: Tensor | None) -> Tensor:
        """W of every term; without targets every term counts alike.

        Raises:
            ValueError: if class weights or an ignore_index are set and `targets` is not given.
        """
        terms, total = self._terms(outputs, targets)
        return terms / total if self.reduction == "mean" else terms

    def normalizer(self, outputs: Tensor, targets: Tensor | None) -> float:
        """The summed weights of the labels for a mean, 1 for a sum."""
        return self._terms(outputs, targets)[1] if self.reduction == "mean" else 1.0

    def check_targets(self, outputs: Tensor, targets: Tensor) -> None:
        """Labels from 0 to C − 1 (or ignore_index), or one probability per class.

        Raises:
            ValueError: if a label is out of range, or shapes disagree.
        """
        classes = outputs.shape[1]
        shape = tuple(targets.shape)
        if targets.is_floating_point():
            if shape != tuple(outputs.shape):
                raise ValueError(
                    "targets given as class probabilities have to have the outputs' shape "
                    f"{tuple(outputs.shape)}, but got {shape}"
                )
            _check_finite_targets(targets)
            return
        expected = (outputs.shape[0], *outputs.shape[2:])
        if shape != expected:
            raise ValueError(f"targets has to have shape {expected}, but got {shape}")
        used = targets[targets != self.ignore_index]
        if used.numel() == 0:
            raise ValueError("targets holds no label but ignore_index, so there is no loss")
        low, high = int(used.min()), int(used.max())
        if low < 0 or high >= classes:
            bad = low if low < 0 else high
            raise ValueError(
                f"targets holds the label {bad}, but the outputs have {classes} classes "
                f"(labels 0 to {classes - 1})"
            )


def _meeting(share: Tensor, d: Tensor, lifted: Tensor, points: Tensor) -> Tensor:
    """E[log(1 + Σ e^{d_c}) − Σ log(1 + e^{d_c})] over the noise minus its value without: (n).

    `share` holds π_c of the classes c of `d`.
    """
    growth = torch.expm1((lifted @ points.mT).clamp_max(60.0))  # (n, C − 1, P); 60: no overflow
    together = torch.log1p((share.unsqueeze(-2) @ growth).squeeze(-2))
    apart = torch.log1p(torch.sigmoid(d).unsqueeze(-1) * growth).sum(-2)
    return (together - apart).mean(-1)


def _need_targets(what: str) -> str:
    return f"{what} weighs examples by their targets; pass targets="


def _reduced(loss: nn.Module) -> str:
    reduction = str(loss.reduction)
    if reduction not in ("mean", "sum"):
        raise ValueError(
            f"loss has to have reduction 'mean' or 'sum', but {type(loss).__name__} has "
            f"{reduction!r}"
        )
    return reduction


def _poisson(loss: nn.PoissonNLLLoss) -> Family:
    if not loss.log_input:
        raise ValueError(
            "PoissonNLLLoss with log_input=False does not take natural parameters; let the "
            "network predict the log rate and use log_input=True"
        )
    return Poisson(_reduced(loss))


_FAMILIES: dict[type[nn.Module], Callable[[Any], Family]] = {
    nn.MSELoss: lambda loss: Squared(_reduced(loss)),
    nn.CrossEntropyLoss: lambda loss: Categorical(
        _reduced(loss), loss.weight, loss.ignore_index, loss.label_smoothing
    ),
    nn.BCEWithLogitsLoss: lambda loss: Binary(_reduced(loss), loss.weight, loss.pos_weight),
    nn.PoissonNLLLoss: _poisson,
}


def family(loss: object) -> Family:
    """The exponential family behind a loss object.

    >>> type(family(nn.MSELoss())).__name__
    'Squared'

    Raises:
        TypeError: if `loss` is not a loss the library knows.
        ValueError: if its reduction is "none", or it does not take natural parameters.
    """
    if isinstance(loss, Family):
        return loss
    own = getattr(loss, "family", None)
    if isinstance(own, Family):
        return own
    known = ", ".join(kind.__name__ for kind in _FAMILIES)
    if isinstance(loss, type):
        raise TypeError(f"loss has to be a loss object, but got the class; write {loss.__name__}()")
    build = _FAMILIES.get(type(loss))  # type: ignore[arg-type]  # a miss is what we look for
    if build is None:
        raise TypeError(
            f"loss {type(loss).__name__} is not one whose A(f) is known ({known}); "
            "pass one of these, or describe yours by droplens.losses.from_log_partition"
        )
    return build(loss)
