"""The demonstration's two sets of networks: paired, repeatable, and trained at once."""

import dataclasses

import pytest
import torch
from torch import nn

import droplens as dl
from droplens import demonstration
from droplens.data import digits


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        demonstration, "PLAN", dataclasses.replace(demonstration.PLAN, epochs=1, batch_size=256)
    )


def rates(network: nn.Module) -> list[float]:
    return [module.p for module in network.modules() if isinstance(module, nn.Dropout)]


def weights(network: nn.Module) -> torch.Tensor:
    return nn.utils.parameters_to_vector(network.parameters()).detach()


def test_trains_as_many_with_as_without(quick):
    shares = []
    sets = demonstration.trained(3, 0, lambda share, _: shares.append(share))
    assert [rates(network) for network in sets["with dropout"]] == [[0.5, 0.5]] * 3
    assert [rates(network) for network in sets["without"]] == [[0.0, 0.0]] * 3
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_both_sets_begin_with_the_same_weights(monkeypatch):
    starts = []

    def remember(networks, *_, **__):
        starts.extend(networks)
        raise InterruptedError

    monkeypatch.setattr(demonstration, "train", remember)
    with pytest.raises(InterruptedError):
        demonstration.trained(2, 0)
    assert torch.equal(weights(starts[0]), weights(starts[2]))
    assert torch.equal(weights(starts[1]), weights(starts[3]))
    assert not torch.equal(weights(starts[0]), weights(starts[1]))


def test_a_seed_repeats_the_networks(quick):
    one, same, other = (demonstration.trained(2, seed) for seed in (3, 3, 4))
    for kind in one:
        for k in range(2):
            assert torch.equal(weights(one[kind][k]), weights(same[kind][k]))
            assert not torch.equal(weights(one[kind][k]), weights(other[kind][k]))


def test_leaves_the_global_stream_alone(quick):
    before = torch.get_rng_state()
    demonstration.trained(2, 0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.slow
def test_both_sets_learn_the_digits():
    inputs, labels = digits().test
    for networks in demonstration.trained(2, 0).values():
        for network in networks:
            with torch.no_grad():
                right = network.eval()(inputs).argmax(1) == labels
            assert right.float().mean() > 0.96


@pytest.mark.slow
def test_the_gaussian_penalty_is_near_the_spread_on_the_demonstration_networks():
    """Within 12% of Monte Carlo at p = .1 and .5, trained with dropout and without."""
    inputs, labels = digits().train
    loss = nn.CrossEntropyLoss()
    for name, networks in demonstration.trained(2, 0).items():
        for network in networks:
            for p in (0.1, 0.5):
                for module in network.modules():
                    if isinstance(module, nn.Dropout):
                        module.p = p
                with torch.no_grad():
                    gaussian = float(dl.penalty(network, inputs, loss))
                spread = dl.decompose(network, inputs, labels, loss, 200, seed=1, sites=[]).spread
                reach = 2 * spread.standard_error / spread.value
                assert abs(gaussian / spread.value - 1) <= 0.12 + reach, (name, p)
