import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from droplens._pairs import Pairs
from droplens.estimates import (
    Estimate,
    cumulants,
    exact,
    from_cumulants,
    jackknife,
    mean_estimate,
    note_on_untold,
    skewed_mean,
    square_estimate,
    t_bound,
    told,
    welch,
    z_bound,
)
from tests.covering import Covering


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

    @given(
        value=st.floats(-5, 5),
        error=st.floats(0.01, 5),
        slope=st.floats(-5, 5),
        n=st.integers(2, 300),
    )
    def test_the_interval_ends_where_the_truth_would_be_t_errors_away(
        self, value: float, error: float, slope: float, n: int
    ) -> None:
        ends = Estimate(value, error, n, "masks", slope).interval()
        assert ends[0] <= value <= ends[1]
        for end in ends:
            away = end - value
            variance = error**2 + slope * away
            assert away**2 == pytest.approx(t_bound(n - 1) ** 2 * variance, rel=1e-6, abs=1e-9)

    def test_a_number_turned_round_has_its_interval_turned_round(self) -> None:
        low, high = Estimate(1.0, 0.5, 10, "masks", 0.3).interval()
        found = Estimate(1.0, 0.5, 10, "masks", 0.3).rescaled(-2, 7)
        assert found.interval() == pytest.approx((7 - 2 * high, 7 - 2 * low))
        assert (found.value, found.standard_error) == (5.0, 1.0)

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

    def test_one_coin_does_not_tell_the_error_of_its_variance(self) -> None:
        """Every draw lies equally far from the mean, so that leaving one out moves nothing."""
        generator = torch.Generator().manual_seed(0)
        for draws, told_apart in (
            (torch.randint(2, (200,), generator=generator).double(), False),
            (torch.randn(200, generator=generator).double(), True),
        ):
            without = torch.stack([draws[torch.arange(200) != k].var() for k in range(200)])
            products = torch.outer(draws - draws.mean(), draws - draws.mean())
            found = jackknife(float(draws.var()), without, pairs=Pairs(products, 200, -1.0))
            assert math.isfinite(found.standard_error) == told_apart

    def test_the_bend_of_a_variance_by_hand(self) -> None:
        """θ = E v² − (E v)² along weights that rise with L: θ″ = −2 (E L v)², over K²."""
        generator = torch.Generator().manual_seed(0)
        draws = torch.rand(50, generator=generator).double()
        steps = draws - draws.mean()
        L = steps.square() - steps.square().mean()
        expected = -2 * float((L * steps).mean()) ** 2 / 50**2
        all_pairs = Pairs(torch.outer(steps, steps), 50, -1.0)
        assert all_pairs.bend(L) == pytest.approx(expected, rel=1e-12)
        values = []
        for reach in (-1e-3, 0.0, 1e-3):
            w = (1 + reach * L) / 50
            values.append(float((w * draws.square()).sum() - (w * draws).sum() ** 2))
        second = (values[0] + values[2] - 2 * values[1]) / 1e-6
        assert all_pairs.bend(L) * 50**2 == pytest.approx(second, rel=1e-4)
        neighbours = Pairs(steps[1:] * steps[:-1], 50, -1.0)
        by_hand = sum(-2 * L[k] * L[k + 1] * steps[k] * steps[k + 1] for k in range(49)) / 49
        assert neighbours.bend(L) == pytest.approx(float(by_hand) / 50**2, rel=1e-12)


class TestSkewedMeans:
    def test_the_slope_by_hand(self) -> None:
        values = torch.tensor([0.0] * 9 + [10.0], dtype=torch.float64)
        found = skewed_mean(values)
        # m = 1, m₂ = 9, m₃ = 72: γ = 8/3; s²/n = 1
        assert found.variance_slope == pytest.approx(1 / 3 * 8 / 3 / math.sqrt(10))
        assert (found.value, found.standard_error) == pytest.approx((1.0, 1.0))

    def test_a_rare_draw_that_makes_most_of_it_takes_the_error(self) -> None:
        values = torch.zeros(200)
        values[:25] = 1
        assert told(skewed_mean(values)).standard_error > 0
        values[3:] = 0
        found = told(skewed_mean(values))
        assert math.isnan(found.standard_error)
        assert found.value == pytest.approx(0.015)
        (note,) = note_on_untold({"gap": found, "shift": exact(1.0)})
        assert "do not tell the standard error of gap: a few rare masks" in note
        assert note_on_untold({"shift": exact(1.0), "spread": Estimate(math.nan, math.nan)}) == ()

    @given(n=st.integers(2, 60), seed=st.integers(0, 10**6))
    def test_normal_draws_are_always_told(self, n: int, seed: int) -> None:
        values = torch.randn(n, generator=torch.Generator().manual_seed(seed))
        # Four standard deviations of their own skewness: of all draws at most one in 10,000.
        if math.isnan(told(skewed_mean(values)).standard_error):
            assert abs(float(stats.skew(values.numpy()))) > 4 * math.sqrt(6 / n)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("kind", "n"),
        [("exponential", 40), ("exponential", 200), ("coins", 200), ("jumps", 200)],
    )
    def test_leaning_intervals_cover_at_their_level(self, kind: str, n: int) -> None:
        """4,000 means: exponential, coins of which one in ten falls, rare jumps to either side."""
        generator = torch.Generator().manual_seed(0)
        covering = Covering({"mean": {"exponential": 1.0, "coins": 0.1, "jumps": 0.0}[kind]})
        for _ in range(4000):
            uniform = torch.rand(n, generator=generator, dtype=torch.float64)
            if kind == "jumps":
                normal = torch.randn(n, generator=generator, dtype=torch.float64)
                draws = (uniform < 0.15) * normal
            else:
                draws = -uniform.log() if kind == "exponential" else (uniform < 0.1).double()
            covering.add({"mean": told(skewed_mean(draws))})
        covering.assert_few_wrong()
        if n == 200:
            covering.assert_at_level()


