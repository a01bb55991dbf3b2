"""scikit-learn estimators: low-rank regression and compression by solved dropout (theory §2.3)."""

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.base import (
    BaseEstimator,
    ClassNamePrefixFeaturesOutMixin,
    MultiOutputMixin,
    RegressorMixin,
    TransformerMixin,
)
from sklearn.model_selection import check_cv
from sklearn.utils.validation import check_is_fitted, validate_data

from droplens.linear._arrays import Floats
from droplens.linear._moments import Moments
from droplens.linear._path import cross_validate, default_width
from droplens.linear._solve import Solution, solve_whitened
from droplens.linear._whitening import whiten_data, whiten_gram

# scikit-learn is not typed: its bases are Any to the checker.
# mypy: disable-error-code="misc"


class _LinearMap(MultiOutputMixin, RegressorMixin, BaseEstimator):
    """What the regressions share: a solution, taken apart into scikit-learn's attributes."""

    def predict(self, X: Any) -> Floats:
        """Predictions X W + intercept, (n,) or (n, d_out) as the targets were."""
        check_is_fitted(self)
        inputs = validate_data(self, X, reset=False, dtype=[np.float64, np.float32])
        result: Floats = inputs @ self.coef_.T + self.intercept_
        return result

    def _keep(self, solution: Solution, single: bool) -> Self:
        self.solution_ = solution
        self.rank_ = solution.rank
        self.width_ = solution.width
        self.coef_ = solution.coefficients[0] if single else solution.coefficients
        self.intercept_ = float(solution.intercept[0]) if single else solution.intercept
        return self


class DropoutRegression(_LinearMap):
    """Multi-output regression through one hidden linear layer with dropout, solved exactly.

    The fit that stochastic dropout training approaches: the global minimum of
    (1/n)(‖Y − X V Uᵀ‖_F² + λ Σ_k ‖X V_k U_kᵀ‖_F²), λ = p/(1 − p). Singular values of the
    least-squares predictions are shrunk, small ones to zero, so the map has low rank (P1, P4).
    For blocks whose width does not reach the convex bound, `solution_.gap` says so.

    >>> X = np.array([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    >>> model = DropoutRegression(p=0.2, width=2).fit(X, X @ np.array([[2.0, 0.0], [0.0, 1.0]]))
    >>> model.rank_, model.coef_.round(3).tolist()
    (2, [[1.7, 0.0], [0.0, 0.7]])

    Args:
        p: drop probability, below 1.
        width: r, a multiple of `block_size`; min(d_in, d_out), rounded up to one, if None.
        block_size: b, consecutive hidden units that fall together.
        adaptive: take λ_r = (r/b)·λ, so that the penalty does not fade with the width.
        fit_intercept: solve around the means.

    Attributes:
        coef_: (d_out, d_in), or (d_in,) for one-dimensional targets.
        intercept_: (d_out,) or a float.
        rank_: how many singular values survived.
        width_: r.
        solution_: the `Solution`, with factors and certificate.
        n_features_in_: d_in.
    """

    def __init__(
        self,
        p: float = 0.5,
        width: int | None = None,
        block_size: int = 1,
        adaptive: bool = False,
        fit_intercept: bool = True,
    ) -> None:
        self.p = p
        self.width = width
        self.block_size = block_size
        self.adaptive = adaptive
        self.fit_intercept = fit_intercept

    def fit(self, X: Any, y: Any) -> Self:
        """Solve for X (n, d_in) and y (n,) or (n, d_out), forgetting earlier data.

        Raises:
            TypeError: if a parameter is of the wrong type.
            ValueError: if data or a parameter is bad.
        """
        inputs, targets, single = _validated(self, X, y, reset=True)
        # Kept for partial_fit, where it is no larger than the data.
        known = len(inputs) >= inputs.shape[1]
        self.moments_ = Moments().update(inputs, targets) if known else None
        return self._keep(_solve(self, inputs, targets, self.moments_), single)

    def partial_fit(self, X: Any, y: Any) -> Self:
        """Add a batch of examples and solve again: the same as one fit on all of them.

        Raises:
            TypeError: if a parameter is of the wrong type.
            ValueError: if data or a parameter is bad, or an earlier `fit` had fewer examples than
                features, of which no moments are kept.
        """
        first = not hasattr(self, "solution_")
        if not first and self.moments_ is None:
            raise ValueError(
                "the earlier fit had fewer examples than features and kept no moments; start with "
                "partial_fit to add batches"
            )
        inputs, targets, single = _validated(self, X, y, reset=first)
        moments = self.moments_ if not first and self.moments_ is not None else Moments()
        self.moments_ = moments.update(inputs, targets)
        return self._keep(_solve(self, None, None, self.moments_), single)


