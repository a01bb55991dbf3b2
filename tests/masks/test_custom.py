from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from droplens.masks import Custom
from tests import reference_masks as reference
from tests.masks.conformance import Case, LawConformance

# Exactly one of three units is dropped.
ONE_OF_THREE = (
    torch.full((3,), 1 / 3, dtype=torch.float64),
    1 - torch.eye(3, dtype=torch.float64),
)


def draw_one_of_three(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    dropped = torch.rand(shape[0], generator=generator).mul(3).long()
    return 1 - torch.nn.functional.one_hot(dropped, 3).double()


def one_of_three() -> Custom:
    probabilities, z = ONE_OF_THREE
    mean = (probabilities[:, None] * z).sum(0)
    covariance = ((z - mean) * probabilities[:, None]).mT @ (z - mean)
    return Custom(mean, covariance, draw_one_of_three)


class TestCustom:
    cases: ClassVar[list[Case]] = [
        Case("one of three is dropped", one_of_three(), (3,), lambda: ONE_OF_THREE)
    ]
    test_mean = LawConformance.test_mean_is_that_of_all_masks
    test_covariance = LawConformance.test_covariance_is_that_of_all_masks
    test_quadratic = LawConformance.test_quadratic_and_gram_are_those_of_the_dense_matrix
    test_differentiates = LawConformance.test_quadratic_differentiates_twice
    test_draws = LawConformance.test_draws_have_mean_one_and_the_covariance
    test_independent = LawConformance.test_examples_are_independent
    test_vmap = LawConformance.test_draws_under_vmap_follow_the_same_law

    def test_moments_of_another_law_are_taken_over(self) -> None:
        law = Custom(torch.full((2, 2), 0.5), 0.25 * torch.eye(4))
        torch.testing.assert_close(law.covariance((2, 2)).dense(), torch.eye(4).double())
        assert law.mean((2, 2)).shape == (2, 2)

    def test_names_are_mean_and_covariance(self) -> None:
        law = Custom(mean=[0.5], covariance=[[0.25]])
        assert float(law.covariance(1).diagonal()) == 1

    def test_moments_are_copied(self) -> None:
        mean = torch.full((2,), 0.5, dtype=torch.float64)
        law = Custom(mean, 0.25 * torch.eye(2))
        mean.zero_()
        law.mean(2).zero_()
        assert float(law.mean(2).sum()) == 1

    def test_without_a_sampler_there_are_moments_only(self) -> None:
        with pytest.raises(ValueError, match="give sampler= to draw from it"):
            Custom(torch.ones(2), torch.eye(2)).sample((1, 2))

    def test_immutable(self) -> None:
        with pytest.raises(AttributeError):
            one_of_three().sampler = None  # type: ignore[misc]

    @pytest.mark.parametrize(
        ("mean", "covariance", "message"),
        [
            ([0.5, 0.0], [[1, 0], [0, 1]], "mean has to be positive at every unit"),
            ([0.5, float("nan")], [[1, 0], [0, 1]], "mean has to be finite"),
            ([1.0, 1.0], [[1, float("inf")], [0, 1]], "covariance has to be finite"),
            ([1.0, 1.0], [[1.0]], r"covariance has to be \(2, 2\)"),
            ([1.0, 1.0], [[1, 0.5], [0, 1]], "covariance has to be symmetric"),
            ([1.0, 1.0], [[1, 2], [2, 1]], "positive semi-definite, but its smallest"),
        ],
    )
    def test_bad_moments_are_refused(self, mean: Any, covariance: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            Custom(torch.tensor(mean), torch.tensor(covariance))

    def test_wrong_types_are_refused(self) -> None:
        with pytest.raises(TypeError, match="mean has to be a tensor of numbers, but got str"):
            Custom("half", torch.eye(2))  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="sampler has to be a function, but got int"):
            Custom(torch.ones(2), torch.eye(2), 3)  # type: ignore[arg-type]

    @pytest.mark.parametrize("call", ["mean", "covariance"])
    def test_other_units_are_refused(self, call: str) -> None:
        with pytest.raises(ValueError, match=r"units has to be \(3,\), the shape of the"):
            getattr(one_of_three(), call)((3, 1))

    def test_a_bad_sampler_is_refused(self) -> None:
        moments = (torch.ones(2), torch.eye(2))
        with pytest.raises(ValueError, match=r"has to give shape \(3, 2\), but gave \(2,\)"):
            Custom(*moments, lambda shape, generator: torch.ones(2)).sample((3, 2))
        with pytest.raises(TypeError, match="sampler has to give a tensor, but gave float"):
            Custom(*moments, lambda shape, generator: 1.0).sample((3, 2))

    def test_degenerate_units(self) -> None:
        law = Custom(torch.zeros(0), torch.zeros(0, 0))
        assert law.covariance(0).dense().shape == (0, 0)

    def test_reference_moments_agree(self) -> None:
        mean, relative = reference.moments(ONE_OF_THREE)
        torch.testing.assert_close(mean, torch.full((3,), 2 / 3, dtype=torch.float64))
        torch.testing.assert_close(relative[0, 0], torch.tensor(0.5, dtype=torch.float64))
