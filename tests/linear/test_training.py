"""Schemes against enumerated masks, and training against the closed form."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from droplens import linear, masks
from droplens.linear import (
    Deterministic,
    DropBlock,
    DropConnect,
    Dropout,
    expected_objective,
    initial_factors,
    objective,
    train_linear,
)
from droplens.training import Plan, initialise, train
from tests.reference_linear import (
    all_coins,
    drop_connect_by_enumeration,
    dropblock_masks,
    expected_loss_by_enumeration,
)

RATES = (0.1, 0.5)


def problem(d_in=3, d_out=2, r=4, n=5, seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((2, d_out, r), (2, d_in, r), (n, d_in), (n, d_out))
    return [torch.tensor(rng.standard_normal(shape)) for shape in shapes]


def dropblock(r, size, p):
    """Masks of the overlapping DropBlock whose mean drop rate is p, by scanning for γ."""
    low, high = 0.0, 1.0
    for _ in range(100):
        gamma = (low + high) / 2
        masks, chances = dropblock_masks(r, size, gamma)
        low, high = (gamma, high) if 1 - (chances @ masks).mean() < p else (low, gamma)
    return masks, chances


SCHEMES = {
    "dropout": (Dropout(RATES), lambda d, p: expected_loss_by_enumeration(*d, *all_coins(4, p))),
    "blocks": (
        Dropout(RATES, 2),
        lambda d, p: expected_loss_by_enumeration(*d, *all_coins(4, p, 2)),
    ),
    "drop connect": (
        DropConnect(RATES),
        lambda d, p: drop_connect_by_enumeration(*d, p, "outgoing"),
    ),
    "drop connect on incoming": (
        DropConnect(RATES, "incoming"),
        lambda d, p: drop_connect_by_enumeration(*d, p, "incoming"),
    ),
    "dropblock": (
        DropBlock(RATES, 2),
        lambda d, p: expected_loss_by_enumeration(*d, *dropblock(4, 2, p)),
    ),
    "dropblock wider than the layer": (
        DropBlock(RATES, 9),
        lambda d, p: expected_loss_by_enumeration(*d, *dropblock(4, 9, p)),
    ),
}


@pytest.mark.parametrize("name", SCHEMES)
class TestSchemes:
    def test_expected_loss_by_enumeration(self, name):
        scheme, reference = SCHEMES[name]
        U, V, X, Y = problem(r=4) if "incoming" not in name else problem(r=2, d_in=4)
        found = scheme.expected(U, V, X, Y)
        for i, p in enumerate(RATES):
            data = (U[i].numpy(), V[i].numpy(), X.numpy(), Y.numpy())
            assert float(found[i]) == pytest.approx(reference(data, p), rel=1e-9)
        torch.testing.assert_close(Deterministic(scheme).loss(U, V, X, Y), found)

    def test_draws_average_to_it(self, name):
        scheme, _ = SCHEMES[name]
        U, V, X, Y = problem()
        draws = 4000
        # As many networks as draws, all the same.
        many = replace(scheme, rates=RATES * draws)
        generator = torch.Generator().manual_seed(0)
        losses = many.loss(U.repeat(draws, 1, 1), V.repeat(draws, 1, 1), X, Y, generator)
        losses = losses.unflatten(0, (draws, 2))
        error = losses.std(0) / draws**0.5
        assert bool(((losses.mean(0) - scheme.expected(U, V, X, Y)).abs() <= 4 * error).all())

    def test_each_network_may_have_its_own_rows(self, name):
        scheme, _ = SCHEMES[name]
        U, V, X, Y = problem()
        rows = torch.tensor([[0, 1, 2], [4, 3, 2]])
        found = scheme.expected(U, V, X[rows], Y[rows])
        for i in range(2):
            alone = scheme.expected(U, V, X[rows[i]], Y[rows[i]])
            torch.testing.assert_close(found[i], alone[i])


@pytest.mark.parametrize("size", [1, 2, 3, 9])
def test_dropblock_agrees_with_the_mask_law(size):
    U, V, X, Y = problem()
    found = DropBlock(RATES, size).expected(U, V, X, Y)
    for i, p in enumerate(RATES):
        law = masks.Block(p, size)
        assert float(linear.law_objective(U[i], V[i], X, Y, law)) == pytest.approx(float(found[i]))


class TestTraining:
    def test_dropout_reaches_the_closed_form_and_equalises(self):
        X = problem(4, 3, 6, 40)[2]
        Y = X @ torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        start = initial_factors(3, 4, 3, 6, seed=0)
        plan = Plan(epochs=400, batch_size=None, learning_rate=0.02)
        ended = train_linear(start, (X, Y), Deterministic(Dropout((0.1, 0.5, 0.8))), plan, seed=0)
        assert ended.steps[0] == 0
        assert ended.steps[-1] == 400
        assert bool((ended.excess > -1e-9).all())
        assert bool((ended.excess[-1] < 1e-3 * ended.minimum).all())
        assert bool((ended.variation[-1] < 0.1 * ended.variation[0]).all())
        for i, p in enumerate((0.1, 0.5, 0.8)):
            value = objective(ended.outgoing[i], ended.incoming[i], X, Y, p)
            assert float(ended.objective[-1, i]) == pytest.approx(float(value))
            assert float(ended.minimum[i]) == pytest.approx(linear.solve(X, Y, p, 6).value)

    def test_with_noise_in_batches(self):
        _, _, X, Y = problem(4, 3, 6, 64)
        start = initial_factors(2, 4, 3, 6, seed=0)
        plan = Plan(epochs=75, batch_size=16, learning_rate=0.02, optimizer="sgd")
        for scheme in (Dropout((0.2, 0.4), 2), DropConnect((0.2, 0.4)), DropBlock((0.2, 0.4), 2)):
            ended = train_linear(start, (X, Y), scheme, plan, seed=0, record_every=100)
            assert ended.steps.tolist() == [0, 100, 200, 300]
            assert bool((ended.objective[-1] < ended.objective[0]).all())
            if isinstance(scheme, DropBlock):
                assert bool(ended.excess.isnan().all())
            else:
                assert bool((ended.excess[-1] < 0.4 * ended.excess[0]).all())

    @pytest.mark.parametrize("name", [name for name in SCHEMES if "wider" not in name])
    def test_sets_that_share_their_draws_train_as_each_does_alone(self, name):
        U, V, X, Y = problem(n=12)
        plan = Plan(epochs=4, batch_size=5, learning_rate=0.02)
        scheme = replace(SCHEMES[name][0], rates=(0.2, 0.2, 0.6, 0.6), sharing=2)
        both = train_linear((U.repeat(2, 1, 1), V.repeat(2, 1, 1)), (X, Y), scheme, plan, seed=5)
        for k, p in enumerate((0.2, 0.6)):
            one = replace(scheme, rates=(p, p), sharing=1)
            alone = train_linear((U, V), (X, Y), one, plan, seed=5)
            torch.testing.assert_close(both.objective[:, 2 * k : 2 * k + 2], alone.objective)
            torch.testing.assert_close(both.outgoing[2 * k : 2 * k + 2], alone.outgoing)
        assert not torch.allclose(both.outgoing[:2], both.outgoing[2:])

    def test_repeats_by_seed_and_leaves_everything_alone(self):
        U, V, X, Y = problem()
        before, state = U.clone(), torch.random.get_rng_state()
        plan = Plan(epochs=3, batch_size=2)
        one, other = (train_linear((U, V), (X, Y), Dropout(RATES), plan, seed=5) for _ in range(2))
        assert torch.equal(one.outgoing, other.outgoing)
        fresh = train_linear((U, V), (X, Y), Dropout(RATES), plan)
        assert not torch.equal(fresh.outgoing, one.outgoing)
        again = train_linear((U, V), (X, Y), Dropout(RATES), plan, seed=fresh.seed)
        assert torch.equal(fresh.outgoing, again.outgoing)
        assert torch.equal(U, before)
        assert torch.equal(state, torch.random.get_rng_state())

    def test_the_one_trainer_takes_the_deterministic_objective(self):
        _, _, X, Y = problem(4, 3, 6, 40)
        X, Y = X.float(), Y.float()

        def build():
            return nn.Sequential(nn.Linear(4, 6, bias=False), nn.Linear(6, 3, bias=False))

        plan = Plan(epochs=400, batch_size=None, learning_rate=0.02)
        networks = initialise(build, 2, seed=0)
        ended = train(networks, (X, Y), expected_objective(0.3, 2), plan, seed=0)
        bound = linear.solve(X, Y, 0.3, 6, 2).lower_bound
        for i, network in enumerate(ended.networks):
            V, U = (layer.weight.detach() for layer in network)
            value = float(objective(U, V.T, X, Y, 0.3, 2))
            assert bound <= value < 1.05 * bound
            assert value == pytest.approx(float(ended.history[-1, i]), rel=1e-3)
        with pytest.raises(ValueError, match=r"two nn\.Linear layers without bias"):
            expected_objective(0.3)(nn.Linear(4, 3), X, Y)


class TestBadInput:
    def test_rates(self):
        for scheme in (Dropout, DropConnect, lambda r: DropBlock(r, 2)):
            with pytest.raises(ValueError, match="p = 1 drops every unit"):
                scheme((0.5, 1.0))
            with pytest.raises(ValueError, match="dropout probability has to be between 0 and 1"):
                scheme((float("nan"),))
        with pytest.raises(ValueError, match="rates has to hold one rate a network"):
            Dropout(())
        with pytest.raises(ValueError, match="sharing has to divide the 3 networks into sets"):
            Dropout((0.1, 0.2, 0.3), sharing=2)
        with pytest.raises(ValueError, match="sharing has to be at least 1"):
            DropConnect((0.1,), sharing=0)
        with pytest.raises(ValueError, match="weight has to be 'outgoing' or 'incoming'"):
            DropConnect((0.5,), "both")
        with pytest.raises(ValueError, match="block_size has to be at least 1"):
            Dropout((0.5,), 0)

    def test_shapes(self):
        U, V, X, Y = problem()
        with pytest.raises(ValueError, match=r"a factor for each of the 1 rates, but outgoing has"):
            train_linear((U, V), (X, Y), Dropout((0.5,)))
        with pytest.raises(ValueError, match=r"start maps 3 inputs to 2 outputs.*X has 2 columns"):
            train_linear((U, V), (Y, X), Dropout(RATES))
        with pytest.raises(ValueError, match="X has 4 rows and Y has 5"):
            train_linear((U, V), (X[1:], Y), Dropout(RATES))
        with pytest.raises(TypeError, match="scheme has to be a Scheme, but got str"):
            train_linear((U, V), (X, Y), "dropout")
        with pytest.raises(TypeError, match="start has to hold tensors"):
            train_linear((U.numpy(), V), (X, Y), Dropout(RATES))
        with pytest.raises(ValueError, match="record_every has to be at least 1"):
            train_linear((U, V), (X, Y), Dropout(RATES), record_every=0)
