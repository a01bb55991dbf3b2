import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from droplens.estimates import Estimate, exact, jackknife, mean_estimate, welch, z_bound


class TestEstimate:
    def test_float_gives_the_value(self) -> None:
        assert float(Estimate(0.25, 0.1, 3)) == 0.25

    @pytest.mark.parametrize(
        ("value", "error", "text"),
        [
            (0.27904, 0.00159, "0.2790 ± 0.0016"),
            (12345.6, 250.0, "12,346 ± 250"),
            (1.0, 0.05, "1.000 ± 0.050"),
            (0.5, 0.0, "0.5"),
            (0.5, math.nan, "0.5 ± nan"),
            (math.inf, 1.0, "inf"),
            (0.0, 1e-12, "(0.0 ± 1.0) × 10⁻¹²"),
            (-3.14159, 0.2, "-3.14 ± 0.20"),
            (100.0, 3.0, "100.0 ± 3.0"),
        ],
    )
    def test_prints_two_digits_of_the_error(self, value: float, error: float, text: str) -> None:
        assert str(Estimate(value, error, 9)) == text

    def test_interval(self) -> None:
        low, high = Estimate(1.0, 0.5, 10).interval(0.95)
        reach = 0.5 * stats.t.ppf(0.975, 9)
        assert (low, high) == pytest.approx((1 - reach, 1 + reach), abs=1e-8)
        low, high = Estimate(1.0, 0.5, 1).interval(0.95)
        assert (low, high) == pytest.approx((1 - 0.979982, 1 + 0.979982), abs=1e-5)
        assert all(map(math.isnan, Estimate(1.0, math.nan, 1).interval()))

    def test_exact_numbers_carry_no_error(self) -> None:
        found = exact(3, over="seeds")
        assert found == Estimate(3.0, 0.0, 1, "seeds")
        assert found.interval() == (3.0, 3.0)

    def test_frozen(self) -> None:
        with pytest.raises(AttributeError):
            exact(1).value = 2.0  # type: ignore[misc]


class TestMeanEstimate:
    def test_by_hand(self) -> None:
        found = mean_estimate([1.0, 2.0, 6.0])
        assert found.value == pytest.approx(3.0, abs=1e-15)
        # s² = (4 + 1 + 9)/2 = 7
        assert found.standard_error == pytest.approx(math.sqrt(7 / 3), abs=1e-15)
        assert found.n == 3
        assert found.over == "masks"

    def test_float32_is_summed_in_float64(self) -> None:
        found = mean_estimate(torch.full((1000, 1000), 0.1))
        assert found.value == pytest.approx(float(torch.tensor(0.1)), rel=1e-12)

    def test_one_sample_has_no_error(self) -> None:
        assert math.isnan(mean_estimate([2.0]).standard_error)

    def test_empty_is_refused(self) -> None:
        with pytest.raises(ValueError, match="samples has to hold at least one number"):
            mean_estimate([])


class TestJackknife:
    def test_of_a_mean_is_the_mean(self) -> None:
        values = torch.tensor([1.0, 4.0, 7.0, 20.0], dtype=torch.float64)
        without = (values.sum() - values) / 3
        found = jackknife(float(values.mean()), without)
        expected = mean_estimate(values)
        assert found.value == pytest.approx(expected.value, abs=1e-12)
        assert found.standard_error == pytest.approx(expected.standard_error, abs=1e-12)

    def test_removes_the_bias_of_a_plug_in_variance(self) -> None:
        values = torch.tensor([1.0, 4.0, 7.0, 20.0], dtype=torch.float64)
        plug_in = float(values.var(correction=0))
        kept = [torch.cat((values[:k], values[k + 1 :])) for k in range(4)]
        without = torch.stack([rest.var(correction=0) for rest in kept])
        assert jackknife(plug_in, without).value == pytest.approx(float(values.var()), abs=1e-12)

    @pytest.mark.parametrize("n", [0, 1])
    def test_too_few_draws_are_refused(self, n: int) -> None:
        with pytest.raises(ValueError, match=f"at least 2 draws, but got {n}"):
            jackknife(0.0, torch.zeros(n))


class TestZBound:
    def test_one_comparison(self) -> None:
        assert z_bound(0.99) == pytest.approx(2.575829304, abs=1e-8)

    @given(level=st.floats(0.5, 0.9999), comparisons=st.integers(1, 1000))
    def test_sidak_spends_the_level_exactly(self, level: float, comparisons: int) -> None:
        inside = stats.norm.cdf(z_bound(level, comparisons)) * 2 - 1
        assert inside**comparisons == pytest.approx(level, abs=1e-9)

    @pytest.mark.parametrize("level", [0, 1, -0.5, 1.5, math.nan])
    def test_a_level_outside_is_refused(self, level: float) -> None:
        with pytest.raises(ValueError, match="level has to be between 0 and 1"):
            z_bound(level)

    def test_no_comparison_is_refused(self) -> None:
        with pytest.raises(ValueError, match="comparisons has to be at least 1, but got 0"):
            z_bound(0.95, 0)


class TestWelch:
    def test_against_scipy(self) -> None:
        first, second = [1.0, 2.0, 4.0, 8.0], [3.0, 3.5, 9.0]
        expected = stats.ttest_ind(first, second, equal_var=False)
        found = welch(first, second)
        assert found.p_value == pytest.approx(float(expected.pvalue), abs=1e-12)
        assert found.degrees_of_freedom == pytest.approx(float(expected.df), abs=1e-12)
        assert found.value / found.standard_error == pytest.approx(
            float(expected.statistic), abs=1e-12
        )

    def test_equal_constants_do_not_differ(self) -> None:
        assert welch([1.0, 1.0], [1.0, 1.0]).p_value == 1

    def test_different_constants_do(self) -> None:
        assert welch([1.0, 1.0], [2.0, 2.0]).p_value == 0

    @pytest.mark.parametrize(
        ("first", "second", "name"), [([1.0], [1.0, 2.0], "first"), ([1.0, 2.0], [], "second")]
    )
    def test_too_few_runs_are_refused(
        self, first: list[float], second: list[float], name: str
    ) -> None:
        with pytest.raises(ValueError, match=f"{name} has to hold at least 2 runs"):
            welch(first, second)


@pytest.mark.slow
def test_intervals_cover_at_their_level() -> None:
    n_sets, n = 20_000, 100
    samples = torch.randn(n_sets, n, generator=torch.Generator().manual_seed(0)).double()
    error = samples.std(1) / math.sqrt(n)
    covered = float((samples.mean(1).abs() <= z_bound(0.95) * error).double().mean())
    # Student's t with 99 degrees of freedom inside the normal bound.
    expected = 2 * stats.t.cdf(z_bound(0.95), n - 1) - 1
    assert abs(covered - expected) < 5 * math.sqrt(expected * (1 - expected) / n_sets)
