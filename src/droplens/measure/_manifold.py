"""Curvature of a manifold of points z(θ) along a direction, matrix-free (theory §4; P3).

The acceleration a = D²z[v, v] is split on the span of the Jacobian J, by least squares with
products J w and Jᵀu alone: what lies in the span depends on the parameters chosen, what is normal
to it is the manifold's own.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import jvp, vjp

Vector = NDArray[np.float64]

TOLERANCE: Final = 1e-8
"""Largest ‖Jᵀa_⊥‖/(‖J‖‖a‖) that counts as solved in double precision."""

# LSMR's own stopping rule: what it leaves is misread by this times the condition number of J,
# and changes κ by the square of that.
STOP: Final = 1e-11


@dataclass(frozen=True)
class ManifoldCurvature:
    """How the curve θ + t v bends: all of it inside the manifold, or with the manifold.

    Args:
        intrinsic: κ = ‖a_⊥‖/‖d‖², the manifold's own curvature along v.
        parameter_effects: ‖a_∥‖/‖d‖², which other parameters could undo.
        residual: ‖Jᵀa_⊥‖/(‖J‖‖a‖) as the least-squares solve left it; 0 would be exact. The error
            of κ is of second order in it times the condition number of J.
        speed: ‖d‖, how fast the point moves.
    """

    intrinsic: float
    parameter_effects: float
    residual: float
    speed: float


class TangentMap(ABC):
    """A point z(θ) with metric: everything in coordinates where the metric is the identity."""

    size: int
    tolerance: float = TOLERANCE
    stop: float = STOP

    @abstractmethod
    def push(self, w: Tensor) -> Tensor:
        """J w: (size,) -> (m,)."""

    @abstractmethod
    def pull(self, u: Tensor) -> Tensor:
        """Jᵀu: (m,) -> (size,)."""

    @abstractmethod
    def bend(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """Velocity d = J v and acceleration a = D²z[v, v]: (m,) each."""


def manifold_curvature(
    function: Callable[[Tensor], Tensor],
    parameters: Tensor,
    direction: Tensor,
    metric: Tensor | None = None,
) -> ManifoldCurvature:
    """Curvature of the manifold z = `function`(θ) at θ along v (theory §4; P3).

    d = Jv, a = D²z[v, v] in z's coordinates; a = a_∥ + a_⊥, orthogonal in `metric`, with a_∥ in the
    span of J. κ = ‖a_⊥‖/‖d‖² does not depend on how the manifold is parametrised; ‖a_∥‖/‖d‖² does.
    Computed in double precision from products with J and Jᵀ alone.

    >>> import torch
    >>> circle = lambda t: 5 * torch.cat([t.cos(), t.sin()])
    >>> round(manifold_curvature(circle, torch.ones(1), torch.ones(1)).intrinsic, 8)
    0.2

    Args:
        function: of θ (d,), returns z (m,); its operations have to be torch's, twice
            differentiable, and take double precision.
        parameters: θ, (d,).
        direction: v, (d,); its length does not matter.
        metric: of z's coordinates: a symmetric positive semi-definite (m, m), or its diagonal (m,);
            the identity if not given. In natural coordinates of an exponential family the Fisher
            information gives the e-curvature; in expectation coordinates its inverse gives the
            m-curvature.

    Raises:
        TypeError: if an argument is not a floating point tensor, or `function` cannot be called.
        ValueError: if shapes do not fit, a number is NaN or Inf, `metric` is no metric, `direction`
            is zero or does not move the point, or `function` cannot be differentiated twice.
        RuntimeError: if the least-squares solve does not reach 1e-8.
    """
    if not callable(function):
        raise TypeError(
            f"function has to be a function of one tensor, but got {type(function).__name__}"
        )
    theta, v = _vector("parameters", parameters), _vector("direction", direction)
    if v.shape != theta.shape:
        raise ValueError(
            f"direction has to have the parameters' shape {tuple(theta.shape)}, but got "
            f"{tuple(v.shape)}"
        )
    if not bool(v.any()):
        raise ValueError("direction is zero; it has to point somewhere")
    return curvature_along(_Function(function, theta, metric), v)


def curvature_along(tangent: TangentMap, v: Tensor) -> ManifoldCurvature:
    """Split the acceleration along v on the span of J.

    Raises:
        ValueError: if v does not move the point, or it has no finite second derivative.
        RuntimeError: if the solve does not converge.
    """
    # Of unit length, so that a short direction does not underflow.
    d, a = tangent.bend(v / v.norm())
    if not bool(d.isfinite().all() and a.isfinite().all()):
        raise ValueError(
            "the second derivative along the direction is NaN or Inf; look for a square root, a "
            "division or a power at zero"
        )
    speed = float(d.norm())
    if speed == 0:
        raise ValueError(
            "the direction does not move the point: J v = 0. Look for an operation without a "
            "derivative (round, argmax, detach), or for parameters that nothing depends on"
        )
    size = float(a.norm())
    if size == 0:
        return ManifoldCurvature(0.0, 0.0, 0.0, speed)
    inside, outside, residual = _split(tangent, a.double().cpu().numpy() / size)
    if residual > tangent.tolerance:
        raise RuntimeError(
            f"the least-squares solve stopped at a residual of {residual:.1e}, above "
            f"{tangent.tolerance:.0e}: the parameters are too nearly dependent; take fewer of them"
        )
    scale = size / speed**2
    return ManifoldCurvature(outside * scale, inside * scale, residual, speed)


def _split(tangent: TangentMap, b: Vector) -> tuple[float, float, float]:
    """Norms of the parts of b inside and outside the span of J, and the residual of the solve."""
    from scipy.sparse.linalg import LinearOperator, lsmr

    def push(w: Vector) -> Vector:
        return _numbers(tangent.push(torch.from_numpy(np.array(w).ravel())))

    def pull(u: Vector) -> Vector:
        return _numbers(tangent.pull(torch.from_numpy(np.array(u).ravel())))

    shape = (len(b), tangent.size)
    J: Any = LinearOperator(shape, matvec=push, rmatvec=pull, dtype=np.float64)
    most = max(500, 20 * tangent.size)
    outside, norm, left = b, 0.0, 0.0
    # Solved again for what is left: where that is small, the first solve leaves rounding in it.
    for _ in range(2):
        rhs = float(np.linalg.norm(outside))
        found = lsmr(J, outside / rhs, atol=tangent.stop, btol=tangent.stop, conlim=0, maxiter=most)
        outside = outside - push(found[0]) * rhs
        norm = max(norm, float(found[5]))
        left = float(np.linalg.norm(pull(outside)))
        if norm == 0 or left <= tangent.stop * norm * float(np.linalg.norm(outside)):
            break
    inside = b - outside
    return (
        float(np.linalg.norm(inside)),
        float(np.linalg.norm(outside)),
        left / norm if norm else 0.0,
    )


def _numbers(tensor: Tensor) -> Vector:
    array: Vector = tensor.detach().double().cpu().numpy()
    return array


def _vector(name: str, given: Tensor) -> Tensor:
    """A 1-D tensor of finite numbers in double precision.

    Raises:
        TypeError: if it is not a floating point tensor.
        ValueError: if it is not 1-D, empty, or not finite.
    """
    if not isinstance(given, Tensor):
        raise TypeError(f"{name} has to be a tensor, but got {type(given).__name__}")
    if not given.is_floating_point():
        raise TypeError(f"{name} has to be floating point, but got {given.dtype}")
    if given.dim() != 1 or given.numel() == 0:
        raise ValueError(f"{name} has to be 1-D and not empty, but got shape {tuple(given.shape)}")
    if not bool(given.isfinite().all()):
        raise ValueError(f"{name} holds NaN or Inf")
    return given.detach().double()


@final
class _Function(TangentMap):
    """A function of θ, weighed by the root of a metric given as numbers."""

    def __init__(
        self, function: Callable[[Tensor], Tensor], theta: Tensor, metric: Tensor | None
    ) -> None:
        self._function, self._theta = function, theta
        z = self._point(theta)
        self.size, self._root = theta.numel(), _metric_root(metric, z)
        self._pull = vjp(self._point, theta)[1]

    def _point(self, theta: Tensor) -> Tensor:
        z = self._function(theta)
        if not isinstance(z, Tensor) or z.dim() != 1:
            what = tuple(z.shape) if isinstance(z, Tensor) else type(z).__name__
            raise ValueError(f"function has to return a 1-D tensor, but returned {what}")
        return z

    def push(self, w: Tensor) -> Tensor:
        return self._weigh(self._along(self._point, w)[1])

    def pull(self, u: Tensor) -> Tensor:
        found: tuple[Tensor] = self._pull(
            self._root @ u if self._root.dim() == 2 else self._root * u
        )
        return found[0]

    def bend(self, v: Tensor) -> tuple[Tensor, Tensor]:
        d, a = self._along(lambda theta: jvp(self._point, (theta,), (v,))[1], v)
        return self._weigh(d), self._weigh(a)

    def _along(self, function: Callable[[Tensor], Tensor], v: Tensor) -> tuple[Tensor, Tensor]:
        try:
            value, slope, *_ = jvp(function, (self._theta,), (v.to(self._theta),))
        except RuntimeError as error:
            raise ValueError(not_twice(error)) from error
        return value, slope

    def _weigh(self, x: Tensor) -> Tensor:
        return self._root.mT @ x if self._root.dim() == 2 else self._root * x


def not_twice(error: Exception) -> str:
    """What to say of an operation that torch cannot differentiate forwards."""
    return (
        "the function cannot be differentiated twice in forward mode, which curvature needs: "
        f"{str(error).splitlines()[0]}"
    )


def _metric_root(metric: Tensor | None, z: Tensor) -> Tensor:
    """R with R Rᵀ = metric, or the diagonal of R.

    Raises:
        TypeError: if `metric` is not a floating point tensor.
        ValueError: if it is not of a shape that fits z, symmetric and positive semi-definite.
    """
    if metric is None:
        return torch.ones_like(z)
    if not isinstance(metric, Tensor) or not metric.is_floating_point():
        what = metric.dtype if isinstance(metric, Tensor) else type(metric).__name__
        raise TypeError(f"metric has to be a floating point tensor, but got {what}")
    m = len(z)
    if metric.shape not in {(m,), (m, m)}:
        raise ValueError(
            f"metric has to have shape {(m, m)} or {(m,)} for a function with {m} values, but got "
            f"{tuple(metric.shape)}"
        )
    G = metric.detach().to(z)
    if not bool(G.isfinite().all()):
        raise ValueError("metric holds NaN or Inf")
    if G.dim() == 1:
        values = G
    else:
        if not torch.allclose(G, G.mT, rtol=1e-8, atol=1e-12 * float(G.abs().max())):
            raise ValueError("metric has to be symmetric")
        values, vectors = torch.linalg.eigh((G + G.mT) / 2)
    if float(values.min()) < -1e-10 * float(values.abs().max()):
        raise ValueError(
            f"metric has to be positive semi-definite, but has the eigenvalue {float(values.min())}"
        )
    roots = values.clamp_min(0).sqrt()
    return roots if G.dim() == 1 else vectors * roots