class DropoutRegressionCV(_LinearMap):
    """`DropoutRegression` with p and the width chosen by cross-validation along the path.

    Each fold needs one decomposition for the whole grid of rates and widths.

    Args:
        rates: drop probabilities to try; 0, .05, … .95 if None.
        widths: widths to try; min(d_in, d_out), rounded up to a multiple of `block_size`, if None.
        block_size: b.
        adaptive: take λ_r = (r/b)·λ at every rate.
        fit_intercept: solve around the means.
        cv: number of folds, a splitter of scikit-learn or pairs of indices; 5 folds if None.

    Attributes:
        p_: the rate chosen.
        errors_: held-out errors ‖y − ŷ‖² per example, (folds, widths, rates).
        rates_: the rates tried.
        coef_: (d_out, d_in), or (d_in,) for one-dimensional targets.
        intercept_: (d_out,) or a float.
        rank_: how many singular values survived.
        width_: the width chosen.
        solution_: the `Solution` on all the data.
        n_features_in_: d_in.
    """

    def __init__(
        self,
        rates: Sequence[float] | None = None,
        widths: Sequence[int] | None = None,
        block_size: int = 1,
        adaptive: bool = False,
        fit_intercept: bool = True,
        cv: Any = None,
    ) -> None:
        self.rates = rates
        self.widths = widths
        self.block_size = block_size
        self.adaptive = adaptive
        self.fit_intercept = fit_intercept
        self.cv = cv

    def fit(self, X: Any, y: Any) -> Self:
        """Choose p and the width, and solve for X (n, d_in) and y (n,) or (n, d_out).

        Raises:
            TypeError: if a parameter is of the wrong type.
            ValueError: if data or a parameter is bad.
        """
        inputs, targets, single = _validated(self, X, y, reset=True)
        found = cross_validate(
            inputs,
            targets,
            self.rates,
            self.widths,
            folds=list(check_cv(self.cv).split(inputs, targets)),
            block_size=self.block_size,
            adaptive=self.adaptive,
            center=self.fit_intercept,
        )
        self.p_, self.errors_, self.rates_ = found.best_rate, found.errors, found.rates
        return self._keep(found.solution, single)


class DropoutAutoencoder(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """A linear autoencoder with dropout on its code, solved exactly: a shrinking, balanced PCA.

    The global minimum of (1/n)(‖X − X V Uᵀ‖_F² + λ Σ_k ‖X V_k U_kᵀ‖_F²): principal directions,
    their standard deviations shrunk and the small ones dropped, spread over code units of equal
    importance, so that losing any one costs the same (P1).

    Args:
        p: drop probability, below 1.
        width: r, code units, a multiple of `block_size`; d_in, rounded up to one, if None.
        block_size: b, consecutive code units that fall together.
        adaptive: take λ_r = (r/b)·λ, so that the penalty does not fade with the width.
        fit_intercept: work around the mean.

    Attributes:
        encoder_: V, (d_in, r).
        decoder_: U, (d_in, r).
        mean_: (d_in,), zeros without intercept.
        rank_: how many principal directions survived.
        width_: r.
        solution_: the `Solution`, with certificate.
        n_features_in_: d_in.
    """

    def __init__(
        self,
        p: float = 0.5,
        width: int | None = None,
        block_size: int = 1,
        adaptive: bool = False,
        fit_intercept: bool = True,
    ) -> None:
        self.p = p
        self.width = width
        self.block_size = block_size
        self.adaptive = adaptive
        self.fit_intercept = fit_intercept

    def fit(self, X: Any, y: Any = None) -> Self:
        """Solve for X (n, d_in); `y` is ignored.

        Raises:
            TypeError: if a parameter is of the wrong type.
            ValueError: if data or a parameter is bad.
        """
        inputs = validate_data(self, X, dtype=[np.float64, np.float32])
        known = len(inputs) >= inputs.shape[1]
        moments = Moments().update(inputs, inputs) if known else None
        solution = _solve(self, inputs, inputs, moments)
        self.solution_ = solution
        self.rank_, self.width_ = solution.rank, solution.width
        self.encoder_, self.decoder_ = solution.incoming, solution.outgoing
        centre = inputs.mean(0, dtype=np.float64)
        self.mean_ = centre if self.fit_intercept else np.zeros_like(centre)
        return self

    def transform(self, X: Any) -> Floats:
        """The code (X − mean) V, (n, r)."""
        check_is_fitted(self)
        inputs = validate_data(self, X, reset=False, dtype=[np.float64, np.float32])
        code: Floats = (inputs - self.mean_) @ self.encoder_
        return code

    def inverse_transform(self, X: Any) -> Floats:
        """Inputs from codes (n, r): X Uᵀ + mean."""
        check_is_fitted(self)
        decoded: Floats = np.asarray(X) @ self.decoder_.T + self.mean_
        return decoded

    @property
    def _n_features_out(self) -> int:
        return int(self.width_)


def _validated(
    estimator: Any, X: Any, y: Any, reset: bool
) -> tuple[NDArray[Any], NDArray[Any], bool]:
    inputs, targets = validate_data(
        estimator,
        X,
        y,
        reset=reset,
        multi_output=True,
        y_numeric=True,
        dtype=[np.float64, np.float32],
    )
    single = targets.ndim == 1
    return inputs, targets.reshape(len(targets), -1), single


def _solve(estimator: Any, X: Any, Y: Any, moments: Moments | None) -> Solution:
    """The solution at the estimator's parameters, from moments while they are good enough."""
    center = bool(estimator.fit_intercept)
    if moments is not None:
        mean_x, mean_y = moments.mean_x, moments.mean_y
    else:
        mean_x, mean_y = X.mean(0, dtype=np.float64), Y.mean(0, dtype=np.float64)

    def data() -> tuple[Floats, Floats]:
        return (X - mean_x, Y - mean_y) if center else (X.astype(float), Y.astype(float))

    if moments is None:
        problem = whiten_data(*data())
    else:
        problem = whiten_gram(moments.gram(center), None if X is None else data)
    width = estimator.width
    if width is None:
        width = default_width(mean_x.size, mean_y.size, estimator.block_size)
    solution = solve_whitened(
        problem, estimator.p, width, estimator.block_size, bool(estimator.adaptive)
    )
    return solution.around(mean_x, mean_y) if center else solution
