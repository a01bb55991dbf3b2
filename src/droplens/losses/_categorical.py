"""Cross-entropy over classes."""

import math
from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from droplens.labels import NO_LABEL, holds_label
from droplens.losses._family import (
    Family,
    check_finite_targets,
    check_loss_weight,
    need_targets,
    random_signs,
)
from droplens.quadrature import covariance_factor, normal_points, reached, softplus_excess

# How classes interact in the Gaussian spread is smooth: with 32 points it errs by 1% at most.
POINTS = 32
# Two classes below this logit meet with a weight of e^(−6) at most.
_FAR = -6.0


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
        """Columns √(π_k/(r_k r_{k+1})) (r_{k+1} e_k − Σ_{j>k} π_j e_j), r_k = Σ_{j≥k} π_j.

        One less than classes, because H has no more rank than that: a backward pass spared.
        """
        classes = f.shape[-1]
        if classes == 1:
            return torch.zeros_like(f).unsqueeze(-1)
        log = torch.log_softmax(f, -1).clamp_min(torch.finfo(f.dtype).min / 4)  # never −∞
        rest = log.flip(-1).logcumsumexp(-1).flip(-1)  # log r
        scale = 0.5 * (log - rest)[..., :-1] - 0.5 * rest[..., 1:]
        row = torch.arange(classes, device=f.device).unsqueeze(-1)
        column = row[:-1].T
        entries = torch.where(row == column, rest[..., 1:].unsqueeze(-2), log.unsqueeze(-1))
        # Before exp, which may overflow where nothing is wanted.
        logs = (entries + scale.unsqueeze(-2)).masked_fill(row < column, -torch.inf)
        return torch.where(row == column, 1.0, -1.0).to(f) * torch.exp(logs)

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
        m = covariance.shape[-1]
        if f.shape[-1] == 1:
            return f.new_zeros(len(f))
        top = f.detach().argmax(-1, keepdim=True)
        d = f - f.gather(1, top)
        # The top class itself has neither noise nor part in what follows.
        own = F.pad(covariance.diagonal(dim1=-2, dim2=-1), (0, 1))  # the last class stays put
        row = top.clamp_max(m - 1).unsqueeze(-1).expand(-1, 1, m)
        shared = F.pad(covariance.gather(1, row).squeeze(1) * (top < m), (0, 1))
        variance = (own + own.gather(1, top) - 2 * shared).clamp_min(0)  # of d
        spread = softplus_excess(d, variance).sum(-1)
        if m == 1:
            return spread
        # Classes that the noise never carries near the top do not meet.
        meet = ((reached(d, variance) > _FAR).sum(-1) > 2).nonzero().squeeze(1)
        if len(meet) < len(d):
            d, top, covariance = (t.index_select(0, meet) for t in (d, top, covariance))
        factor = covariance_factor(covariance)
        lifted = torch.cat([factor, factor.new_zeros(len(factor), 1, m)], 1)
        lifted = lifted - lifted.gather(1, top.unsqueeze(-1).expand(-1, -1, m))
        points = normal_points(m, max(POINTS, 2 * m)).to(f)
        return spread.index_add(0, meet, _meeting(d, lifted, points)).clamp_min(0)

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
                    need_targets("CrossEntropyLoss with class weights or an ignore_index")
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
        # Targets that all weigh nothing have no mean; what they weigh in a larger one is this.
        return terms / total if self.reduction == "mean" and total else terms

    def normalizer(self, outputs: Tensor, targets: Tensor | None) -> float:
        """The summed weights of the labels for a mean, 1 for a sum."""
        return self._terms(outputs, targets)[1] if self.reduction == "mean" else 1.0

    def check_targets(self, outputs: Tensor, targets: Tensor) -> None:
        """Labels from 0 to C − 1 (or ignore_index), or one probability per class.

        Raises:
            ValueError: if a label is out of range, shapes or types disagree, or the class weights
                do not fit.
        """
        classes = outputs.shape[1]
        shape = tuple(targets.shape)
        self._check_weight(classes)
        if targets.is_floating_point():
            if shape != tuple(outputs.shape):
                raise ValueError(
                    "targets given as class probabilities have to have the outputs' shape "
                    f"{tuple(outputs.shape)}, but got {shape}"
                )
            check_finite_targets(targets)
            return
        expected = (outputs.shape[0], *outputs.shape[2:])
        if shape != expected:
            raise ValueError(f"targets has to have shape {expected}, but got {shape}")
        if targets.dtype not in (torch.int64, torch.uint8):
            raise ValueError(
                f"targets has dtype {targets.dtype}, but CrossEntropyLoss takes labels as "
                "torch.int64; convert them with .long()"
            )
        if not holds_label(targets, self.ignore_index):
            raise ValueError(NO_LABEL)
        used = targets[targets != self.ignore_index]
        low, high = int(used.min()), int(used.max())
        if low < 0 or high >= classes:
            bad = low if low < 0 else high
            raise ValueError(
                f"targets holds the label {bad}, but the outputs have {classes} classes "
                f"(labels 0 to {classes - 1})"
            )

    def _check_weight(self, classes: int) -> None:
        if self.weight is None:
            return
        if tuple(self.weight.shape) != (classes,):
            raise ValueError(
                f"loss has class weights of shape {tuple(self.weight.shape)}, but the outputs have "
                f"{classes} classes"
            )
        check_loss_weight("class weights", self.weight)


def _meeting(d: Tensor, lifted: Tensor, points: Tensor) -> Tensor:
    """E[log Σ e^{d_c} − Σ log(1 + e^{d_c})] over the noise minus its value without: (n); d ≤ 0."""
    growth = (lifted @ points.mT).clamp_max_(60.0).expm1_()  # (n, C, P); 60: no overflow
    odds = torch.exp(d).unsqueeze(-1)
    # Summed like this, because products of many small matrices are slow.
    together = torch.log1p((odds / odds.sum(-2, keepdim=True) * growth).sum(-2))
    apart = torch.log1p(odds / (1 + odds) * growth).sum(-2)
    return (together - apart).mean(-1)
