"""Second moments of data of any size: one pass, mergeable, and all that a solution needs."""

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from droplens.linear._arrays import (
    ArrayLike,
    Floats,
    as_matrix,
    as_numbers,
    check_finite,
    check_rows,
    check_shape,
    check_width,
)
from droplens.linear._solve import Solution, solve_whitened
from droplens.linear._whitening import Gram, chunks, whiten_gram

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from droplens.linear._path import Path

_FORMAT: Final = 1
_NAMES: Final = ("format", "count", "mean_x", "mean_y", "xx", "yx", "yy")


class Moments:
    """Running means and second moments of inputs X and targets Y, over any number of examples.

    Holds n, the means, the scatter Σ(x − x̄)(x − x̄)ᵀ, Σ(y − ȳ)(x − x̄)ᵀ and Σ‖y − ȳ‖² in float64,
    whatever precision comes in: memory depends on the dimensions only. Sums are taken around the
    means (Chan, Golub, LeVeque 1983), so that a large offset costs no digits.

    >>> moments = Moments().update(np.array([[1.0], [3.0]]), np.array([[2.0], [6.0]]))
    >>> moments.count, moments.mean_x.tolist()
    (2, [2.0])
    >>> moments.solve(0.5, 1).coefficients.round(6).tolist()
    [[1.0]]
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean_x: Floats = np.zeros(0)  # (d_in,)
        self.mean_y: Floats = np.zeros(0)  # (d_out,)
        self._xx: Floats = np.zeros((0, 0))  # Σ(x − x̄)(x − x̄)ᵀ
        self._yx: Floats = np.zeros((0, 0))  # Σ(y − ȳ)(x − x̄)ᵀ
        self._yy = 0.0  # Σ‖y − ȳ‖²

    @property
    def d_in(self) -> int:
        """Number of inputs, 0 before the first update."""
        return self.mean_x.size

    @property
    def d_out(self) -> int:
        """Number of targets, 0 before the first update."""
        return self.mean_y.size

    def __repr__(self) -> str:
        return f"Moments(count={self.count}, d_in={self.d_in}, d_out={self.d_out})"

    @classmethod
    def from_batches(cls, batches: Iterable[tuple[ArrayLike, ArrayLike]]) -> "Moments":
        """The moments of an iterable of (X, Y), e.g. a DataLoader or memory-mapped slices.

        Raises:
            TypeError: if a batch does not hold real numbers.
            ValueError: if there is no batch, or one does not fit.
        """
        moments = cls()
        for X, Y in batches:
            moments.update(X, Y)
        moments._check_data()
        return moments

    @classmethod
    def of_target(cls, target: ArrayLike, metric: ArrayLike | None = None) -> "Moments":
        """The population form: E xxᵀ = C, E yxᵀ = M C, no noise (theory §2.5; C = I if not given).

        Counts as one example, so that values carry no 1/n.

        Raises:
            TypeError: if an input does not hold real numbers.
            ValueError: if shapes do not fit, or an input holds NaN or Inf.
        """
        M = as_matrix("target", target)
        C = np.eye(M.shape[1]) if metric is None else as_matrix("metric", metric)
        if C.shape != (M.shape[1],) * 2:
            raise ValueError(
                f"metric has to be of shape {(M.shape[1],) * 2}, one row per column of target, "
                f"but got {C.shape}"
            )
        moments = cls()
        yx = M if metric is None else M @ C
        moments._set(1, np.zeros(M.shape[1]), np.zeros(M.shape[0]), C, yx, float(np.vdot(yx, M)))
        return moments

    def update(self, X: ArrayLike, Y: ArrayLike) -> "Moments":
        """Take in a batch of examples, in place; returns itself.

        Args:
            X: (n, d_in).
            Y: (n, d_out).

        Raises:
            TypeError: if X or Y does not hold real numbers.
            ValueError: if shapes do not fit each other or earlier batches, or one holds NaN or Inf.
        """
        inputs, targets = as_numbers("X", X), as_numbers("Y", Y)
        for name, array in (("X", inputs), ("Y", targets)):
            check_shape(name, array)
        check_rows(inputs, targets)
        self._check_dimensions(inputs.shape[1], targets.shape[1])
        # All of the batch is summed before any of it counts: a bad entry leaves no trace.
        batch = Moments()
        for part in chunks(len(inputs), inputs.shape[1] + targets.shape[1]):
            batch._add(_of_chunk(inputs[part], targets[part]))
        self._add(batch)
        return self

    def merge(self, other: "Moments") -> "Moments":
        """The moments of both sets of examples together, as a new object.

        Raises:
            TypeError: if `other` is not Moments.
            ValueError: if the dimensions differ.
        """
        if not isinstance(other, Moments):
            raise TypeError(f"other has to be Moments, but got {type(other).__name__}")
        merged = Moments()
        merged._add(self)
        if other.count:
            merged._check_dimensions(other.d_in, other.d_out)
            merged._add(other)
        return merged

    def gram(self, center: bool = False) -> Gram:
        """Second moments per example, around the means if `center`, else around zero.

        Raises:
            ValueError: if there are no examples yet.
        """
        self._check_data()
        xx, yx, yy = self._xx / self.count, self._yx / self.count, self._yy / self.count
        if center:
            return Gram(xx, yx, yy, self.count)
        return Gram(
            xx + np.outer(self.mean_x, self.mean_x),
            yx + np.outer(self.mean_y, self.mean_x),
            yy + float(self.mean_y @ self.mean_y),
            self.count,
        )

    def solve(
        self,
        p: float,
        width: int,
        block_size: int = 1,
        adaptive: bool = False,
        center: bool = False,
    ) -> Solution:
        """The global minimiser for these moments: `solve`, without the data.

        Working from C = XᵀX/n squares the condition number of X: directions below √ε of the
        largest (after scaling of the features) count as absent.

        Args:
            p: drop probability, below 1.
            width: r, number of hidden units.
            block_size: b, a divisor of r.
            adaptive: take λ_r = (r/b)·λ, so that the penalty does not fade with the width.
            center: solve around the means; the intercept then stands in the solution.

        Raises:
            TypeError: if an argument is of the wrong type.
            ValueError: if there are no examples yet, p is outside [0, 1) or b does not divide r.
        """
        solution = solve_whitened(whiten_gram(self.gram(center)), p, width, block_size, adaptive)
        return solution.around(self.mean_x, self.mean_y) if center else solution

    def path(
        self,
        width: int,
        rates: Sequence[float] | None = None,
        block_size: int = 1,
        adaptive: bool = False,
        center: bool = False,
    ) -> "Path":
        """The solutions over a grid of rates for these moments: `path`, without the data.

        Around the means if `center`; its solutions then still carry no intercept.

        Raises:
            TypeError: if an argument is of the wrong type.
            ValueError: as `solve`, or if there are no rates.
        """
        from droplens.linear._path import check_rates, path_of

        r, b = check_width(width, block_size)
        return path_of(whiten_gram(self.gram(center)), r, check_rates(rates), b, adaptive)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to a NumPy archive at exactly `path`."""
        with open(path, "wb") as file:
            np.savez(file, allow_pickle=False, **self.to_arrays())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Moments":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is not one, or of another format.
        """
        if not os.path.exists(path):
            raise FileNotFoundError(f"there is no file {os.fspath(path)}")
        try:
            with np.load(path, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in _NAMES}
        except (
            OSError,
            ValueError,
            KeyError,
            IndexError,
            EOFError,
            TypeError,
            BadZipFile,
        ) as error:
            raise ValueError(f"{os.fspath(path)} is not a file of Moments: {error}") from error
        return cls.from_arrays(arrays)

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Everything held, as named arrays: to send or to store."""
        return {
            "format": np.array(_FORMAT),
            "count": np.array(self.count),
            "mean_x": self.mean_x,
            "mean_y": self.mean_y,
            "xx": self._xx,
            "yx": self._yx,
            "yy": np.array(self._yy),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Any]) -> "Moments":
        """Rebuild from `to_arrays`.

        Raises:
            ValueError: if the arrays are of another format.
        """
        if int(arrays["format"]) != _FORMAT:
            raise ValueError(
                f"these Moments are of format {int(arrays['format'])}, but this version of "
                f"droplens reads format {_FORMAT}"
            )
        moments = cls()
        names = ("mean_x", "mean_y", "xx", "yx")
        mean_x, mean_y, xx, yx = (np.array(arrays[name], dtype=np.float64) for name in names)
        moments._set(int(arrays["count"]), mean_x, mean_y, xx, yx, float(arrays["yy"]))
        return moments

    def all_reduce(self, group: "ProcessGroup | None" = None) -> "Moments":
        """The moments of all processes of an existing torch.distributed group, as a new object.

        Every process has to call it, and gets the same result; one without examples adds nothing.

        Raises:
            ValueError: if the processes' dimensions differ, or none has examples.
            RuntimeError: if torch.distributed has not been initialised.
        """
        from droplens.linear._distributed import all_reduce

        return all_reduce(self, group)

    def _add(self, other: "Moments") -> None:
        if not other.count:
            return
        if not self.count:
            self._set(
                other.count,
                other.mean_x.copy(),
                other.mean_y.copy(),
                other._xx.copy(),
                other._yx.copy(),
                other._yy,
            )
            return
        total = self.count + other.count
        x, y = other.mean_x - self.mean_x, other.mean_y - self.mean_y
        weight = self.count * (other.count / total)
        self._xx += other._xx + np.outer(weight * x, x)
        self._yx += other._yx + np.outer(weight * y, x)
        self._yy += other._yy + weight * float(y @ y)
        self.mean_x = self.mean_x + x * (other.count / total)
        self.mean_y = self.mean_y + y * (other.count / total)
        self.count = total

    def _set(
        self, count: int, mean_x: Floats, mean_y: Floats, xx: Floats, yx: Floats, yy: float
    ) -> None:
        self.count, self.mean_x, self.mean_y = count, mean_x, mean_y
        self._xx, self._yx, self._yy = xx, yx, yy

    def _check_data(self) -> None:
        if not self.count:
            raise ValueError("these Moments hold no examples yet; call update(X, Y) first")

    def _check_dimensions(self, d_in: int, d_out: int) -> None:
        if self.count and (d_in, d_out) != (self.d_in, self.d_out):
            raise ValueError(
                f"these Moments hold {self.d_in} inputs and {self.d_out} targets, but got {d_in} "
                f"and {d_out}"
            )


def _of_chunk(X: NDArray[Any], Y: NDArray[Any]) -> Moments:
    """The moments of a few rows.

    Raises:
        ValueError: if they hold NaN or Inf, or numbers whose squares overflow.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        mean_x, mean_y = X.mean(0, dtype=np.float64), Y.mean(0, dtype=np.float64)
        x, y = X - mean_x, Y - mean_y
        xx, yx, yy = x.T @ x, y.T @ x, float(np.vdot(y, y))
    # Every NaN and Inf reaches a diagonal entry: no second pass over the data.
    if not (np.isfinite(np.diagonal(xx)).all() and np.isfinite(yy)):
        check_finite("X", X)
        check_finite("Y", Y)
        raise ValueError("X and Y hold numbers whose squares overflow float64; rescale the data")
    moments = Moments()
    moments._set(len(X), mean_x, mean_y, xx, yx, yy)
    return moments
