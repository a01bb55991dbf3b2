"""Curvature of the loss: trace and top eigenvalues of its Hessian, matrix-free (theory §4)."""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from droplens.batches import checked_passes
from droplens.estimates import Estimate, crossed_estimate, mean_estimate
from droplens.measure._apart import draws_needed, note_of, pairs_to_find
from droplens.measure._checks import warn_of_nothing
from droplens.measure._directions import Direction
from droplens.measure._lanczos import columns_at_once, random_signs, rayleigh, top_pairs
from droplens.measure._masks import Masking, Masks
from droplens.measure._operators import LossHessian, Vector, WeightMatrix
from droplens.measure._risk import Loss
from droplens.randomness import private_generator

# Up to this many parameters the matrix is formed, and everything but the masks is exact.
DENSE = 64
_PILOT = 16
_MOST_PROBES = 400
_WANTED = 0.05


@dataclass(frozen=True)
class Hessian:
    """Trace and largest eigenvalues of the Hessian H of the loss in the trainable weights w.

    Args:
        trace: with its standard error over random probes, and over masks where these are averaged;
            0 where nothing was sampled.
        relative_trace: Σ_i w_i² H_ii: noise of relative size σ on every weight raises the loss by
            σ²/2 of it, to second order (average-case adaptive sharpness, Andriushchenko et al.
            2023). Unlike the trace it stays when a ReLU unit's incoming weights grow and its
            outgoing ones shrink by one factor.
        top_eigenvalues: the algebraically largest, falling, float64; with "expected", of the mean
            over the draws, which are biased upwards by O(1/draws).
        standard_errors: of `top_eigenvalues` over masks, to first order: that of qᵀH(mask)q; 0
            where the masks are not averaged over. NaN where so few draws do not tell an eigenvalue
            apart: where their noise turns q by an angle of square above 1/50, biases λ by over a
            quarter of its error, or leaves another λ within two errors of the difference. Where
            only some of repeated runs would give one, noise chose them: fewer may hold.
        residuals: ‖Hq − λq‖ of each eigenpair with ‖q‖ = 1; an eigenvalue is off by at most that.
        eigenvectors: q by parameter, ready to be used as directions of `flatness` and `plane`.
        masks: "off", "fixed" or "expected", as for `flatness`; "expected" is the Hessian of the
            loss averaged over masks.
        draws: of masks; 0 for "off".
        seed: repeats probes and masks.
        notes: which of the traces is known to worse than 5%, which eigenvalues are not told apart
            by so many draws, and what would mend it.
    """

    trace: Estimate
    relative_trace: Estimate
    top_eigenvalues: Tensor
    standard_errors: Tensor
    residuals: Tensor
    eigenvectors: tuple[Direction, ...] = field(repr=False)
    masks: Masks
    draws: int
    seed: int
    notes: tuple[str, ...] = ()


def hessian(  # noqa: PLR0913  # the last four are keywords with defaults
    model: nn.Module,
    batches: Any,
    loss: Any,
    top: int = 5,
    masks: Masks = "off",
    *,
    probes: int | None = None,
    draws: int = 16,
    seed: int | None = None,
    generator: torch.Generator | None = None,
) -> Hessian:
    """Trace and top eigenvalues of the Hessian of the loss, from products H v alone (theory §4).

    Eigenpairs by scipy's `eigsh`. The trace is exact on the span of the eigenvectors found, and
    Hutchinson's estimate on the rest. Norm layers are in eval.

    Args:
        model: any torch module that can be differentiated twice.
        batches: what `as_batches` takes, with targets; read once for every product, or held as
            one graph where it is one batch and one draw of masks.
        loss: a loss object; units and reduction are its own.
        top: how many eigenvalues.
        masks: `"off"` takes dropout for the identity; `"fixed"` holds one draw of masks;
            `"expected"` takes the mean of the loss over `draws` masks.
        probes: random vectors for the traces; by default as many as bring their standard errors
            under 5%, from 16 to 400. Where that takes as many as there are weights, one unit
            vector a weight takes their place, and nothing but masks is sampled; where 400 are too
            few, `notes` say so. 0 leaves both traces out, as NaN.
        draws: of masks, for `"expected"`; at least 2. A product costs as many gradients and more.
        seed: repeats probes and masks.
        generator: where the seed is drawn from instead.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if data or weights are bad, data change between passes, no parameter is
            trainable, a site's masks have no law, or an argument is out of range.
        RuntimeError: if the eigenvalues do not converge, or an operation of the network has no
            second derivative.
    """
    if isinstance(top, bool) or not isinstance(top, int) or top < 0:
        raise ValueError(f"top has to be a whole number of at least 0, but got {top!r}")
    if probes is not None and (probes < 0 or probes == 1):
        raise ValueError(f"probes has to be 0 or at least 2, but got {probes}")
    source, used_seed = private_generator(generator, seed)
    masking = Masking(masks, draws, used_seed)
    data = checked_passes(batches, model, loss, in_order=masks != "off")
    with torch.enable_grad(), masking.applied(model) as applied:
        H = LossHessian(model, data, Loss(loss), applied)
        if top > H.size:
            raise ValueError(f"top is {top}, but the model has only {H.size} trainable numbers")
        if H.size <= DENSE:
            Q, traces = _dense(H)
        else:
            _, Q = top_pairs(H, pairs_to_find(top, H), source)
            traces = Traces(H, Q)
            traces.probe(probes, source)
        values, residuals = rayleigh(Q[:, :top], traces.mean[:, :top])
        trace, relative = traces.estimates()
        errors, near = traces.errors(top)
        moves = H.moves
    if not moves:
        warn_of_nothing("hessian", float(np.abs(values).sum()) if probes == 0 else trace.value)
    return Hessian(
        trace,
        relative,
        torch.from_numpy(values),
        torch.from_numpy(errors),
        torch.from_numpy(residuals),
        tuple(H.named(q) for q in Q.T[:top]),
        masks,
        0 if masks == "off" else applied.count,
        used_seed,
        _notes(traces) + near,
    )


