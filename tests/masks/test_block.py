import math
from functools import cache, partial
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from droplens.estimates import z_bound
from droplens.masks import Block, Law
from droplens.masks._block_draws import draw_dense, draw_sparse
from droplens.masks._grid import cover, log_keep
from droplens.masks._law import sample_options
from tests import reference_masks as reference
from tests.masks.conformance import FALSE_ALARM, Case, LawConformance, assert_within

oracle = cache(reference.block)


def case(p: float, size: int, grid: tuple[int, ...], name: str = "") -> Case:
    return Case(
        name or f"p={p}-size={size}-grid={grid}",
        Block(p, size),
        grid,
        partial(oracle, p, size, grid),
        sampled=0.01 < p < 0.95,
    )


class TestBlock(LawConformance):
    cases: ClassVar[list[Case]] = [
        case(0.3, 2, (5, 5), "all patterns of 5x5, size 2"),
        case(0.1, 3, (5, 5), "all patterns of 5x5, size 3"),
        case(0.2, 2, (3, 3, 3), "3-D"),
        case(0.9, 2, (3, 4)),
        case(1e-3, 2, (3, 4)),
        case(0.999, 2, (3, 4)),
        case(0.5, 1, (5,), "size 1 is Bernoulli"),
        case(0.5, 4, (7,), "even size in 1-D"),
        case(0.5, 7, (4, 3), "larger than the map"),
        case(0.5, 3, (2, 5), "larger than one axis"),
        case(0.25, 5, (1, 1), "one position"),
        Case(
            "a mask per channel",
            Block(0.4, 2, dims=1),
            (2, 4),
            partial(oracle, 0.4, 2, (4,), 2),
        ),
        Case(
            "shared over channels",
            Block(0.4, 2, dims=2, shared=True),
            (3, 2, 3),
            partial(oracle, 0.4, 2, (2, 3), 3, True),
        ),
    ]

    @staticmethod
    def make(p: float) -> Law:
        return Block(p, 2)


