"""The estimators: scikit-learn's own checks, and what they promise beyond."""

import subprocess
import sys
import warnings

import numpy as np
import pytest
from sklearn.datasets import load_diabetes
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, KFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

import droplens.linear
from droplens.linear import (
    DropoutAutoencoder,
    DropoutRegression,
    DropoutRegressionCV,
    Moments,
    importance,
    solve,
)


def data(n=50, d_in=5, d_out=3, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, d_in)) + 2
    return X, X @ rng.standard_normal((d_in, d_out)) + rng.standard_normal((n, d_out)) - 4


@pytest.mark.parametrize(
    "estimator",
    [
        DropoutRegression(),
        DropoutRegression(p=0.1, width=4, block_size=2, adaptive=True),
        DropoutRegression(fit_intercept=False),
        DropoutRegressionCV(cv=2),
        DropoutAutoencoder(),
        DropoutAutoencoder(p=0.1, width=4, block_size=2),
    ],
    ids=str,
)
def test_scikit_learns_checks(estimator):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the checks warn about what they skip
        results = check_estimator(estimator, on_fail=None)
    assert len(results) > 30
    not_passed = {r["check_name"]: r["exception"] for r in results if r["status"] != "passed"}
    # Needs a variable of the environment that is read before scipy is imported.
    not_passed.pop("check_array_api_input", None)
    assert not_passed == {}


class TestRegression:
    @pytest.mark.parametrize(("width", "block_size"), [(None, 1), (2, 1), (7, 1), (4, 2)])
    @pytest.mark.parametrize("fit_intercept", [True, False])
    def test_is_the_solution(self, width, block_size, fit_intercept):
        X, Y = data()
        model = DropoutRegression(0.3, width, block_size, fit_intercept=fit_intercept).fit(X, Y)
        mx, my = (a.mean(0) if fit_intercept else np.zeros(a.shape[1]) for a in (X, Y))
        expected = solve(X - mx, Y - my, 0.3, width or 3, block_size)
        np.testing.assert_allclose(model.coef_, expected.coefficients, atol=1e-7)
        np.testing.assert_allclose(
            model.predict(X), (X - mx) @ expected.coefficients.T + my, atol=1e-6
        )
        assert model.rank_ == expected.rank
        assert model.width_ == (width or 3)
        assert model.solution_.value == pytest.approx(expected.value, rel=1e-8)

    def test_batches_equal_one_fit(self):
        X, Y = data()
        whole = DropoutRegression(0.3).fit(X, Y)
        parts = DropoutRegression(0.3)
        for start in range(0, 50, 7):
            parts.partial_fit(X[start : start + 7], Y[start : start + 7])
        np.testing.assert_allclose(parts.coef_, whole.coef_, atol=1e-10)
        np.testing.assert_allclose(parts.intercept_, whole.intercept_, atol=1e-10)
        more = DropoutRegression(0.3).fit(X[:30], Y[:30]).partial_fit(X[30:], Y[30:])
        np.testing.assert_allclose(more.coef_, whole.coef_, atol=1e-10)
        again = more.fit(X[:30], Y[:30])
        assert again.moments_.count == 30

    def test_wide_data_keep_no_moments(self):
        X, Y = data(4, 9)
        model = DropoutRegression(0.3).fit(X, Y)
        assert model.moments_ is None
        with pytest.raises(ValueError, match="fewer examples than features and kept no moments"):
            model.partial_fit(X, Y)
        first = DropoutRegression(0.3).partial_fit(X, Y)
        np.testing.assert_allclose(first.coef_, model.coef_, atol=1e-7)

    def test_ill_conditioned_data_go_around_the_moments(self):
        rng = np.random.default_rng(0)
        X = rng.standard_normal((50, 3))
        X[:, 2] = X[:, 1] + 1e-7 * rng.standard_normal(50)
        Y = 1e4 * (X[:, 2:] - X[:, 1:2]) + X[:, :1]
        model = DropoutRegression(0.0, width=3).fit(X, Y)
        assert model.score(X, Y) > 1 - 1e-10

    def test_one_dimensional_targets(self):
        X, y = load_diabetes(return_X_y=True)
        model = DropoutRegression(0.1, width=16).fit(X, y)
        assert model.coef_.shape == (10,)
        assert isinstance(model.intercept_, float)
        assert model.predict(X).shape == (442,)
        column = DropoutRegression(0.1, width=16).fit(X, y[:, None])
        np.testing.assert_allclose(column.coef_[0], model.coef_)
        assert model.score(X, y) > 0.5

    def test_degenerate_data(self):
        X, Y = data()
        constant = DropoutRegression().fit(np.ones((50, 2)), Y)
        np.testing.assert_allclose(constant.predict(np.ones((1, 2)))[0], Y.mean(0))
        assert constant.rank_ == 0
        assert not DropoutRegression().fit(X, np.zeros((50, 2))).coef_.any()

    @pytest.mark.parametrize(
        ("parameters", "message"),
        [
            ({"p": 1.0}, "p = 1 drops every unit"),
            ({"p": -1}, "dropout probability has to be between 0 and 1"),
            ({"width": 0}, "width has to be at least 1"),
            ({"width": 5, "block_size": 2}, "2 does not divide 5"),
            ({"block_size": 0}, "block_size has to be at least 1"),
        ],
    )
    def test_bad_parameters(self, parameters, message):
        with pytest.raises(ValueError, match=message):
            DropoutRegression(**parameters).fit(*data())

    def test_unfitted(self):
        with pytest.raises(NotFittedError):
            DropoutRegression().predict(data()[0])


