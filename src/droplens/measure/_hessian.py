"""Curvature of the loss: trace and top eigenvalues of its Hessian, matrix-free (theory §4)."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from droplens.batches import Batches, checked_passes, is_one_batch
from droplens.calling import check_outputs, predictions
from droplens.estimates import Estimate, exact, mean_estimate
from droplens.gates import masks_off
from droplens.measure._checks import trainable
from droplens.measure._directions import Direction
from droplens.measure._risk import Loss, labelled
from droplens.products import differentiable_gradient, hessian_product
from droplens.randomness import private_generator

# Up to this many parameters the matrix is formed, and everything is exact.
_DENSE = 64
_PILOT = 16
_MOST_PROBES = 400
_WANTED = 0.05
# Relative residual asked of an eigenpair. The eigenvalue's own error is at most its square over
# the distance to the next one: a millionth, where neighbours differ by 1%.
_TOLERANCE = 1e-4

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Hessian:
    """Trace and largest eigenvalues of the Hessian of the loss in the trainable weights.

    Args:
        trace: with its standard error over random probes; 0 where the matrix was formed.
        top_eigenvalues: the algebraically largest, falling, float64.
        residuals: ‖Hq − λq‖ of each eigenpair with ‖q‖ = 1; an eigenvalue is off by at most that.
        eigenvectors: q by parameter, ready to be used as directions of `flatness`.
        masks: "off", dropout was the identity.
        seed: repeats the probes.
    """

    trace: Estimate
    top_eigenvalues: Tensor
    residuals: Tensor
    eigenvectors: tuple[Direction, ...] = field(repr=False)
    masks: str
    seed: int


def hessian(
    model: nn.Module,
    batches: Any,
    loss: Any,
    top: int = 5,
    masks: Literal["off"] = "off",
    *,
    probes: int | None = None,
    seed: int | None = None,
    generator: torch.Generator | None = None,
) -> Hessian:
    """Trace and top eigenvalues of the Hessian of the loss, from products H v alone (theory §4).

    Eigenpairs by scipy's `eigsh`. The trace is exact on the span of the eigenvectors found, and
    Hutchinson's estimate on the rest. Dropout is the identity and norm layers are in eval.

    Args:
        model: any torch module that can be differentiated twice.
        batches: what `as_batches` takes, with targets; read once for every product, or held as
            one graph where it is one batch.
        loss: a loss object; units and reduction are its own.
        top: how many eigenvalues.
        masks: "off".
        probes: random vectors for the trace; by default as many as bring its standard error under
            5%, from 16 to 400.
        seed: repeats the probes.
        generator: where the seed is drawn from instead.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if data or weights are bad, data change between passes, no parameter is
            trainable, or `top`, `masks` or `probes` is out of range.
        RuntimeError: if the eigenvalues do not converge.
    """
    if masks != "off":
        raise ValueError(f"masks has to be 'off', but got {masks!r}")
    if isinstance(top, bool) or not isinstance(top, int) or top < 0:
        raise ValueError(f"top has to be a whole number of at least 0, but got {top!r}")
    if probes is not None and probes < 2:
        raise ValueError(f"probes has to be at least 2, but got {probes}")
    source, used_seed = private_generator(generator, seed)
    with torch.enable_grad(), masks_off(model):
        H = LossHessian(model, checked_passes(batches, model), Loss(loss))
        if top > H.size:
            raise ValueError(f"top is {top}, but the model has only {H.size} trainable numbers")
        if H.size <= _DENSE:
            return _dense(H, top, used_seed)
        values, Q = _top(H, top, source)
        residuals = H.products(Q) - Q * values
        trace = _trace(H, values, Q, residuals, probes, source)
    return Hessian(
        trace,
        torch.from_numpy(values),
        torch.from_numpy(np.linalg.norm(residuals, axis=0)),
        tuple(H.named(q) for q in Q.T),
        "off",
        used_seed,
    )


class _FlatError(Exception):
    """The Hessian is zero, and Lanczos has nothing to work on."""


class LossHessian:
    """The Hessian of the loss over all batches as a linear map on flat float64 vectors."""

    def __init__(self, model: nn.Module, batches: Batches, loss: Loss) -> None:
        self._model, self._batches, self._loss = model, batches, loss
        parameters = trainable(model)
        self._names, self._parameters = list(parameters), list(parameters.values())
        self.size = sum(p.numel() for p in self._parameters)
        self._curved = False
        # The graph of a single batch may be kept: it is what one product needs anyway.
        self._held = next(iter(self._graphs())) if is_one_batch(batches) else None

    def products(self, V: Vector) -> Vector:
        """H V for the columns of V (d, k): one pass over the data for all of them."""
        vectors = [self._split(column) for column in V.T]
        result = np.zeros_like(V)
        masses = 0.0
        for mass, gradient in [self._held] if self._held else self._graphs():
            masses += mass
            for k, vector in enumerate(vectors):
                own = hessian_product(gradient, self._parameters, vector)
                result[:, k] += mass * _flat(own)
        return result / self._loss.whole(masses)

    def product(self, vector: Vector) -> Vector:
        """H v for one vector (d,).

        Raises:
            _FlatError: if the first product is zero, and with it (the vector is random) H.
        """
        found = self.products(np.reshape(vector, (-1, 1)))[:, 0]
        self._curved = self._curved or bool(found.any())
        if not self._curved:
            raise _FlatError
        return found

    def named(self, vector: Vector) -> Direction:
        """A flat vector as tensors by parameter name."""
        return dict(zip(self._names, self._split(vector), strict=True))

    def _graphs(self) -> Iterator[tuple[float, tuple[Tensor, ...]]]:
        """One batch after the other.

        Yields:
            Its mass and its differentiable gradient.

        Raises:
            ValueError: if the loss does not depend on the weights.
        """
        for batch, targets in labelled(self._batches):
            outputs = predictions(self._model, batch.inputs)
            check_outputs(self._model, outputs)
            self._loss.check(outputs, targets)
            value = self._loss.value(outputs, targets)
            if not value.requires_grad:
                raise ValueError(
                    "the loss does not depend on the model's trainable parameters; look for "
                    "detach() or no_grad() in its forward"
                )
            mass = self._loss.mass(batch, outputs)
            yield mass, differentiable_gradient(value, self._parameters)

    def _split(self, vector: Vector) -> list[Tensor]:
        flat = torch.from_numpy(np.ascontiguousarray(vector))
        parts = flat.split([p.numel() for p in self._parameters])
        return [
            part.view(p.shape).to(dtype=p.dtype, device=p.device)
            for part, p in zip(parts, self._parameters, strict=True)
        ]


def _flat(tensors: Sequence[Tensor]) -> Vector:
    joined = torch.cat([tensor.detach().flatten() for tensor in tensors])
    array: Vector = joined.double().cpu().numpy()
    return array


def _dense(H: LossHessian, top: int, seed: int) -> Hessian:
    matrix = H.products(np.eye(H.size))
    matrix = (matrix + matrix.T) / 2
    values, vectors = np.linalg.eigh(matrix)
    values, Q = values[::-1][:top].copy(), vectors[:, ::-1][:, :top].copy()
    residuals = np.linalg.norm(matrix @ Q - Q * values, axis=0)
    return Hessian(
        exact(float(np.trace(matrix)), "probes"),
        torch.from_numpy(values),
        torch.from_numpy(residuals),
        tuple(H.named(q) for q in Q.T),
        "off",
        seed,
    )


def _normal(H: LossHessian, source: torch.Generator) -> Vector:
    array: Vector = torch.randn(H.size, generator=source, dtype=torch.float64).numpy()
    return array


def _top(H: LossHessian, top: int, source: torch.Generator) -> tuple[Vector, Vector]:
    """The `top` largest eigenvalues, falling, and their eigenvectors as columns.

    Raises:
        RuntimeError: if they do not converge.
    """
    from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

    if top == 0:
        return np.zeros(0), np.zeros((H.size, 0))
    operator: Any = LinearOperator((H.size, H.size), matvec=H.product, dtype=np.float64)
    # Few vectors more than asked for: each is as large as the model.
    size = min(H.size, 2 * top + 2)
    try:
        values, Q = eigsh(
            operator, k=top, which="LA", v0=_normal(H, source), ncv=size, tol=_TOLERANCE
        )
    except _FlatError:
        return np.zeros(top), np.eye(H.size, top)
    except ArpackNoConvergence as error:
        raise RuntimeError(
            f"the {top} largest eigenvalues did not converge ({len(error.eigenvalues)} did); "
            "ask for fewer with top="
        ) from error
    order = np.argsort(values)[::-1]
    return values[order], Q[:, order]


def _trace(
    H: LossHessian,
    values: Vector,
    Q: Vector,
    residuals: Vector,
    probes: int | None,
    source: torch.Generator,
) -> Estimate:
    """The trace as tr QᵀHQ, exact, + tr (I − QQᵀ)H(I − QQᵀ), by Hutchinson's probes."""
    # QᵀHQ = QᵀQΛ + Qᵀ(residuals), exact for any orthonormal Q.
    known = float(values.sum() + (Q * residuals).sum())

    def sample(count: int) -> list[float]:
        found: list[float] = []
        for start in range(0, count, _PILOT):
            n = min(_PILOT, count - start)
            signs = torch.randint(2, (H.size, n), generator=source).numpy() * 2.0 - 1.0
            Z = signs - Q @ (Q.T @ signs)
            found += (known + (Z * H.products(Z)).sum(0)).tolist()
        return found

    if probes is not None:
        return mean_estimate(sample(probes), "probes")
    samples = sample(_PILOT)
    while (total := _probes_needed(samples)) > len(samples):
        samples += sample(total - len(samples))
    return mean_estimate(samples, "probes")


def _probes_needed(samples: Sequence[float]) -> int:
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
