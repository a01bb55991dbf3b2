import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from droplens import measure
from tests.reference_measure import entropy_number


def matrix(values, rows=5, columns=7, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(rows, rows, generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(
        torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    )[0]
    k = len(values)
    return (left[:, :k] * torch.tensor(values, dtype=torch.float64) @ right[:, :k].mT).to(dtype)


def test_planted_singular_values():
    result = measure.spectrum(matrix([4.0, 2.0, 1.0]))
    expected = torch.tensor([4.0, 2, 1, 0, 0], dtype=torch.float64)
    torch.testing.assert_close(result.singular_values, expected)
    assert result.nuclear == pytest.approx(7)
    assert result.stable_rank == pytest.approx(21 / 16)
    assert result.effective_rank == pytest.approx(entropy_number([4 / 7, 2 / 7, 1 / 7]))


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=5), st.floats(1e-6, 1e6))
def test_ranks_do_not_depend_on_scale_and_stay_within_the_rank(values, scale):
    result = measure.spectrum(matrix(values))
    scaled = measure.spectrum(matrix(values) * scale)
    assert scaled.stable_rank == pytest.approx(result.stable_rank)
    assert scaled.effective_rank == pytest.approx(result.effective_rank)
    assert 1 - 1e-9 <= result.stable_rank <= len(values) + 1e-9
    assert 1 - 1e-9 <= result.effective_rank <= len(values) + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_any_precision(dtype):
    result = measure.spectrum(torch.eye(3, dtype=dtype))
    assert result.effective_rank == pytest.approx(3)
    assert result.singular_values.dtype == torch.float64


def test_zero_has_rank_zero():
    result = measure.spectrum(torch.zeros(2, 3))
    assert (result.nuclear, result.stable_rank, result.effective_rank) == (0, 0, 0)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(2, 3, 4), r"weight.flatten\(1\)"),
        (torch.tensor([[math.inf]]), "matrix holds NaN or Inf"),
        (torch.zeros(0, 3), "matrix is empty"),
    ],
)
def test_bad_input_is_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        measure.spectrum(bad)
