"""The spread by a few masks: unbiased, never negative, differentiable, with an honest error."""

import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import droplens as dl
from droplens.estimates import Estimate
from droplens.losses import family
from droplens.penalties._masks import pseudo_values
from tests.covering import Covering
from tests.penalties.test_decompose import truth
from tests.penalties.test_penalty import cross_entropy, deep_network, labels, randn, tail_network, x


def by_masks(net, loss=cross_entropy, **options):
    with torch.no_grad():
        return dl.penalty(net, x, loss, "masks", **options)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_it_holds_the_enumerated_truth(p):
    net = deep_network(p)
    found = by_masks(net, draws=1500, seed=0)
    assert abs(float(found) - truth(net, p)[1]) <= 4.5 * found.standard_error
    assert "unbiased for the spread" in found.approximation
    assert found.by_site == {}


def test_four_masks_are_unbiased():
    net = deep_network(0.5)
    expected = truth(net, 0.5)[1]
    found = torch.tensor([float(by_masks(net, draws=4, seed=s)) for s in range(200)])
    error = float(found.std()) / 200**0.5
    assert abs(float(found.mean()) - expected) <= 4 * error
    assert expected / 4 > 5 * error  # the bias that is removed would be seen


def test_pseudo_values_are_those_of_the_jackknife():
    f = randn(7, 2, 1, 3, seed=1)

    def spread(drawn):
        return torch.logsumexp(drawn, -1).mean(0) - torch.logsumexp(drawn.mean(0), -1)

    expected = torch.stack(
        [7 * spread(f) - 6 * spread(torch.cat([f[:k], f[k + 1 :]])) for k in range(7)]
    )
    found = pseudo_values(family(cross_entropy), f)
    torch.testing.assert_close(found, expected)
    assert bool((found >= 0).all())


def test_squared_loss_is_the_variance_of_the_outputs():
    net = tail_network()
    found = by_masks(net, nn.MSELoss(), draws=1000, seed=0)
    exact = float(dl.penalty(net, x, nn.MSELoss()))
    assert abs(float(found) - exact) <= 4.5 * found.standard_error
    assert float(found) == pytest.approx(float(found.per_example.sum()))
    assert bool((found.per_example >= 0).all())


def test_its_gradient_is_that_of_finite_differences():
    net = deep_network()
    weight = net[3].weight
    value = dl.penalty(net, x, cross_entropy, "masks", seed=0).total
    (gradient,) = torch.autograd.grad(value, weight)
    step = randn(*weight.shape, seed=2)
    moved = []
    for size in (1e-5, -2e-5):
        with torch.no_grad():
            weight += size * step
        moved.append(float(by_masks(net, seed=0)))
    assert float((gradient * step).sum()) == pytest.approx((moved[0] - moved[1]) / 2e-5, rel=1e-6)


def test_sites_seeds_targets_and_the_rest():
    net = deep_network()
    alone = by_masks(net, sites=["5"], draws=500, seed=1)
    tail = float(dl.penalty(net, x, cross_entropy, sites=["5"]))
    assert float(alone) == pytest.approx(tail, rel=0.3)
    first = by_masks(net)
    assert float(by_masks(net, seed=first.seed)) == float(first)
    assert float(by_masks(net)) != float(first)
    assert float(by_masks(nn.Linear(2, 3).double())) == 0.0
    assert float(by_masks(deep_network(1.0), seed=0)) == 0.0  # p = 1 leaves no noise
    with pytest.raises(ValueError, match="draws has to be at least 2, but got 1"):
        by_masks(net, draws=1)
    with pytest.raises(ValueError, match="sites holds '9', which is not a site with a law"):
        by_masks(net, sites=["9"])
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 0.0, 3.0], dtype=torch.float64))
    with pytest.raises(ValueError, match="pass targets="):
        by_masks(net, loss)
    assert float(by_masks(net, loss, targets=labels)) > 0


def test_errors_of_examples_take_a_hundred_masks():
    net, rows = deep_network(0.3), randn(16, x.shape[1])
    with torch.no_grad():
        few, many = (
            dl.penalty(net, rows, cross_entropy, "masks", draws=draws, seed=0)
            for draws in (99, 100)
        )
    assert bool(few.example_errors.isnan().all())
    assert few.standard_error > 0
    assert bool((many.example_errors > 0).all())
    assert (few.draws, many.draws) == (99, 100)


def test_rare_masks_take_the_error_and_many_batches_give_it_back():
    """A unit of four dropped once in 100 passes; 100 examples see it often, one by one or not."""
    net = deep_network(0.01)
    rows = randn(60, x.shape[1])
    with torch.no_grad():
        one = dl.penalty(net, rows[:1], cross_entropy, "masks", draws=60, seed=0)
        loader = DataLoader(rows, batch_size=1)
        found = dl.penalty(net, loader, cross_entropy, "masks", draws=60, seed=0)
    assert math.isnan(one.standard_error)
    assert found.standard_error > 0
    low, high = found.sampled().interval()
    assert low < float(found) < high


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 2, 5])
def test_intervals_cover_the_truth_at_their_level(n):
    """1,000 repeats of the default's masks: the interval holds the enumerated spread in 93–97%."""
    net = deep_network(0.3)
    expected, first = (truth(net, 0.3, examples=k)[1] for k in (n, 1))
    covering, by_example = Covering({"total": expected}), Covering({"first": first / n})
    for seed in range(1000):
        with torch.no_grad():
            found = dl.penalty(net, x[:n], cross_entropy, "masks", seed=seed)
        assert found.draws == 200 // n
        own = Estimate(float(found.per_example[0]), float(found.example_errors[0]), found.draws)
        covering.add({"total": found.sampled()})
        by_example.add({"first": own})
    covering.assert_at_level()
    if n < 3:
        by_example.assert_at_level()


def test_few_examples_have_more_masks():
    """As many as make 200 of an example, and 16 at least."""
    net, seen = deep_network(0.3), []
    net.register_forward_hook(lambda *_: seen.append(1))

    def passes(n, draws=None):
        seen.clear()
        dl.penalty(net, randn(n, x.shape[1]), cross_entropy, "masks", draws=draws, seed=0)
        return len(seen)

    for n, draws in ((1, 200), (7, 29), (12, 17), (13, 16), (40, 16)):
        assert passes(n) == passes(n, draws)