class TestAutoencoder:
    def test_shrinks_principal_directions(self):
        X, _ = data(200, 6)
        model = DropoutAutoencoder(p=0.2, width=6).fit(X)
        deviations = np.linalg.svd(X - X.mean(0), compute_uv=False) / np.sqrt(200)
        found = solve(np.eye(6), np.diag(deviations) * 1.0, 0.2, 6).singular_values * np.sqrt(6)
        np.testing.assert_allclose(model.solution_.singular_values, found, atol=1e-8)
        code = model.transform(X)
        assert code.shape == (200, 6)
        # Every code unit carries the same share.
        scores = importance(model.decoder_, model.encoder_, np.cov(X.T, bias=True))
        np.testing.assert_allclose(scores, scores.mean(), rtol=1e-9)
        back = model.inverse_transform(code)
        expected = (X - X.mean(0)) @ model.solution_.coefficients.T + X.mean(0)
        np.testing.assert_allclose(back, expected, atol=1e-9)

    def test_without_dropout_is_pca(self):
        from sklearn.decomposition import PCA

        X, _ = data(200, 6)
        model, pca = DropoutAutoencoder(p=0.0, width=2).fit(X), PCA(2).fit(X)
        np.testing.assert_allclose(
            model.inverse_transform(model.transform(X)),
            pca.inverse_transform(pca.transform(X)),
            atol=1e-9,
        )

    def test_names_its_outputs(self):
        X, _ = data()
        model = DropoutAutoencoder(width=2).fit(X)
        assert model.get_feature_names_out().tolist() == [
            "dropoutautoencoder0",
            "dropoutautoencoder1",
        ]
        assert DropoutAutoencoder(width=2, fit_intercept=False).fit(X).mean_.tolist() == [0] * 5


class TestInScikitLearn:
    def test_grid_search_in_a_pipeline(self):
        X, Y = data()
        search = GridSearchCV(
            make_pipeline(StandardScaler(), DropoutAutoencoder(0.05, 5), DropoutRegression()),
            {"dropoutregression__p": [0.05, 0.5, 0.9]},
            cv=3,
        ).fit(X, Y)
        assert search.best_params_ == {"dropoutregression__p": 0.05}
        assert search.score(X, Y) > 0.5

    def test_cv_chooses_as_a_grid_search_does(self):
        X, Y = data(60, 8, 4, seed=3)
        rates = [0.0, 0.02, 0.1, 0.3, 0.6]
        chosen = DropoutRegressionCV(rates=rates, widths=[1, 2, 4], cv=KFold(5)).fit(X, Y)
        search = GridSearchCV(
            DropoutRegression(),
            {"p": rates, "width": [1, 2, 4]},
            cv=KFold(5),
            scoring="neg_mean_squared_error",
        ).fit(X, Y)
        assert {"p": chosen.p_, "width": chosen.width_} == search.best_params_
        np.testing.assert_allclose(
            chosen.errors_.mean(0).T.ravel() / 4, -search.cv_results_["mean_test_score"], rtol=1e-9
        )
        np.testing.assert_allclose(chosen.coef_, search.best_estimator_.coef_, atol=1e-10)


def test_importing_the_room_leaves_scikit_learn_alone():
    code = (
        "import sys, droplens.linear as l; l.Moments; "
        "print([m for m in ('sklearn', 'scipy', 'altair') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
    assert "DropoutRegression" in dir(droplens.linear)
    with pytest.raises(AttributeError, match="no attribute 'DropoutNothing'"):
        _ = droplens.linear.DropoutNothing
    assert Moments is droplens.linear.Moments
