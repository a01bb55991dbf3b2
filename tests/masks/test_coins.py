from functools import partial
from typing import ClassVar

import pytest
import torch

from droplens.masks import Bernoulli, Channel, Gaussian, Grouped, Law, Path, relative_variance
from tests import reference_masks as reference
from tests.masks.conformance import Case, LawConformance

RATES = (0.5, 0.05, 0.9, 1e-3, 0.999)


def cases_of(law, oracle, rates=RATES, shapes=((1,), (4,), (2, 2))) -> list[Case]:
    """Every rate on the last shape, the first rate on every shape."""
    pairs = [(p, shapes[-1]) for p in rates] + [(rates[0], units) for units in shapes[:-1]]
    return [
        Case(
            f"p={p}-units={units}", law(p), units, partial(oracle, p, units=units), 0.01 < p < 0.99
        )
        for p, units in pairs
    ]


class TestBernoulli(LawConformance):
    cases: ClassVar[list[Case]] = cases_of(Bernoulli, reference.bernoulli)

    @staticmethod
    def make(p: float) -> Law:
        return Bernoulli(p)

    def test_values_are_zero_or_one_over_the_keep_rate(self) -> None:
        mask = Bernoulli(0.2).sample((100, 10), seed=0, dtype=torch.float64)
        assert set(mask.unique().tolist()) == {0.0, 1 / 0.8}


class TestGaussian(LawConformance):
    cases: ClassVar[list[Case]] = cases_of(
        Gaussian, reference.gaussian, shapes=((1,), (3,), (1, 3))
    )

    @staticmethod
    def make(p: float) -> Law:
        return Gaussian(p)


class TestGrouped(LawConformance):
    cases: ClassVar[list[Case]] = [
        *cases_of(
            lambda p: Grouped(p, 2),
            lambda p, units: reference.grouped(p, 2, units),
            shapes=((2,), (6,), (2, 4)),
        ),
        Case("size=1", Grouped(0.3, 1), (3,), partial(reference.grouped, 0.3, 1, (3,))),
        Case("size=all", Grouped(0.3, 3), (2, 3), partial(reference.grouped, 0.3, 3, (2, 3))),
    ]

    @staticmethod
    def make(p: float) -> Law:
        return Grouped(p, 2)

    @pytest.mark.parametrize("size", [0, -1])
    def test_a_size_below_one_is_refused(self, size: int) -> None:
        with pytest.raises(ValueError, match=f"size has to be at least 1, but got {size}"):
            Grouped(0.5, size)

    @pytest.mark.parametrize("size", [2.0, True, "2"])
    def test_a_size_that_is_no_int_is_refused(self, size: object) -> None:
        with pytest.raises(TypeError, match="size has to be an int, but got"):
            Grouped(0.5, size)  # type: ignore[arg-type]

    def test_a_size_that_does_not_divide_is_refused(self) -> None:
        for call in (Grouped(0.5, 3).mean, Grouped(0.5, 3).covariance):
            with pytest.raises(ValueError, match="3 does not divide 4"):
                call((3, 4))
        with pytest.raises(ValueError, match="3 does not divide 4"):
            Grouped(0.5, 3).sample((3, 4))

    def test_no_unit_axis_is_refused(self) -> None:
        with pytest.raises(ValueError, match="Grouped needs at least one unit axis"):
            Grouped(0.5, 1).mean(())


class TestChannel(LawConformance):
    cases: ClassVar[list[Case]] = cases_of(
        Channel, reference.channel, shapes=((1,), (3,), (2, 1, 3))
    )

    @staticmethod
    def make(p: float) -> Law:
        return Channel(p)

    def test_no_channel_axis_is_refused(self) -> None:
        with pytest.raises(ValueError, match="Channel needs a first unit axis"):
            Channel(0.5).sample((3,))


class TestPath(LawConformance):
    cases: ClassVar[list[Case]] = cases_of(Path, reference.path, shapes=((1,), (4,), (2, 3)))

    @staticmethod
    def make(p: float) -> Law:
        return Path(p)

    def test_no_unit_axis_is_one_coin_an_example(self) -> None:
        assert Path(0.5).sample((6,), seed=0).shape == (6,)


@pytest.mark.parametrize(
    "law", [Bernoulli(0.5), Gaussian(0.5), Grouped(0.5, 2), Channel(0.5), Path(0.5)]
)
def test_no_units_at_all(law: Law) -> None:
    assert law.sample((3, 0)).shape == (3, 0)
    assert law.mean((0,)).shape == (0,)
    assert float(law.covariance((0,)).quadratic(torch.ones(0))) == 0
    assert law.covariance((0,)).dense().shape == (0, 0)


def test_relative_variance() -> None:
    assert relative_variance(0) == 0
    assert relative_variance(0.2) == pytest.approx(0.25, abs=1e-15)
    with pytest.raises(ValueError, match="use p < 1"):
        relative_variance(1.0)


def test_a_bfloat16_mask_drops_at_the_rate_asked() -> None:
    n = 1_000_000
    dropped = float(
        (Bernoulli(0.1).sample((n, 1), seed=0, dtype=torch.bfloat16) == 0).double().mean()
    )
    assert abs(dropped - 0.1) < 5 * (0.09 / n) ** 0.5
