"""Deep networks before a dropped last layer: what the prediction is, and what it tells apart."""

import numpy as np
import pytest
import torch
from torch import nn

from droplens.linear import solve
from droplens.nn import GroupedDropout
from droplens.papers import Theory, find
from droplens.papers.p4 import _deep, _networks

GRADED = {"n": 60, "targets": "graded", "r": 20, "keep": 0.4, "block": 4}


def told(setting, broken=""):
    _, targets = _deep.images(setting)
    m = torch.linalg.svdvals(targets.double())
    r, keep, block = (setting[name] for name in ("r", "keep", "block"))
    return _deep.predicted(m, r, keep, block, Theory(broken)), m


def distance(first, second):
    return float((first - second).norm() / second.norm())


@pytest.mark.parametrize("targets", ["graded", "one-hot"])
@pytest.mark.parametrize("block", [1, 4])
def test_the_prediction_is_the_solution_with_free_features(targets, block):
    """Features that can be anything are a linear network on one-hot inputs, one per example."""
    setting = {**GRADED, "targets": targets, "block": block}
    _, Y = _deep.images(setting)
    solution = solve(np.eye(len(Y)), Y.double().numpy(), 0.6, 20, block)
    found = torch.as_tensor(solution.singular_values) * len(Y) ** 0.5
    values, _ = told(setting)
    np.testing.assert_allclose(values[: len(found)], found, atol=1e-9)


@pytest.mark.parametrize("block", [1, 4])
def test_rivals_of_the_prediction_lie_more_than_twice_the_threshold_away(block):
    threshold = find("P4.deep").criterion.high
    setting = {**GRADED, "block": block}
    right, m = told(setting)
    rivals = {
        "the other block size": told({**setting, "block": 5 - block})[0],
        "no shrinkage": m,
        "one factor for all": m * (m @ right) / (m @ m),
        "wrong λ": told(setting, "wrong-lambda")[0],
        "twice the penalty": told(setting, "penalty-doubled")[0],
    }
    near = {name: distance(rival, right) for name, rival in rivals.items()}
    assert min(near.values()) > 2 * threshold, near


def test_one_hot_targets_do_not_tell_blocks_from_units():
    setting = {**GRADED, "targets": "one-hot"}
    assert distance(told({**setting, "block": 1})[0], told(setting)[0]) < 1e-9


@pytest.mark.parametrize("scale", ["test", "laptop"])
def test_class_detectors_come_within_a_percent_of_the_minimum(scale):
    """Non-negative features, r/10 units a class: so the ReLU alone does not explain the claim."""
    setting = find("P4.deep-relu").settings[scale][0]
    _, Y = _deep.images(setting)
    variance, units = 1 / setting["keep"] - 1, setting["r"] // 10
    m = Y.sum(0).double().sqrt()
    # Class c: min over a of (m − a)² + λ a²/units.
    detectors = (m.square() * variance / (units + variance)).sum()
    bound = solve(np.eye(len(Y)), Y.double().numpy(), 1 - setting["keep"], setting["r"])
    assert 1 <= float(detectors) / (bound.value * len(Y)) < 1.01


def short(network, **changes):
    setting = find("P4.deep").settings["test"][0]
    small = {"n": 20, "steps": 3, "width": 4, "batch": 10, "network": network}
    return {**setting, **small, "keep": [0.4, 0.6], "block": [4, 1], **changes}


def slow_twin(setting, seed, keep, block, p=None):
    """One network by torch's own loop, from the global stream, with the layer a user would take."""
    inputs, targets = _deep.images(setting)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        body = _networks.BODIES[setting["network"]](inputs.shape[1:], 20, setting["width"])
        drop = GroupedDropout(1 - keep if p is None else p, block)
        network = nn.Sequential(body, drop, nn.Linear(20, 10, bias=False))
        optimizer = torch.optim.Adam(network.parameters(), lr=setting["rate"])
        for step in range(setting["steps"]):
            left = min(1.0, 2 * (1 - step / setting["steps"]))
            optimizer.param_groups[0]["lr"] = setting["rate"] * left
            rows = torch.randperm(len(inputs))[: setting["batch"]]
            loss = (network(inputs[rows]) - targets[rows]).square().sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return network.eval()(inputs).detach().double()


@pytest.mark.parametrize("broken", ["", "swapped-losses"])
@pytest.mark.parametrize("network", ["MLP", "VGG", "ResNet"])
def test_stacked_networks_train_as_one_does_alone(network, broken):
    setting, seeds, theory = short(network, steps=12), (3, 8), Theory(broken)
    data = _deep.images(setting)
    found = _networks.train_networks(data, setting, seeds, theory, True)
    kinds = [(seed, keep, block) for keep, block in ((0.4, 4), (0.6, 1)) for seed in seeds]
    for predictions, kind in zip(found, kinds, strict=True):
        alone = slow_twin(setting, *kind, p=0.0 if broken else None)
        torch.testing.assert_close(predictions, alone, rtol=1e-3, atol=1e-5)


def test_training_repeats_and_leaves_the_global_stream_alone():
    setting = short("MLP")
    data = _deep.images(setting)
    before = torch.get_rng_state()
    first, second, other = (
        _networks.train_networks(data, setting, [seed], Theory(), True) for seed in (3, 3, 4)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
