"""What every mask law has to honour: subclass `LawConformance` and list the cases."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from droplens.estimates import z_bound
from droplens.masks import Law
from tests import reference_masks as reference

N_DRAWS = 40_000
FALSE_ALARM = 1e-6
EXACT = {"rtol": 1e-12, "atol": 1e-10}


@dataclass(frozen=True)
class Case:
    """A law, the units it masks, and the oracle that lists its outcomes there."""

    name: str
    law: Law
    units: tuple[int, ...]
    outcomes: Callable[[], reference.Outcomes]
    # A z-bound needs enough events of each kind: rare ones are left to the exact tests.
    sampled: bool = True

    def __str__(self) -> str:
        return self.name


def assert_within(deviation: Tensor, variance: Tensor, n: int) -> None:
    """Every mean deviation of `n` draws stays inside its family-wise z-bound."""
    bound = z_bound(1 - FALSE_ALARM, max(1, variance.numel())) * (variance.clamp(min=0) / n).sqrt()
    # A variance of exactly zero still leaves the rounding of a mean.
    worst = (deviation.abs() - bound - 1e-12).max()
    assert worst <= 0, f"exceeds its z-bound by {worst:.3g}"


class LawConformance:
    """The suite. `cases` are small enough to enumerate; `make(p)` builds the law at any rate."""

    cases: ClassVar[list[Case]]
    some_units: ClassVar[tuple[int, ...]] = (2, 4)

    @staticmethod
    def make(p: float) -> Law:
        raise NotImplementedError

    # Moments, exactly.

    def test_mean_is_that_of_all_masks(self, case: Case) -> None:
        mean, _ = reference.moments(case.outcomes())
        found = case.law.mean(case.units)
        assert found.shape == case.units
        assert found.dtype == torch.float64
        assert found.device.type == "cpu"
        torch.testing.assert_close(found.flatten(), mean, **EXACT)

    def test_covariance_is_that_of_all_masks(self, case: Case) -> None:
        _, expected = reference.moments(case.outcomes())
        covariance = case.law.covariance(case.units)
        dense = covariance.dense()
        assert dense.dtype == torch.float64
        torch.testing.assert_close(dense, expected, **EXACT)
        diagonal = covariance.diagonal()
        assert diagonal.shape == case.units
        torch.testing.assert_close(diagonal.flatten(), expected.diagonal(), **EXACT)

    def test_quadratic_and_gram_are_those_of_the_dense_matrix(self, case: Case) -> None:
        generator = torch.Generator().manual_seed(1)
        scores = torch.randn(3, 2, *case.units, generator=generator, dtype=torch.float64)
        covariance = case.law.covariance(case.units)
        dense, flat = covariance.dense(), scores.reshape(3, 2, -1)
        expected = torch.einsum("bca,ad,bed->bce", flat, dense, flat)
        torch.testing.assert_close(covariance.gram(scores), expected, **EXACT)
        quadratic = covariance.quadratic(scores)
        assert quadratic.shape == (3, 2)
        torch.testing.assert_close(quadratic, expected.diagonal(dim1=1, dim2=2), **EXACT)
        torch.testing.assert_close(covariance.quadratic(scores[0, 0]), expected[0, 0, 0], **EXACT)

    def test_quadratic_differentiates_twice(self, case: Case) -> None:
        covariance = case.law.covariance(case.units)
        scores = torch.randn(
            case.units, dtype=torch.float64, generator=torch.Generator().manual_seed(2)
        )
        hessian = torch.autograd.functional.hessian(covariance.quadratic, scores)
        n = scores.numel()
        torch.testing.assert_close(hessian.reshape(n, n), 2 * covariance.dense(), **EXACT)

    # Draws against moments.

    def test_draws_have_mean_one_and_the_covariance(self, drawn: Case) -> None:
        draws = drawn.law.sample((N_DRAWS, *drawn.units), seed=3, dtype=torch.float64)
        centred = draws.reshape(N_DRAWS, -1) - 1
        _, covariance = reference.moments(drawn.outcomes())
        assert_within(centred.mean(0), covariance.diagonal(), N_DRAWS)
        found = centred.mT @ centred / N_DRAWS
        assert_within(found - covariance, reference.product_variance(drawn.outcomes()), N_DRAWS)

    def test_examples_are_independent(self, drawn: Case) -> None:
        draws = drawn.law.sample((N_DRAWS, *drawn.units), seed=4, dtype=torch.float64)
        centred = draws.reshape(N_DRAWS // 2, 2, -1) - 1
        cross = torch.einsum("na,nb->ab", centred[:, 0], centred[:, 1]) / (N_DRAWS // 2)
        _, covariance = reference.moments(drawn.outcomes())
        variance = torch.outer(covariance.diagonal(), covariance.diagonal())
        assert_within(cross, variance, N_DRAWS // 2)

    def test_draws_under_vmap_follow_the_same_law(self, drawn: Case) -> None:
        n = N_DRAWS // 4
        torch.manual_seed(5)

        def one(_: Tensor) -> Tensor:
            return drawn.law.sample((4, *drawn.units), dtype=torch.float64)

        draws = torch.func.vmap(one, randomness="different")(torch.zeros(n))
        centred = draws.reshape(N_DRAWS, -1) - 1
        _, covariance = reference.moments(drawn.outcomes())
        assert_within(centred.mean(0), covariance.diagonal(), N_DRAWS)
        found = centred.mT @ centred / N_DRAWS
        assert_within(found - covariance, reference.product_variance(drawn.outcomes()), N_DRAWS)

    # Options.

    def test_seed_and_generator_decide_the_draw(self) -> None:
        law, shape = self.make(0.5), (8, *self.some_units)
        first = law.sample(shape, seed=7)
        assert torch.equal(first, law.sample(shape, seed=7))
        assert torch.equal(first, law.sample(shape, torch.Generator().manual_seed(7)))
        assert not torch.equal(first, law.sample(shape, seed=8))
        generator = torch.Generator().manual_seed(7)
        assert not torch.equal(law.sample(shape, generator), law.sample(shape, generator))

    def test_global_stream_is_left_alone_when_a_generator_is_given(self) -> None:
        law, shape = self.make(0.5), (8, *self.some_units)
        before = torch.get_rng_state()
        law.sample(shape, seed=7)
        law.sample(shape, torch.Generator().manual_seed(7))
        assert torch.equal(before, torch.get_rng_state())

    def test_global_stream_is_the_default(self) -> None:
        law, shape = self.make(0.5), (8, *self.some_units)
        torch.manual_seed(9)
        first = law.sample(shape)
        assert not torch.equal(first, law.sample(shape))
        torch.manual_seed(9)
        assert torch.equal(first, law.sample(shape))

    def test_generator_and_seed_together_are_refused(self) -> None:
        with pytest.raises(ValueError, match="give generator= or seed=, not both"):
            self.make(0.5).sample((1, *self.some_units), torch.Generator(), seed=1)

    def test_a_foreign_generator_is_refused(self) -> None:
        with pytest.raises(TypeError, match=r"generator has to be a torch\.Generator, but got int"):
            self.make(0.5).sample((1, *self.some_units), 3)  # type: ignore[arg-type]

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_dtype_is_honoured(self, dtype: torch.dtype) -> None:
        law = self.make(0.25)
        assert law.sample((3, *self.some_units), dtype=dtype).dtype == dtype
        assert law.mean(self.some_units, dtype=dtype).dtype == dtype
        assert law.covariance(self.some_units, dtype=dtype).diagonal().dtype == dtype

    def test_integer_dtype_is_refused(self) -> None:
        with pytest.raises(TypeError, match="dtype has to be a floating point type"):
            self.make(0.5).sample((1, *self.some_units), dtype=torch.int64)

    def test_default_dtype_and_device(self) -> None:
        mask = self.make(0.5).sample((1, *self.some_units))
        assert mask.dtype == torch.get_default_dtype()
        assert mask.device.type == "cpu"

    def test_meta_device(self) -> None:
        mask = self.make(0.5).sample((3, *self.some_units), device="meta")
        assert mask.device.type == "meta"
        assert mask.shape == (3, *self.some_units)
        assert self.make(0.5).mean(self.some_units, device="meta").device.type == "meta"

    def test_shapes(self) -> None:
        law = self.make(0.5)
        assert law.sample((0, *self.some_units)).shape == (0, *self.some_units)
        assert law.sample(torch.Size((3, *self.some_units))).shape == (3, *self.some_units)

    # Ends of the range and bad input.

    def test_p_zero_keeps_everything(self) -> None:
        law = self.make(0.0)
        assert torch.equal(law.sample((4, *self.some_units)), torch.ones(4, *self.some_units))
        ones = torch.ones(self.some_units, dtype=torch.float64)
        assert torch.equal(law.mean(self.some_units), ones)
        covariance = law.covariance(self.some_units)
        assert torch.equal(covariance.diagonal(), torch.zeros_like(ones))
        assert float(covariance.quadratic(ones)) == 0

    def test_p_one_drops_everything(self) -> None:
        law = self.make(1.0)
        assert torch.equal(law.sample((4, *self.some_units)), torch.zeros(4, *self.some_units))
        zeros = torch.zeros(self.some_units, dtype=torch.float64)
        assert torch.equal(law.mean(self.some_units), zeros)
        with pytest.raises(ValueError, match="p = 1 drops every unit"):
            law.covariance(self.some_units)

    @pytest.mark.parametrize("p", [-0.1, 1.1, float("nan"), float("inf"), torch.tensor(1.5)])
    def test_a_rate_out_of_range_is_refused(self, p: Any) -> None:
        with pytest.raises(
            ValueError, match="dropout probability has to be between 0 and 1, but got"
        ):
            self.make(p)

    @pytest.mark.parametrize("p", ["0.5", None, torch.zeros(2), 0.5j])
    def test_a_rate_of_the_wrong_type_is_refused(self, p: Any) -> None:
        with pytest.raises(TypeError, match="p has to be a number between 0 and 1, but got"):
            self.make(p)

    def test_a_scalar_tensor_becomes_a_number(self) -> None:
        assert self.make(torch.tensor(0.5)) == self.make(0.5)  # type: ignore[arg-type]

    def test_a_mask_without_a_batch_axis_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"shape has to be \(batch, \*units\)"):
            self.make(0.5).sample(())

    @pytest.mark.parametrize("units", [(2, -4), (-1,)])
    def test_negative_lengths_are_refused(self, units: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match="lengths of at least 0"):
            self.make(0.5).mean(units)
        with pytest.raises(ValueError, match="lengths of at least 0"):
            self.make(0.5).sample((3, *units))

    @pytest.mark.parametrize("units", [(2.0, 4), ("2",), (True, 4)])
    def test_lengths_of_the_wrong_type_are_refused(self, units: Any) -> None:
        with pytest.raises(TypeError, match="units has to be ints, but got"):
            self.make(0.5).covariance(units)

    def test_scores_of_other_units_are_refused(self) -> None:
        covariance = self.make(0.5).covariance(self.some_units)
        with pytest.raises(ValueError, match="scores has to end in the units"):
            covariance.quadratic(torch.ones(5, 3))
        with pytest.raises(ValueError, match="scores has to end in the units"):
            covariance.gram(torch.ones(4))

    def test_immutable_and_hashable(self) -> None:
        law = self.make(0.5)
        with pytest.raises(AttributeError):
            law.p = 0.1  # type: ignore[attr-defined]
        assert hash(law) == hash(self.make(0.5))
        assert law == self.make(0.5)
        assert law != self.make(0.25)
        assert "0.5" in repr(law)
