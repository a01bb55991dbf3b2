import pytest
import torch

from droplens.randomness import check_seed, fresh_seed, private_generator


def draw(generator: torch.Generator) -> float:
    return float(torch.rand((), generator=generator))


class TestSeeds:
    def test_fresh_seeds_differ_and_survive_json(self) -> None:
        seeds = {fresh_seed() for _ in range(100)}
        assert len(seeds) == 100
        assert all(0 <= seed < 2**53 for seed in seeds)

    @pytest.mark.parametrize("seed", [0, 1, 2**63 - 1])
    def test_good_seeds_pass(self, seed: int) -> None:
        assert check_seed(seed) == seed

    @pytest.mark.parametrize("seed", [-1, 2**63])
    def test_out_of_range_is_refused(self, seed: int) -> None:
        with pytest.raises(ValueError, match="seed has to be between 0 and"):
            check_seed(seed)

    @pytest.mark.parametrize("seed", [1.0, "1", True, None])
    def test_other_types_are_refused(self, seed: object) -> None:
        with pytest.raises(TypeError, match="seed has to be an int, but got"):
            check_seed(seed)  # type: ignore[arg-type]


class TestPrivateGenerator:
    def test_a_seed_repeats(self) -> None:
        first, seed = private_generator(seed=3)
        again, _ = private_generator(seed=3)
        assert seed == 3
        assert draw(first) == draw(again)

    def test_neither_differs_and_its_seed_repeats_it(self) -> None:
        first, seed = private_generator()
        second, other = private_generator()
        assert seed != other
        value = draw(first)
        assert value != draw(second)
        assert draw(private_generator(seed=seed)[0]) == value

    def test_a_generator_gives_a_new_stream_each_time(self) -> None:
        parent = torch.Generator().manual_seed(0)
        first, seed = private_generator(parent)
        second, other = private_generator(parent)
        assert seed != other
        assert draw(first) != draw(second)
        assert private_generator(torch.Generator().manual_seed(0))[1] == seed

    def test_global_stream_is_left_alone(self) -> None:
        before = torch.get_rng_state()
        for options in ({}, {"seed": 1}, {"generator": torch.Generator()}):
            draw(private_generator(**options)[0])
        assert torch.equal(before, torch.get_rng_state())

    def test_both_are_refused(self) -> None:
        with pytest.raises(ValueError, match="give generator= or seed=, not both"):
            private_generator(torch.Generator(), 1)

    def test_a_foreign_generator_is_refused(self) -> None:
        with pytest.raises(TypeError, match=r"generator has to be a torch\.Generator, but got int"):
            private_generator(5)  # type: ignore[arg-type]

    def test_device(self) -> None:
        assert private_generator(seed=1, device="cpu")[0].device.type == "cpu"