class TestRate:
    def test_the_example_of_the_theory(self) -> None:
        assert Block(0.2, 3).rate((7, 6)) == pytest.approx(0.0527180, abs=5e-8)
        # What the usual closed form realises there.
        usual = 0.2 / 9 * (7 * 6) / (5 * 4)
        assert usual == pytest.approx(0.0466667, abs=5e-8)
        realised = 1 - float(((1 - usual) ** cover((7, 6), 3).double()).mean())
        assert realised == pytest.approx(0.179, abs=5e-4)

    @given(
        p=st.floats(1e-12, 1 - 1e-9),
        size=st.integers(1, 9),
        grid=st.lists(st.integers(1, 20), min_size=1, max_size=3),
    )
    def test_the_mean_rate_is_exactly_p(self, p: float, size: int, grid: list[int]) -> None:
        dropped = -torch.expm1(-log_keep(p, tuple(grid), size) * cover(tuple(grid), size).double())
        assert float(dropped.mean()) == pytest.approx(p, rel=1e-10)

    @pytest.mark.parametrize("side", [1, 4, 7, 8, 14, 56])
    @pytest.mark.parametrize("size", [1, 2, 3, 5, 7])
    def test_masks_realise_it(self, side: int, size: int) -> None:
        rates = (0.05, 0.1, 0.3, 0.5, 0.9)
        bound = z_bound(1 - FALSE_ALARM, len(rates) * 30)
        for p in rates:
            law = Block(p, size)
            n = max(60, 60_000 // side**2)
            masks = law.sample((n, side, side), seed=1000 * side + size, dtype=torch.float64)
            rate = float((masks == 0).double().mean())
            # Var of the mean of z over positions, from the exact moments.
            mean = law.mean((side, side))
            variance = float(law.covariance((side, side)).quadratic(mean)) / side**4
            assert abs(rate - p) <= bound * math.sqrt(variance / n), (p, rate)

    def test_torchvision_parameters_have_the_rate_in_repr(self) -> None:
        assert repr(Block(0.1, 7)) == "Block(p=0.1, size=7, dims=None, shared=False)"

    def test_no_position_at_all(self) -> None:
        assert Block(0.5, 3).sample((2, 0, 4)).shape == (2, 0, 4)
        assert Block(0.5, 3).mean((0, 4)).shape == (0, 4)

    def test_rates_so_near_one_that_the_centre_is_never_kept(self) -> None:
        mask = Block(1 - 1e-9, 7).sample((50, 14, 14), seed=0)
        assert torch.isfinite(mask).all()


PATH_LAWS = {
    "one channel": ((1, 6, 5), 3, 0.3),
    "two channels": ((2, 3, 4), 2, 0.1),
    "one axis": ((1, 9), 4, 0.4),
    "volume": ((1, 3, 3, 3), 2, 0.2),
    "tall": ((1, 7, 2), 3, 0.5),
}


@pytest.mark.parametrize("path", ["sparse", "dense", "dense, tensor rate"])
@pytest.mark.parametrize("name", PATH_LAWS)
def test_both_paths_draw_one_law(path: str, name: str) -> None:
    units, size, p = PATH_LAWS[name]
    grid, n = units[1:], 40_000
    u = log_keep(p, grid, size)
    options = sample_options((n, *units), None, 11, "cpu", torch.float64)
    template = torch.exp(u * cover(grid, size).double())
    if path == "sparse":
        masks = draw_sparse(template, options, u, size)
    else:
        gamma = -math.expm1(-u)
        rate = torch.tensor(gamma, dtype=torch.float64) if "tensor" in path else gamma
        masks = template * draw_dense(options, rate, grid, size)
    outcomes = oracle(p, size, grid, units[0])
    _, covariance = reference.moments(outcomes)
    centred = masks.reshape(n, -1) - 1
    assert_within(centred.mean(0), covariance.diagonal(), n)
    found = centred.mT @ centred / n
    assert_within(found - covariance, reference.product_variance(outcomes), n)


def test_sparse_draws_in_chunks_follow_the_law(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("droplens.masks._block_draws._CHUNK", 3)
    n, p = 3_000, 0.3
    masks = Block(p, 2).sample((n, 4, 4), seed=2, dtype=torch.float64)
    outcomes = oracle(p, 2, (4, 4))
    _, covariance = reference.moments(outcomes)
    assert_within(masks.reshape(n, -1).mean(0) - 1, covariance.diagonal(), n)


def test_the_sparse_path_is_taken_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the dense path was taken")

    monkeypatch.setattr("droplens.masks._block.draw_dense", refuse)
    law = Block(0.1, 7, dims=2)
    law.sample((2, 3, 14, 14), seed=0)
    with pytest.raises(AssertionError, match="the dense path was taken"):
        torch.func.vmap(lambda _: law.sample((3, 14, 14)), randomness="different")(torch.zeros(2))


def test_shared_masks_are_equal_over_channels_and_own_ones_are_not() -> None:
    shared = Block(0.3, 3, dims=2, shared=True).sample((4, 5, 8, 8), seed=0)
    assert torch.equal(shared, shared[:, :1].expand_as(shared))
    own = Block(0.3, 3, dims=2).sample((4, 5, 8, 8), seed=0)
    assert not torch.equal(own[:, 0], own[:, 1])


def test_a_first_mask_in_inference_mode_spoils_no_later_one() -> None:
    law, x = Block(0.875, 2), torch.ones(2, 5, 3, requires_grad=True)
    with torch.inference_mode():
        law.sample((2, 5, 3))
    (x * law.draw(sample_options((2, 5, 3), None, None, None, None)).times(x)).sum().backward()
    assert x.grad is not None


class TestCovariance:
    @pytest.mark.parametrize("shared", [False, True])
    def test_derivatives_and_transforms(self, shared: bool) -> None:
        covariance = Block(0.3, 2, dims=2, shared=shared).covariance((2, 3, 4))
        dense = covariance.dense()
        scores = torch.randn(5, 2, 3, 4, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(covariance.quadratic, (scores,), check_forward_ad=True)
        assert torch.autograd.gradgradcheck(covariance.quadratic, (scores,))
        rows = torch.func.vmap(covariance.quadratic)(scores)
        torch.testing.assert_close(rows, covariance.quadratic(scores))
        gradient = torch.func.vmap(torch.func.grad(covariance.quadratic))(scores.detach())
        expected = 2 * scores.detach().reshape(5, -1) @ dense
        torch.testing.assert_close(gradient.reshape(5, -1), expected)

    def test_a_map_too_large_for_a_matrix(self) -> None:
        # 100,352 units: the matrix would need 80 GB.
        covariance = Block(0.1, 7, dims=2).covariance((32, 56, 56), dtype=torch.float32)
        scores = torch.ones(32, 56, 56)
        found = float(covariance.quadratic(scores))
        one = Block(0.1, 7).covariance((56, 56), dtype=torch.float64).dense().sum()
        assert found == pytest.approx(32 * float(one), rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.5, 0), "size has to be at least 1, but got 0"),
        ((0.5, 3, 0), "dims has to be at least 1, but got 0"),
    ],
)
def test_bad_values_are_refused(arguments: tuple[float, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Block(*arguments)


@pytest.mark.parametrize("arguments", [(0.5, 2.0), (0.5, True), (0.5, 2, 1.5)])
def test_bad_types_are_refused(arguments: tuple[float, int]) -> None:
    with pytest.raises(TypeError, match="has to be an int, but got"):
        Block(*arguments)


def test_a_grid_of_too_few_axes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Block needs 3 unit axes for its grid, but units is"):
        Block(0.5, 2, dims=3).sample((5, 4, 4))
    with pytest.raises(ValueError, match="Block needs at least one unit axes"):
        Block(0.5, 2).mean(())