def _notes(traces: "Traces") -> tuple[str, ...]:
    """What to raise, where a trace is known to worse than 5%."""
    notes = []
    for what, found in zip(("trace", "relative trace"), traces.estimates(), strict=True):
        if not found.standard_error > _WANTED * abs(found.value):
            continue
        share = found.standard_error / abs(found.value) if found.value else math.inf
        size = f"{100 * share:.2g}% of it" if share < 1 else "no less than its value"
        mend = []
        if "probes" in found.over:
            enough = math.ceil(min(traces.size, traces.probes * (share / _WANTED) ** 2))
            mend.append(f"probes={enough} in place of {traces.probes}")
        if "masks" in found.over:
            mend.append("more draws of masks")
        notes.append(
            f"the {what} has a standard error of {size}; {' and '.join(mend)} would make that 5%"
        )
    return tuple(notes)


def _dense(H: WeightMatrix) -> tuple[Vector, "Traces"]:
    """Eigenvectors and traces from the matrix itself."""
    matrix = H.products(np.eye(H.size))
    _, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    return vectors[:, ::-1], Traces(H, vectors[:, ::-1])


class Traces:
    """Trace and relative trace, draw of masks by draw and probe by probe.

    With P = QQᵀ, H = PH + HP − PHP + (I − P)H(I − P): the first three are known from HQ, and the
    last is probed with random signs s, sᵀ(I − P)H(I − P)s for its trace, and
    s ∘ (I − P)H(I − P)s for its diagonal.
    """

    def __init__(self, H: WeightMatrix, Q: Vector) -> None:
        self._H, self._Q = H, Q
        self._squares = H.weights() ** 2
        count = H.masks.count
        self.mean = np.zeros_like(Q)
        inner, lengths, known = [], [], []
        for draw in range(count):
            HQ = H.products_of_draw(draw, Q)
            if count > 1:  # for their spread, in double precision
                inner.append(np.einsum("ki,kj->ij", Q, HQ, dtype=np.float64))
                lengths.append(_lengths(HQ))
            else:
                inner.append(Q.T @ HQ)
                lengths.append(np.zeros(Q.shape[1]))
            known.append(self._known(HQ, inner[-1]))
            HQ /= count
            self.mean += HQ
        # (draws, t, t): q_jᵀHq_i of every draw; (draws, t): ‖Hq‖².
        self._forms, self._lengths = np.array(inner), np.array(lengths)
        # (draws, 1, 2): what is known of both traces.
        self._base = torch.tensor(known, dtype=torch.float64).reshape(count, 1, 2)
        self._table = self._base
        self.size, self.probes = H.size, 0  # probes drawn at random

    def _known(self, HQ: Vector, inner: Vector) -> tuple[float, float]:
        Q = self._Q
        # Without arrays of Q's size on the way.
        diagonal = 2 * np.einsum("ij,ij->i", Q, HQ) - np.einsum("ij,jk,ik->i", Q, inner, Q)
        return float(np.trace(inner)), float(self._squares @ diagonal)

    def probe(self, probes: int | None, source: torch.Generator) -> None:
        """Add as many probes as asked for, or as bring the traces' errors under 5%.

        Where a basis takes no more products than they would, it gives the traces themselves.
        """
        if probes == 0:
            self._table = torch.full_like(self._base, math.nan)
            return
        if probes is not None and probes >= self._H.size:
            self._table = self._summed()
            return
        parts = [self._probed(probes or _PILOT, source)]
        while probes is None:
            samples = torch.cat(parts, 1)
            needed = max(probes_needed(column) for column in samples.mean(0).T)
            if needed >= self._H.size:
                self._table = self._summed()
                return
            if needed <= samples.shape[1]:
                break
            parts.append(self._probed(needed - samples.shape[1], source))
        self._table = torch.cat(parts, 1)
        self.probes = self._table.shape[1]

    def _summed(self) -> Tensor:
        """The diagonal by unit vectors, summed: (draws, 1, 2)."""
        H = self._H
        table = torch.zeros(H.masks.count, 1, 2, dtype=torch.float64)
        size = columns_at_once(H.size, _PILOT)
        for start in range(0, H.size, size):
            rows = np.arange(start, min(start + size, H.size))
            units = np.zeros((H.size, len(rows)), dtype=H.dtype)
            units[rows, rows - start] = 1
            for draw in range(H.masks.count):
                own = H.products_of_draw(draw, units)[rows, rows - start]
                table[draw, 0, 0] += float(own.sum(dtype=np.float64))
                table[draw, 0, 1] += float(self._squares[rows] @ own)
        return table

    def _probed(self, count: int, source: torch.Generator) -> Tensor:
        """(draws, count, 2)."""
        H, Q = self._H, self._Q
        size = columns_at_once(H.size, _PILOT)
        parts = []
        for start in range(0, count, size):
            S = random_signs(H.size, min(size, count - start), source, H.dtype)
            Z = S - Q @ (Q.T @ S)
            part = np.empty((H.masks.count, Z.shape[1], 2))
            for draw in range(H.masks.count):
                HZ = H.products_of_draw(draw, Z)
                part[draw, :, 0] = (Z * HZ).sum(0, dtype=np.float64)
                HZ -= Q @ (Q.T @ HZ)
                part[draw, :, 1] = self._squares @ (S * HZ)
            parts.append(torch.from_numpy(part))
        return torch.cat(parts, 1) + self._base

    def estimates(self) -> tuple[Estimate, Estimate]:
        """Trace and relative trace."""
        if self._table.isnan().all():  # left out
            unknown = Estimate(math.nan, math.nan, 0, "probes")
            return unknown, unknown
        over = ("masks", "probes")
        trace, relative = (crossed_estimate(t, over) for t in self._table.unbind(2))
        if self._table.shape[:2] == (1, 1):
            return Estimate(trace.value, 0.0, 1, "probes"), Estimate(
                relative.value, 0.0, 1, "probes"
            )
        return trace, relative

    def errors(self, top: int) -> tuple[Vector, tuple[str, ...]]:
        """Standard errors over masks of the first `top` qᵀHq, and what is to be said of them.

        The columns of Q have to be eigenvectors of the mean. NaN where draws do not tell apart.
        """
        draws, found = self._lengths.shape
        if draws == 1:
            return np.zeros(top), ()
        # ‖(I − P)Hq‖², over draws less that of their mean.
        kept = np.square(self._forms).sum(1)
        of_mean = _lengths(self.mean) - np.square(self._forms.mean(0)).sum(0)
        beyond = ((self._lengths - kept).sum(0) - draws * of_mean) / (draws - 1)
        beyond = beyond.clip(0) * (found < self.size)
        needed = draws_needed(self._forms, beyond, float(np.finfo(self._H.dtype).eps))[:top]
        errors = self._forms.diagonal(axis1=1, axis2=2)[:, :top].std(0, ddof=1) / math.sqrt(draws)
        return np.where(needed > draws, np.nan, errors), note_of(needed, draws)


def _lengths(columns: Vector) -> Vector:
    """Their squared lengths, summed up in float64 without another array of their size."""
    lengths: Vector = np.einsum("ij,ij->j", columns, columns, dtype=np.float64)
    return lengths


def probes_needed(samples: Tensor) -> int:
    """How many probes bring the standard error under 5%, judging from those drawn so far.

    With so much to spare that one look is nearly always enough: stopping at the first moment at
    which the error happens to be small would bias the estimate.
    """
    so_far = mean_estimate(samples)
    wanted = _WANTED * abs(so_far.value)
    if so_far.standard_error <= wanted:
        return so_far.n
    if wanted == 0:
        return _MOST_PROBES
    needed = so_far.n * (so_far.standard_error / (0.6 * wanted)) ** 2
    return min(_MOST_PROBES, math.ceil(needed))