class TestSums:
    def test_independent_numbers_add_up(self) -> None:
        """A mean of 30 draws is the weighted sum of the means of its thirds, up to their spread."""
        values = torch.rand(30, generator=torch.Generator().manual_seed(0)).double() ** 4
        parts = [skewed_mean(values[k : k + 10]) for k in (0, 10, 20)]
        sums = [
            math.fsum(column) for column in zip(*(cumulants(p, 1 / 3) for p in parts), strict=True)
        ]
        found = from_cumulants(sums, parts[0])
        assert found.value == pytest.approx(float(values.mean()))
        within = torch.stack([values[k : k + 10] - values[k : k + 10].mean() for k in (0, 10, 20)])
        second, third = within.square().mean(1), within.pow(3).mean(1)
        variance = second.sum() / 9 / 9  # s²/n of each: m₂/(n − 1)
        assert found.standard_error**2 == pytest.approx(float(variance))
        # κ₃ of a mean is m₃/n², but for the correction of m₂ that the slope of each holds
        expected = 1 / 3 * float((third / second).mean()) / 10 / 3
        assert found.variance_slope == pytest.approx(expected, rel=0.3)

    def test_nothing_varies(self) -> None:
        assert from_cumulants((2.0, 0.0, 0.0, 0.0), exact(1.0)) == exact(2.0)


class TestSquares:
    """‖μ‖² from K draws μ + g: the plug-in ‖μ + N‖² without its bias tr Cov/K."""

    def measured(self, draws: torch.Tensor) -> Estimate:
        products = draws @ draws.mT
        k = len(draws)
        sums = products.sum(1) - products.diagonal()
        whole = sums.sum() / (k * (k - 1))
        others = (sums.sum() - 2 * sums) / ((k - 1) * (k - 2))
        by_pairs = Pairs(products, k).variance()
        return square_estimate(k * whole - (k - 1) * others, float(products.mean()), by_pairs)

    def test_the_variance_by_pairs_of_normal_draws(self) -> None:
        """2 tr(Cov²)/K², in the mean over 400 sets within 4 standard errors."""
        generator = torch.Generator().manual_seed(0)
        scales = torch.tensor([1.0, 2.0, 0.5]).double()
        found, of_some = [], []
        for _ in range(400):
            draws = torch.randn(20, 3, generator=generator).double() * scales + 5
            products = draws @ draws.mT
            found.append(Pairs(products, 20).variance())
            steps = draws - draws.mean(0)
            neighbours = (steps[1:] * steps[:-1]).sum(1)
            of_some.append(Pairs(neighbours, 20).variance())
        expected = 2 * float(scales.pow(4).sum()) / 20**2
        for values in (torch.tensor(found), torch.tensor(of_some)):
            error = float(values.std()) / 20
            # Steps from their own mean are shorter by 1/K.
            assert abs(float(values.mean()) - expected) <= 4 * error + 0.1 * expected

    @pytest.mark.slow
    @pytest.mark.parametrize("dimension", [1, 3, 20])
    @pytest.mark.parametrize("distance", [0.0, 0.5, 1.0, 2.0, 5.0, 20.0])
    def test_intervals_cover_from_zero_to_far_beyond_the_noise(
        self, dimension: int, distance: float
    ) -> None:
        """2,000 repeats of 200 draws, `distance` in standard deviations of the noise N."""
        generator = torch.Generator().manual_seed(0)
        centre = torch.zeros(dimension).double()
        centre[0] = distance / math.sqrt(200)
        covering = Covering({"square": float(centre.square().sum())})
        for _ in range(2000):
            draws = torch.randn(200, dimension, generator=generator).double() + centre
            covering.add({"square": self.measured(draws)})
        covering.assert_at_level()

    def test_no_draw_moves_nothing(self) -> None:
        assert self.measured(torch.zeros(9, 2).double()).standard_error == 0


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
